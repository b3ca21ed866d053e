"""Lists of tensors that one kernel call steps together, and the state that they step.

A bucket holds parameters of one group with one dtype, device and step count. ``QuantizedBucket``
is BLAQ proper (1 to 4 bits); ``AdamWBucket`` is the rest: parameters in full precision, and 8-bit
ones, whose latent weights take AdamW's step and are then quantized.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from blaq_kernels import flat
from blaq_kernels.reference import SCALE_TINY, scale_shape, to_groups
from blaq_kernels.rules import require

from .codebook import levels_for
from .quantization import Quantization, record

Group = dict[str, Any]
State = dict[str, Tensor]
BLAQ_BITS = (1, 2, 3, 4)
STATES = ("latent", "exp_avg", "exp_avg_sq", "scale")  # in the order of the kernels' arguments
MOST_GATHERED = 1 << 26
"""Elements of a list whose states are laid side by side. A call costs 0.15 us for each tensor of
its lists on a CPU, which counts where a kernel takes as little; gathering makes a copy."""


def levels_in(group: Group) -> tuple[float, ...]:
    """Codebook of a quantized group."""
    return levels_for(group["codebook"], group["bits"])


def new_state(param: Tensor, group: Group) -> State:
    """State of a parameter before its first step. What is quantized, or narrower than float32, has
    float32 latent weights; moments are as wide as what they move."""
    state = {"step": torch.zeros((), dtype=torch.float32, device=param.device)}
    master = param.detach()
    if group["bits"] is not None or param.dtype in (torch.bfloat16, torch.float16):
        master = state["latent"] = master.to(torch.float32, copy=True)
    state["exp_avg"] = torch.zeros_like(master)
    state["exp_avg_sq"] = torch.zeros_like(master)
    if group["bits"] == 8:
        state["scale"] = absmax(master, group["group_size"])
    elif group["bits"] is not None:
        state["scale"] = torch.ops.blaq.solve.default(
            master, torch.ones_like(master), None, levels_in(group), group["group_size"],
            group["max_iter"], group["method"])[1]
    return state


def absmax(latent: Tensor, group_size: int) -> Tensor:
    """Scale of the 8-bit grid: the largest |w| of each group."""
    largest = to_groups(latent.abs(), group_size).amax(1).clamp_min(SCALE_TINY)
    return largest.reshape(scale_shape(latent.shape, group_size))


def write_param(param: Tensor, state: State, group: Group) -> Tensor:
    """Make ``param`` what its latent weights stand for: quantized, or rounded to its dtype."""
    if group["bits"] is not None:
        param.copy_(torch.ops.blaq.fake_quantize.default(state["latent"], state["scale"],
                                                         levels_in(group), group["group_size"]))
    elif "latent" in state:
        param.copy_(state["latent"])
    return param


def laid_out_as(param: Tensor, grad: Tensor) -> Tensor:
    """A copy of ``grad`` with the strides of ``param``."""
    require(grad.layout == torch.strided, "BLAQ.step", "grad", "be dense", grad.layout)
    return torch.empty_like(param).copy_(grad)


class Bucket:
    """Parameters of one group that have always stepped together; they share one ``step`` tensor."""

    def __init__(self, group: Group, params: list[Tensor], states: list[State]) -> None:
        self.group, self.params, self.states = group, params, states
        self.exp_avgs = [state["exp_avg"] for state in states]
        self.exp_avg_sqs = [state["exp_avg_sq"] for state in states]
        self.step = states[0]["step"].clone()
        for state in states:
            state["step"] = self.step
        self._mark_written()

    def _mark_written(self) -> None:
        self._versions = [param._version for param in self.params]

    def write_params(self) -> None:
        """Make every parameter what its latent weights stand for."""
        if "latent" not in self.states[0]:
            return
        for param, state in zip(self.params, self.states, strict=True):
            write_param(param, state, self.group)
        self._mark_written()

    def overwritten(self) -> Tensor | None:
        """A parameter that someone else gave other values than its latent weights stand for: the
        next step would lose them. Versions are compared first, values only where one has moved."""
        if self._versions != [param._version for param in self.params]:
            for param, state in zip(self.params, self.states, strict=True):
                expected = torch.empty_like(param)
                if "latent" in state and not torch.equal(
                        param, write_param(expected, state, self.group)):
                    return param
            self._mark_written()
        return None

    def gradients(self) -> list[Tensor]:
        """``grad`` of every parameter, contiguous as the kernels want it."""
        grads = [param.grad for param in self.params]
        if all(map(Tensor.is_contiguous, grads)):
            return grads
        return [g if g.is_contiguous() else laid_out_as(p, g)
                for p, g in zip(self.params, grads, strict=True)]

    def find_nonfinite(self, grads: list[Tensor]) -> Tensor:
        """Float32 0-dim: 1 if a gradient has NaN or Inf. GradScaler's kernel: for 200 small tensors
        6 times faster than norms (50 against 320 us on a CPU); its factor of 1 changes nothing."""
        found = torch.zeros((), device=self.step.device)
        torch._amp_foreach_non_finite_check_and_unscale_(grads, found, torch.ones_like(found))
        return found

    @property
    def blends_trial(self) -> bool:
        """Whether a trial's gradient has a part in the step."""
        return self.group["backtrack"] < 1.0 and not self.group["one_pass"]

    @property
    def blends_previous(self) -> bool:
        """Whether last step's blended gradient has a part in the step."""
        return self.group["backtrack"] < 1.0 and self.group["one_pass"]

    def previous_blend(self) -> list[Tensor]:
        """One-pass variant: last step's blended gradients; none before the first step."""
        return [state["blended"] for state in self.states if "blended" in state]

    def keep_blend(self, grads: Sequence[Tensor], previous: Sequence[Tensor],
                   found_inf: Tensor | None) -> None:
        """One-pass variant: remember g = a g_previous + (1-a) ĝ for the next step."""
        if not previous:  # the first step, which is LAQ's, so there is nothing to blend with
            if found_inf is None or not found_inf.item():
                for state, grad in zip(self.states, grads, strict=True):
                    state["blended"] = grad.clone()
            return
        for old, new in zip(previous, blend(previous, grads, self.group["backtrack"]), strict=True):
            old.copy_(new if found_inf is None else torch.where(found_inf > 0, old, new))

    def count_step(self, found_inf: Tensor | None) -> None:
        self.step.add_(1.0 if found_inf is None else 1.0 - found_inf.reshape(()))


def gather(states: Sequence[State]) -> None:
    """Lay the quantized weights' states side by side, so that a kernel takes each as one tensor."""
    if len(states) < 2 or sum(state["latent"].numel() for state in states) > MOST_GATHERED:
        return
    for name in STATES:
        tensors = [state[name] for state in states]
        if flat.joined(tensors) is None:
            for state, tensor in zip(states, flat.join(tensors), strict=True):
                state[name] = tensor


def owned(states: Mapping[Tensor, State]) -> defaultdict[Tensor, State]:
    """States for pickling, where a view takes all its storage along; torch.save keeps one once."""
    def own(x: Any) -> Any:
        shares = isinstance(x, Tensor) and x.untyped_storage().nbytes() > x.nbytes
        return x.clone() if shares else x

    return defaultdict(dict, {param: {name: own(x) for name, x in state.items()}
                              for param, state in states.items()})


class QuantizedBucket(Bucket):
    """1 to 4 bits: both stages are one call of a fused kernel each."""

    def __init__(self, group: Group, params: list[Tensor], states: list[State]) -> None:
        super().__init__(group, params, states)
        self.scales = [state["scale"] for state in states]
        lists = [[state[name] for state in states] for name in STATES]
        self.kernel_states = [tensors if (whole := flat.joined(tensors)) is None else [whole]
                              for tensors in lists]
        self.levels = levels_in(group)
        self.flips = torch.zeros(len(params), dtype=torch.int64, device=params[0].device)
        for param, scale, flips in zip(params, self.scales, self.flips, strict=True):
            record(param, Quantization(self.levels, group["group_size"], scale, flips))

    def _hyper(self) -> tuple[Any, ...]:
        group = self.group
        return (*group["betas"], group["eps"], group["weight_decay"], group["clip"], self.levels,
                group["group_size"], group["max_iter"], group["method"])

    def trial(self, grads: list[Tensor], grad_scale: Tensor | None,
              found_inf: Tensor | None) -> None:
        """Stage 1: trial weights into ``params``, nothing else."""
        torch.ops.blaq.fused_trial.default(
            self.params, grads, *self.kernel_states, scalar(self.group["lr"]), self.step + 1,
            *self._hyper(), grad_scale, found_inf)

    def update(self, grads: list[Tensor], trial_grads: list[Tensor], grad_scale: Tensor | None,
               found_inf: Tensor | None) -> None:
        """Stage 2; without ``trial_grads`` a step of LAQ."""
        backtrack = scalar(self.group["backtrack"] if trial_grads else 1.0)
        torch.ops.blaq.fused_step.default(
            self.params, grads, trial_grads, *self.kernel_states, scalar(self.group["lr"]),
            self.step + 1, backtrack, *self._hyper(), grad_scale, found_inf, self.flips)
        self._mark_written()
        self.count_step(found_inf)


class AdamWBucket(Bucket):
    """Everything else: torch's fused AdamW, on the latent weights where there are any."""

    def __init__(self, group: Group, params: list[Tensor], states: list[State]) -> None:
        super().__init__(group, params, states)
        self.masters = [s.get("latent", p) for p, s in zip(params, states, strict=True)]
        if group["bits"] is not None:
            for param, state in zip(params, states, strict=True):
                record(param, Quantization(levels_in(group), group["group_size"], state["scale"]))

    def gradients(self) -> list[Tensor]:
        """``grad`` of every parameter, laid out as the parameter: torch's kernel wants that."""
        grads = [(param.grad, param) for param in self.params]
        return [g if g.stride() == p.stride() else laid_out_as(p, g) for g, p in grads]

    def update(self, grads: list[Tensor], trial_grads: list[Tensor], grad_scale: Tensor | None,
               found_inf: Tensor | None) -> None:
        """AdamW with the blended gradient."""
        if trial_grads:
            grads = blend(grads, trial_grads, self.group["backtrack"])
        if grads[0].dtype != self.masters[0].dtype:
            grads = [grad.to(self.masters[0].dtype) for grad in grads]
        if grad_scale is not None:
            grads = torch._foreach_div(grads, grad_scale.reshape(()))
        lr, (beta1, beta2) = self.group["lr"], self.group["betas"]
        count = self.step + 1
        torch._fused_adamw_(
            self.masters, grads, self.exp_avgs, self.exp_avg_sqs, [], [count] * len(grads),
            lr=lr.item() if isinstance(lr, Tensor) and lr.is_cpu else lr, beta1=beta1, beta2=beta2,
            weight_decay=self.group["weight_decay"], eps=self.group["eps"], amsgrad=False,
            maximize=False, grad_scale=None, found_inf=found_inf)
        if self.group["bits"] == 8:
            for state in self.states:
                state["scale"].copy_(absmax(state["latent"], self.group["group_size"]))
        self.write_params()
        self.count_step(found_inf)


def blend(current: Sequence[Tensor], trial: Sequence[Tensor], backtrack: float) -> list[Tensor]:
    """Eq. 9 for lists: ``a · current + (1 - a) · trial``."""
    a = float(backtrack)
    return torch._foreach_add(torch._foreach_mul(current, a), torch._foreach_mul(trial, 1.0 - a))


def scalar(value: float | Tensor) -> Tensor:
    """A hyper-parameter as the kernels take it: a 0-dim tensor, so that no value is compiled in."""
    if isinstance(value, Tensor):
        return value.reshape(())
    return torch.tensor(value, dtype=torch.float64)
