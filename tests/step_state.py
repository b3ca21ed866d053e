"""Lists of weights for the tests of step ops, and what a step must have made of them."""

import torch

from blaq_kernels import reference as ref

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FEW = [("binary", 1), ("ternary", 2), ("linear", 4), ("pow2", 4)]
CODEBOOKS = [("binary", 1), ("pow2", 2), ("ternary", 2), ("pow2", 3), ("uniform", 3), ("linear", 4),
             ("pow2", 4), ("pow2_zero", 4)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(3,), (5, 33), (0, 4), (2, 3, 5, 5), (4, 64), (6, 0)]
HYPER = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01, "clip": 0.5,
         "max_iter": 5}
STATE = ("params", "latents", "exp_avgs", "exp_avg_sqs", "scales")
REFERENCE = (ref.fused_trial, ref.fused_step)


def scalar(value, dtype=torch.float32):
    return torch.tensor(value, dtype=dtype, device=DEVICE)


def make_state(levels, group_size, dtype, shapes=SHAPES, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(shape, size=1.0):
        return (size * torch.randn(shape, generator=generator)).to(DEVICE)

    latents = [normal(s, 0.3) for s in shapes]
    scales = [ref.solve(w, torch.ones_like(w), None, levels, group_size, 5, "alternating")[1]
              for w in latents]
    return {"params": [torch.empty(s, dtype=dtype, device=DEVICE) for s in shapes],
            "grads": [normal(s).to(dtype) for s in shapes],
            "trial_grads": [normal(s).to(dtype) for s in shapes], "latents": latents,
            "exp_avgs": [normal(s, 0.1) for s in shapes],
            "exp_avg_sqs": [normal(s).square() for s in shapes], "scales": scales}


def tail(levels, group_size, method="alternating", **more):
    return {**HYPER, "lr": scalar(0.01), "step": scalar(3.0), "levels": levels,
            "group_size": group_size, "method": method, **more}


def both_stages(ops, levels, group_size, dtype, method="alternating", shapes=SHAPES, **more):
    """Everything that a trial and a step write: params of the trial, of the step, state, flips."""
    trial_op, step_op = ops
    state = make_state(levels, group_size, dtype, shapes)
    flips = torch.full((len(shapes),), -1, device=DEVICE)
    arguments = tail(levels, group_size, method, **more)
    trial_op(**{k: v for k, v in state.items() if k != "trial_grads"}, **arguments)
    trial = [p.clone() for p in state["params"]]
    step_op(**state, **arguments, backtrack=scalar(0.6), flips=flips)
    return trial, state, flips
