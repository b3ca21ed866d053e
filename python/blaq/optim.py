"""The BLAQ optimizer: stages, closures, checks, checkpoints; ``_buckets.py`` calls the kernels."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, ParamsT

from blaq_kernels.rules import require

from ._buckets import (
    BLAQ_BITS,
    AdamWBucket,
    Bucket,
    Group,
    QuantizedBucket,
    gather,
    new_state,
    owned,
    write_param,
)
from .param_groups import check_group
from .trial import RandomState, evaluate, modules_with_buffers, trial_pass

__all__ = ["BLAQ"]

log = logging.getLogger("blaq")
QUANTIZATION_KEYS = ("bits", "codebook", "group_size")


class _Trial(NamedTuple):
    """What stage 1 keeps for stage 2."""

    buckets: list[Bucket]
    grads: list[list[Tensor]]
    grad_scale: Tensor | None
    found_inf: Tensor | None


class _Exact:
    """Hides a state tensor from torch's loading, which would cast it to the parameter's dtype."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class BLAQ(Optimizer):
    """Trains weights of 1 to 4 bits by one step forward and backtrack (arXiv 2401.16760).

    Every quantized parameter holds its quantized weight from construction on, so the model runs,
    evaluates and saves what will be shipped; the float weights it had become ``state["latent"]``.
    Load a float checkpoint into the model before making the optimizer. Groups without ``bits`` are
    trained by AdamW in the same step, in float32 also where the parameter is narrower; 8-bit groups
    as well, then rounded to a uniform grid. Neither is moved by the trial; gradients blend alike.

    One step evaluates the loss twice on one mini-batch, at the weights and at trial weights::

        opt = blaq.BLAQ(blaq.param_groups(model, bits=1), lr=3e-3)

        def closure():
            opt.zero_grad()
            loss = loss_of(model(x), y)
            loss.backward()          # clip gradients after this line
            return loss

        loss = opt.step(closure)

    The second evaluation replays torch's random state and leaves no trace in the model's buffers
    (batch-norm statistics); the model is known from ``param_groups``, or from a key ``model`` in a
    group. Without a closure: ``backtrack=1`` (LAQ) and ``one_pass=True`` need one evaluation, so
    ``step()`` after ``backward()``; else see :meth:`trial_step`. In fp16,
    ``torch.amp.GradScaler`` works without a closure, as it takes none.

    Not for: parameters that are not contiguous, sparse gradients, complex numbers.

    Args:
        params: groups from :func:`blaq.param_groups`, or any that torch's optimizers take; the key
            ``bits`` (1 to 4, or 8) makes a group quantized. Float32, bfloat16 or float16.
        lr: learning rate, at least 0; a float or a tensor of one element. 3e-3 is what sweeps of
            small networks from scratch chose (docs/evidence.md); less for fine-tuning.
        codebook: name or magnitudes, see :func:`blaq.levels_for`.
        group_size: 0 one scale for a tensor (the paper), -1 for a row, g > 0 for g inputs of a row.
        backtrack: the paper's a in (0, 1]: weight of the current gradient against the trial's. 0.6
            is the paper's for small networks, 0.9 for ImageNet; 1 is LAQ.
        max_iter: the paper's m: most alternations of a solve.
        method: ``alternating`` (the paper's solve) or ``exact`` (its global minimum).
        betas, eps: Adam's, for momentum and curvature alike.
        weight_decay: decoupled, on the latent weights.
        clip: latent weights stay in [-clip, clip]. 0, the default, is off: right for fine-tuning.
            1.0 is LAQ's and the paper's for small networks from scratch.
        one_pass: Eq. 9 recursively: last step's blended gradient is its current one, this step's its
            trial's. One evaluation.
        on_nonfinite: ``raise`` names the parameter whose gradient is not finite, before anything is
            changed; ``skip`` drops the step and counts it in ``skipped``, without a device
            synchronisation.

    A parameter takes part in a step if it has a gradient in the first evaluation; if it then has
    none in the second, the first stands for both.

    Raises:
        ValueError: an argument breaks its rule: ``blaq.BLAQ: lr must be at least 0, got -1``.
    """

    _step_supports_amp_scaling = True

    def __init__(self, params: ParamsT, lr: float | Tensor = 3e-3, *,
                 codebook: str | Sequence[float] = "pow2", group_size: int = 0,
                 backtrack: float = 0.6, max_iter: int = 5, method: str = "alternating",
                 betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
                 weight_decay: float = 0.0, clip: float = 0.0, one_pass: bool = False,
                 on_nonfinite: str = "raise") -> None:
        self._buckets: list[Bucket] = []
        self._idle: list[Bucket] = []
        self._constructed = False
        self._pending: _Trial | None = None
        self._modules: list[nn.Module] = []
        self._skipped: Tensor | None = None
        super().__init__(params, {
            "lr": lr, "bits": None, "codebook": codebook, "group_size": group_size,
            "backtrack": backtrack, "max_iter": max_iter, "method": method, "betas": betas,
            "eps": eps, "weight_decay": weight_decay, "clip": clip, "one_pass": one_pass,
            "on_nonfinite": on_nonfinite})
        if all(group["bits"] is None for group in self.param_groups):
            log.warning("blaq.BLAQ: no group has bits, so all are trained by AdamW in full "
                        "precision; blaq.param_groups(model, bits=1) chooses layers to quantize")
        for group in self.param_groups:  # only now: a bad group must leave no parameter quantized
            self._quantize(group)
        self._fill_buckets()
        self._constructed = True

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as with any optimizer; quantized parameters are quantized at once."""
        if self._pending is not None:
            raise RuntimeError("blaq.BLAQ.add_param_group: step() must end the trial first")
        options = dict(param_group)
        model = options.pop("model", None)  # not a hyper-parameter: no place in a checkpoint
        super().add_param_group(options)
        try:
            check_group(self.param_groups[-1])
        except Exception:
            self.param_groups.pop()
            raise
        if model is not None:
            self._modules += [m for m in modules_with_buffers(model)
                              if all(m is not known for known in self._modules)]
        if self._constructed:
            self._quantize(self.param_groups[-1])
            self._fill_buckets()

    @property
    def evaluations_per_step(self) -> int:
        """How often ``step(closure)`` runs its closure: 2, or 1 where no group needs a trial."""
        return 2 if any(group["bits"] in BLAQ_BITS and group["backtrack"] < 1.0
                        and not group["one_pass"] for group in self.param_groups) else 1

    @property
    def skipped(self) -> int:
        """Steps dropped for gradients that were not finite, since construction."""
        return 0 if self._skipped is None else int(self._skipped)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; algorithm.md, stages 1 and 2.

        Args:
            closure: clears gradients, evaluates the loss, calls ``backward`` and returns the loss.
                Run :attr:`evaluations_per_step` times, at once. If the second run raises, the
                parameters, buffers and generators are put back.

        Returns:
            The first evaluation's loss; None without a closure.

        Raises:
            RuntimeError: no closure where one is needed; a gradient is not finite.
            ValueError: the closure returns no scalar.
        """
        two = self.evaluations_per_step == 2
        if closure is not None and self._pending is not None:
            raise RuntimeError("blaq.BLAQ.step: closure must not be given after trial_step()")
        if closure is None and self._pending is None and two:
            raise RuntimeError(
                "blaq.BLAQ.step: a closure must be given where backtrack < 1, got none; try "
                "step(closure), or trial_step() and a second evaluation before step(), or one "
                "evaluation with one_pass=True or backtrack=1 (LAQ)")
        loss = None
        try:
            if closure is not None:
                random_state = RandomState()
                loss = evaluate(closure)
                if two:
                    self.trial_step()
                    with trial_pass(self._modules, random_state):
                        evaluate(closure)
            self._commit()
        except BaseException:
            self.cancel_trial()
            raise
        return loss

    @torch.no_grad()
    def trial_step(self, grad_scale: float | Tensor | None = None) -> None:
        """Stage 1 for loops that cannot give a closure: call it after ``backward``.

        Takes the gradients (``grad`` becomes None), writes trial weights into the parameters and
        changes nothing else. Then evaluate again inside :func:`blaq.trial_pass` and call
        ``step()``; :meth:`cancel_trial` goes back instead.

        Args:
            grad_scale: ``scaler.get_scale()`` where the loss was scaled by a GradScaler.

        Raises:
            RuntimeError: a trial is under way, no group needs one, or a gradient is not finite.
        """
        if self._pending is not None:
            raise RuntimeError("blaq.BLAQ.trial_step: step() must end the trial first")
        if self.evaluations_per_step == 1:
            raise RuntimeError("blaq.BLAQ.trial_step: a quantized group must have backtrack < 1 "
                               "and one_pass=False, got none; step() alone is enough")
        buckets = self._active_buckets()
        grads = [bucket.gradients() for bucket in buckets]
        scale = None
        if grad_scale is not None:
            scale = torch.as_tensor(grad_scale, dtype=torch.float32)
        found_inf = self._find_nonfinite(buckets, grads, quiet=scale is not None)
        # A gradient that views a bucket of DDP's would be overwritten by the second backward.
        grads = [[grad.clone() if grad._is_view() else grad for grad in kept] for kept in grads]
        self._pending = _Trial(buckets, grads, scale, found_inf)
        for bucket, kept in zip(buckets, grads, strict=True):
            if isinstance(bucket, QuantizedBucket) and bucket.blends_trial:
                bucket.trial(kept, scale, found_inf)
            for param in bucket.params:
                param.grad = None

    @torch.no_grad()
    def cancel_trial(self) -> None:
        """Undo :meth:`trial_step`, if one is under way: weights and gradients as they were."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        for bucket, grads in zip(pending.buckets, pending.grads, strict=True):
            bucket.write_params()
            for param, grad in zip(bucket.params, grads, strict=True):
                param.grad = grad

    def _commit(self) -> None:
        """Stage 2 with the gradients that are there."""
        grad_scale = getattr(self, "grad_scale", None)  # GradScaler sets both for the call
        found_inf = getattr(self, "found_inf", None)
        pending = self._pending
        if pending is None:
            buckets = self._active_buckets()
            grads = latest = [bucket.gradients() for bucket in buckets]
        else:
            buckets, grads = pending.buckets, self._same_scale(pending, grad_scale)
            for bucket, kept in zip(buckets, grads, strict=True):
                for param, grad in zip(bucket.params, kept, strict=True):
                    if param.grad is None:
                        param.grad = grad
            latest = [bucket.gradients() for bucket in buckets]
        if found_inf is None:
            found_inf = self._find_nonfinite(buckets, latest)
        if pending is not None and pending.found_inf is not None:
            found_inf = pending.found_inf if found_inf is None else found_inf + pending.found_inf
        if found_inf is not None:
            found_inf = found_inf.clamp(max=1.0)
            self._skipped = found_inf + (0.0 if self._skipped is None else self._skipped)
        for bucket, now, then in zip(buckets, grads, latest, strict=True):
            local = None if found_inf is None else found_inf.to(bucket.step.device)
            if bucket.blends_previous:
                previous = bucket.previous_blend()
                unscaled = now if grad_scale is None else torch._foreach_div(
                    now, grad_scale.reshape(()))
                if previous:
                    bucket.update(previous, unscaled, None, local)
                else:  # the first step, which is LAQ's
                    bucket.update(unscaled, [], None, local)
                bucket.keep_blend(unscaled, previous, local)
            else:
                blends = pending is not None and bucket.blends_trial
                bucket.update(now, then if blends else [], grad_scale, local)
        self._pending = None

    def _same_scale(self, pending: _Trial, grad_scale: Tensor | None) -> list[list[Tensor]]:
        """Gradients of stage 1, scaled as the present ones are."""
        if pending.grad_scale is None and grad_scale is not None:
            raise RuntimeError("blaq.BLAQ.step: grad_scale must be given to trial_step as well, "
                               "got None; try trial_step(grad_scale=scaler.get_scale())")
        if pending.grad_scale is not None and grad_scale is None:  # scaler.unscale_ came before
            return [list(torch._foreach_div(grads, pending.grad_scale)) for grads in pending.grads]
        return pending.grads

    def _find_nonfinite(self, buckets: list[Bucket], grads: list[list[Tensor]],
                        quiet: bool = False) -> Tensor | None:
        """Raises for a gradient that is not finite; where that may pass, a float32 flag of it."""
        flag = None
        for bucket, members in zip(buckets, grads, strict=True):
            found = bucket.find_nonfinite(members)
            if bucket.group["on_nonfinite"] == "skip" or quiet:
                flag = found if flag is None else flag.to(found.device) + found
            elif found.item():
                bad = next(i for i, grad in enumerate(members) if not grad.isfinite().all())
                raise RuntimeError(
                    f"blaq.BLAQ.step: gradient of {self._name(bucket.params[bad])} must be finite, "
                    "got NaN or Inf; nothing was changed; try on_nonfinite='skip'")
        return flag

    def _name(self, param: Tensor) -> str:
        for i, group in enumerate(self.param_groups):
            for j, member in enumerate(group["params"]):
                if member is param:
                    names = group.get("param_names")
                    return repr(names[j]) if names else f"param_groups[{i}]['params'][{j}]"
        raise KeyError("the parameter is in no group")

    def _quantize(self, group: Group) -> None:
        """Give every parameter its state; a quantized one also its first quantized weight."""
        with torch.no_grad():
            for param in group["params"]:
                self.state[param] = new_state(param, group)
                write_param(param, self.state[param], group)

    def _active_buckets(self) -> list[Bucket]:
        """Buckets of the parameters with a gradient; nobody else may have written a parameter."""
        for bucket in (*self._buckets, *self._idle):
            param = bucket.overwritten()
            if param is not None:
                raise RuntimeError(
                    f"blaq.BLAQ.step: {self._name(param)} must be written by the optimizer alone, "
                    "got other values; try loading weights before making the optimizer")
        if any([p.grad is None for bucket in self._buckets for p in bucket.params]) or any(
                [p.grad is not None for bucket in self._idle for p in bucket.params]):
            self._fill_buckets(lambda param: param.grad is not None)
        return self._buckets

    def _fill_buckets(self, active: Callable[[Tensor], bool] | None = None) -> None:
        """Sort the parameters into buckets, those without a gradient aside. States are gathered
        only where all are active: which have a gradient may change with every step."""
        self._buckets, self._idle = [], []
        for group in self.param_groups:
            members: dict[tuple[Any, ...], list[Tensor]] = {}
            for param in group["params"]:
                state = self.state[param]
                alike = (param.dtype, param.device, state["step"].item(), "blended" in state)
                members.setdefault((active is None or active(param), *alike), []).append(param)
            kind = QuantizedBucket if group["bits"] in BLAQ_BITS else AdamWBucket
            for (is_active, *_), params in members.items():
                states = [self.state[param] for param in params]
                if active is None and kind is QuantizedBucket:
                    gather(states)
                bucket = kind(group, params, states)
                (self._buckets if is_active else self._idle).append(bucket)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint; the run then goes on bit for bit.

        The groups must quantize as the checkpoint's do. Tensors are copied in their own dtype, and
        quantized parameters are written again from (latent, scale).

        Raises:
            ValueError: the checkpoint does not fit; nothing was changed.
        """
        def check_and_keep_dtypes(_: Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
            self._check_checkpoint(saved)
            return {**saved, "state": {
                key: {name: _Exact(value) if isinstance(value, Tensor) else value
                      for name, value in state.items()}
                for key, state in saved["state"].items()}}

        handle = self.register_load_state_dict_pre_hook(check_and_keep_dtypes)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        with torch.no_grad():
            for bucket in self._buckets:
                bucket.write_params()

    def _check_checkpoint(self, saved: dict[str, Any]) -> None:
        op = "BLAQ.load_state_dict"
        pairs = zip(saved["param_groups"], self.param_groups, strict=False)  # torch checks lengths
        for i, (old, group) in enumerate(pairs):
            for key in QUANTIZATION_KEYS:
                require(key in old and old[key] == group[key], op, f"param_groups[{i}][{key!r}]",
                        f"be {group[key]!r} as in this optimizer", repr(old.get(key)))
            for number, param in zip(old["params"], group["params"], strict=False):
                state = saved["state"].get(number, {})
                for name, tensor in self.state[param].items():
                    if name != "blended":
                        shape = list(state[name].shape) if name in state else "none"
                        require(shape == list(tensor.shape), op, f"{name} of {self._name(param)}",
                                f"have shape {list(tensor.shape)}", shape)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "state": owned(self.state), "_modules": self._modules,
                "_skipped": self._skipped}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.defaults.pop("differentiable", None)  # torch adds it: no option of this optimizer
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)
        for param, entry in self.state.items():
            for name, value in entry.items():
                if isinstance(value, _Exact):
                    entry[name] = value.tensor.to(param.device, copy=True)
        self._pending, self._constructed = None, True
        self._fill_buckets()
