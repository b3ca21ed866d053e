"""Device functions of the update: Eqs. 6 and 8-10 of BLAQ (AAAI 2024), as in csrc/update.h.

The learning rate stays out of the curvature: d = sqrt(v̂) + eps = lr · D. It cancels in the solve, and
lr = 0 then divides by nothing. Square root and division are the GPU's fast ones, good to 2 ulp.
"""

import triton
import triton.language as tl


@triton.jit
def bias_correction(step, log_beta):
    """``1 - beta^step`` in float32 to a few ulp: the difference cancels where beta^step is near 1."""
    x = step * log_beta
    series = 1.0 + x * (1 / 8)
    for k in tl.static_range(7, 1, -1):
        series = 1.0 + x * series * (1 / k)
    return tl.where(x > -0.5, -x * series, 1.0 - tl.exp(x))


@triton.jit
def scalar_of(pointer):
    """A 0-dim tensor, float32 or float64, as float32."""
    return tl.load(pointer).to(tl.float32)


@triton.jit
def everywhere(condition, like):
    """A condition that is one for the whole program, as a mask of the shape of ``like``."""
    return tl.full(like.shape, condition.to(tl.int32), tl.int32) != 0


@triton.jit
def advance(g, trial, latent, m, v, lr, step, backtrack, beta1, one_minus_beta1, log_beta1, beta2,
            one_minus_beta2, log_beta2, eps, weight_decay, clip, BLENDS: tl.constexpr):
    """New latent, first and second moment, and the curvature. ``clip`` 0 is off; with ``backtrack`` 1
    the trial gradient has no part, whatever it is."""
    inverse_bias2 = 1.0 / bias_correction(step, log_beta2)
    step_size = lr / bias_correction(step, log_beta1)
    decayed = beta2 * v
    new_v = decayed + one_minus_beta2 * (g * g)
    d = tl.sqrt(new_v * inverse_bias2) + eps
    if BLENDS:
        blends = everywhere(backtrack < 1.0, g)
        trial_d = tl.sqrt((decayed + one_minus_beta2 * (trial * trial)) * inverse_bias2) + eps
        d = tl.where(blends, backtrack * d + (1.0 - backtrack) * trial_d, d)  # Eq. 10
        g = tl.where(blends, backtrack * g + (1.0 - backtrack) * trial, g)  # Eq. 9
        new_v = decayed + one_minus_beta2 * (g * g)
    new_m = beta1 * m + one_minus_beta1 * g
    w = (1.0 - lr * weight_decay) * latent - step_size * new_m / d  # Eqs. 6 and 8
    if clip is not None:
        # Not clamp: it must not turn NaN into a number.
        w = tl.where(w > clip, clip, tl.where(w < -clip, -clip, w))
    return w, new_m, new_v, d
