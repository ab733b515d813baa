"""Learning the scales in the step itself, from the gradient that is there anyhow: docs/algorithm.md, section 13.

What the gradient says of the last update's scales is in hyper_gradient.py. Here is what becomes of it.
Longer than 300 lines: a third of it is the constructor with its documentation and its checks.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from .core import devices
from .core.checkpoint import check_count, check_keys, check_states, check_tensor
from .core.rule import Decision, Step
from .encoder import GroupEncoder, threads_for
from .hyper_gradient import learning_sums, log_derivatives, of_groups
from .meta import _unwrapped
from .meta_checkpoint import OF_OTHER_OPTIMIZERS, STATE, complete_states, with_adam_states
from .optimizer import _NO_SUM, LEAST_DECAY_FACTOR, MetaAdamW
from .reference import gradient_factor
from .weighting import encoder_penalty

Bounds = float | tuple[float, float]
DEFAULT_TRACE = 0.995
DEFAULT_RANGE: tuple[Bounds, Bounds] = ((0.0, math.log(64.0)), 0.0)
_RATES = {"scales": 0.3, "encoder": 1e-3}
_ADAMS = (torch.optim.Adam, torch.optim.AdamW)
_SAVED = ("policy", "log_scales", "last", "count", "features", "meta_optimizer")


class OnlineLearner:
    """Learns the scales of a :class:`~metaadamw_fast.MetaAdamW` in its ``step()``, at hardly more than the price of a step.

    The gradient of a step tells how its loss would have changed with the scales of the step before: sums that one pass makes beside
    the others, no model, no loss function, no batches. Once it is built there is nothing to call.

    A step that a GradScaler or ``skip_nonfinite`` leaves out teaches nothing. Neither does a tensor that did not move in the last
    step, has no gradient now, or was written by others in between, ``ema_params`` included; of writes that torch cannot see
    ``invalidate_statistics`` has to tell. Hyper-gradients are unscaled and not clipped.

    Args:
        optimizer: whose scales are learned. It may be inside the wrappers of Lightning, Fabric or Accelerate.
        policy: ``scales``: two numbers for each group, in the place of the encoder's output; the optimizer then makes no features,
            and a MetaLearner has nothing to learn. ``encoder``: the encoder's weights.
        gradient: ``cosine``: lr_scale moves by the cosine between the gradient and the moves before, wd_scale does not learn.
            ``loss``: by the derivative of the loss.
        rate, lr: how far. Two names of one number: of the step in the logarithm of a scale, default 0.3, or with ``encoder`` the
            learning rate of the meta-optimizer, default 1e-3.
        every: learn in every so many-th step only. Where the host does not know which steps a device leaves out, every so many-th
            call of ``step`` is meant.
        trace: decay of the sum of moves that the gradient is compared with; 0 takes the last move alone, and keeps no state. By
            default 0.995, or the optimizer's ``ema_decay``, from whose average the sum is made; without one it gets this one.
        make_optimizer: of the meta-optimizer, called as ``make_optimizer(params, lr=rate)``; for ``policy="encoder"``. By default
            Adam, fused, which leaves out on the device what is not finite. With one that is not fused the host waits for the device
            in each learning step.
        encoder_decay, gate_l1: as of :class:`~metaadamw_fast.MetaLearner`; for ``policy="encoder"``.
        range: in which the logarithms of lr_scale and wd_scale stay, for ``policy="scales"``; each a number r for [-r, r], or a
            pair. Default: ((0, ln 64), 0), so that no learning rate falls below the one given and wd_scale is 1.

    What is learned is in the optimizer's checkpoint. One that was loaded before the learner was built is taken up when it is.

    Raises:
        TypeError: an optimizer that is no MetaAdamW, nor a wrapper of one.
        ValueError: a number out of range, an unknown choice; an argument that the policy has no use for; ``rate`` and ``lr``; a
            ``trace`` that is neither 0 nor the optimizer's ``ema_decay``; a second learner.
    """

    @devices.outside_inference_mode
    def __init__(
        self,
        optimizer: MetaAdamW,
        *,
        policy: str = "scales",
        gradient: str = "cosine",
        rate: float | None = None,
        every: int = 1,
        trace: float | None = None,
        make_optimizer: Callable[..., torch.optim.Optimizer] | None = None,
        encoder_decay: float = 0.0,
        gate_l1: float = 0.0,
        lr: float | None = None,
        range: tuple[Bounds, Bounds] | None = None,
    ) -> None:
        unwrapped = _unwrapped(optimizer)
        if unwrapped is None:
            raise TypeError(f"an OnlineLearner learns the scales of a MetaAdamW, got {type(optimizer).__name__}")
        for name, value, choices in (
            ("policy", policy, ("scales", "encoder")),
            ("gradient", gradient, ("cosine", "loss")),
        ):
            if value not in choices:
                raise ValueError(f"Invalid {name}: {value!r} ({' or '.join(choices)})")
        if rate is not None and lr is not None:
            raise ValueError("rate and lr are two names of one number: give one of them")
        rate = next((x for x in (rate, lr) if x is not None), _RATES[policy])
        trace = (unwrapped.ema_decay or DEFAULT_TRACE) if trace is None else trace
        numbers = (("rate", rate), ("encoder_decay", encoder_decay), ("gate_l1", gate_l1))
        for name, number in numbers:
            if not 0.0 <= number < math.inf:
                raise ValueError(f"Invalid {name}: {number}")
        if not (isinstance(every, int) and every >= 1):
            raise ValueError(f"Invalid every: {every!r}")
        if not 0.0 <= trace < 1.0:
            raise ValueError(f"Invalid trace: {trace} (must be in [0, 1))")
        if trace and unwrapped.ema_decay not in (None, trace):
            raise ValueError(f"Invalid trace: {trace} (the optimizer's ema_decay is {unwrapped.ema_decay}, so this or 0)")
        of_encoder = {"make_optimizer": make_optimizer, "encoder_decay": encoder_decay, "gate_l1": gate_l1}
        useless = [name for name, x in (of_encoder if policy == "scales" else {"range": range}).items() if x]
        if useless:
            raise ValueError(f"policy={policy!r} has no use for {', '.join(useless)}")
        self.policy, self.gradient, self.rate, self.every, self.trace = policy, gradient, rate, every, trace
        self.encoder_decay, self.gate_l1 = encoder_decay, gate_l1
        self.range = _intervals(DEFAULT_RANGE if range is None else range)
        self._learns_decay = (
            gradient == "loss" and (policy == "encoder" or self.range[1] != (0.0, 0.0)) and unwrapped.variant != "released"
        )
        self._sums = learning_sums(gradient, trace, learns_decay=self._learns_decay)
        self._count, self._times_set = _steps_done(unwrapped), unwrapped.count_set[0]  # of steps, as far as the host knows
        # Of the step under way: whether something is learned, and the sums that it makes.
        self._due: Tensor | bool = False
        self._names: Sequence[str] = ()
        self._log_scales = torch.zeros(2, len(unwrapped.groups), dtype=torch.float64, device="cpu")
        self._bounds = torch.tensor(self.range, dtype=torch.float64, device="cpu")  # [2, 2]: of each scale the least and the most
        self._order = self._lengths = torch.empty(0, dtype=torch.long, device="cpu")
        self.meta_optimizer: torch.optim.Optimizer | None = None
        if policy == "encoder":
            make = _fused_adam if make_optimizer is None else make_optimizer
            self.meta_optimizer = make(_trained(unwrapped.encoder), lr=rate)
        unwrapped.attach(self)

    # ------------------------------------------------------------------------------------------- what the optimizer asks of it

    def measured(self, optimizer: MetaAdamW) -> Sequence[str]:
        """The sums that this step is to make to learn from, by name and in order."""
        return self._sums if self._is_due(optimizer) else ()

    def begin(self, optimizer: MetaAdamW, step: Step) -> None:
        """Decides whether the step under way is one to learn in, before it is counted."""
        self._due = self._is_due(optimizer)
        self._names = optimizer.measured()
        if self.every > 1 and _capturable(optimizer):
            self._due = torch.remainder(step.counts[-1] + 1, self.every) == 0

    def _is_due(self, optimizer: MetaAdamW) -> bool:
        """Whether sums to learn from are wanted. What is captured is replayed in every step, so that the device decides."""
        if self.every == 1 or _capturable(optimizer):
            return True
        if devices.readable(optimizer._counts):
            self._count = int(optimizer._counts[-1])
        elif optimizer.count_set[0] != self._times_set:
            self._times_set, self._count = optimizer.count_set
        return (self._count + 1) % self.every == 0

    def scales(self, like: Tensor) -> Tensor:
        """[4, G] of ``policy="scales"``; the weights of a meta-objective are 0."""
        return torch.nn.functional.pad(self._log_scales.exp(), (0, 0, 0, 2)).to(like.dtype)

    def learn(self, optimizer: MetaAdamW, sums: Tensor, step: Step) -> None:
        """Learns of the last update from ``sums`` [T, S] of this step's gradient and of what that update left."""
        last = optimizer._last
        if self._due is False or last is None:
            return
        teaches = last.numbers[1] != 0
        if step.present is not None:
            teaches = teaches & (step.present != 0)
        if self.gradient == "cosine":
            factor = step.grad_factor  # with which its Σg² is: the cosine is of the multiplied gradient, which is the same
        else:
            factor = gradient_factor(len(sums), step.hyper.sign, step.loss_scale)[0]
        of_tensors = log_derivatives(
            sums, self._names, last, teaches, factor, self.gradient, self.trace, learns_decay=self._learns_decay
        )
        derivatives = of_groups(of_tensors, self._order, self._lengths, self.gradient)
        goes = [x for x in (self._due, step.counted) if isinstance(x, Tensor)]
        if self.policy == "scales":
            moved = self._log_scales - self.rate * derivatives
            moved = torch.maximum(torch.minimum(moved, self._bounds[:, 1:]), self._bounds[:, :1])
            for go in (derivatives.isfinite(), *goes):
                moved = torch.where(go, moved, self._log_scales)
            self._log_scales.copy_(moved)
        else:
            self._descend(optimizer, derivatives, [teaches.any(), *goes])

    def remember(self, optimizer: MetaAdamW, step: Step, decision: Decision) -> None:
        """Remembers the update that was made."""
        last = optimizer._last
        assert last is not None
        self._count += 1
        if self._decides_on_device():
            complete_states(self.meta_optimizer)  # type: ignore[arg-type]  # here, since a captured step would make them anew
        moved = None if step.present is None else step.present != 0
        scales = decision.shown.get("_scales")
        if self.policy == "encoder" and optimizer.statistics_mode == "lagged":
            # Without statistics of a step before, the scales are not of the encoder.
            known, none = optimizer._lagged, step.counts[:-1] < 0
            of_encoder = none if scales is None or known is None else known[0, 0] != _NO_SUM
            moved = none | of_encoder if moved is None else moved & of_encoder
        scales = optimizer._scales if scales is None else scales
        last.take(
            step.hyper,
            step.counts[:-1],
            scales[:2].index_select(1, optimizer._group_of).double(),
            moved,
            step.counted,
            released=optimizer.variant == "released",
            clamped_at=LEAST_DECAY_FACTOR if optimizer.clamps_decay else 0.0,
        )

    def check_capture(self) -> None:
        """Raises RuntimeError if a CUDA graph cannot hold a learning step."""
        if self.meta_optimizer is not None and not self._decides_on_device(capturable=True):
            raise RuntimeError(
                "a step that is captured in a CUDA graph cannot wait for the device to know whether the meta-optimizer may step: it"
                " needs torch.optim.Adam or AdamW with fused=True and capturable=True"
            )

    # ------------------------------------------------------------------------------------------------- the meta-optimizer

    def _decides_on_device(self, *, capturable: bool = False) -> bool:
        """Whether the meta-optimizer leaves out a step that the device calls off."""
        optimizer = self.meta_optimizer
        if optimizer is None or type(optimizer) not in _ADAMS:
            return False
        return all(group["fused"] and (group["capturable"] or not capturable) for group in optimizer.param_groups)

    def _descend(self, optimizer: MetaAdamW, derivatives: Tensor, goes: Sequence[Tensor]) -> None:
        """One step of the meta-optimizer down the ``derivatives`` by the logarithms of the scales [2, G], if all ``goes`` are true.

        The encoder runs again, as it is now, on the features that the scales were made of.
        """
        meta, encoder = self.meta_optimizer, optimizer.encoder
        assert meta is not None
        trained = self._adopt(encoder)
        with torch.enable_grad(), threads_for(derivatives.shape[1], derivatives.device):
            scales = encoder(encoder.embed(optimizer._features))
            of_scales = torch.zeros_like(scales)
            of_scales[:2] = derivatives / optimizer._scales[:2].double()
            outputs, starts = [scales], [of_scales]
            if self.encoder_decay or self.gate_l1:
                penalty = encoder_penalty(encoder, self.encoder_decay, self.gate_l1)
                outputs.append(penalty)
                starts.append(torch.ones_like(penalty))
            gradients = torch.autograd.grad(outputs, trained, starts, allow_unused=True)
        largest = torch._foreach_norm([g for g in gradients if g is not None], math.inf)
        go = torch.stack([*largest]).isfinite().all()
        for x in goes:
            go = go & x
        on_device = self._decides_on_device()
        if not on_device and not go:
            return
        for param, gradient in zip(trained, gradients, strict=True):
            param.grad = gradient
        try:
            if on_device:
                meta.found_inf = (~go).float()  # type: ignore[attr-defined]
            meta.step()
        finally:
            if on_device:
                del meta.found_inf  # type: ignore[attr-defined]
            meta.zero_grad(set_to_none=True)

    def _adopt(self, encoder: GroupEncoder) -> list[Tensor]:
        """What is trained, after the meta-optimizer was given the embeddings of new groups and has lost those of old ones."""
        trained, meta = _trained(encoder), self.meta_optimizer
        assert meta is not None
        now = set(trained)
        for group in meta.param_groups:
            if any(p not in now for p in group["params"]):
                for p in group["params"]:
                    if p not in now:
                        meta.state.pop(p, None)
                group["params"] = [p for p in group["params"] if p in now]
        known = {p for group in meta.param_groups for p in group["params"]}
        meta.param_groups[0]["params"] += [p for p in trained if p not in known]
        return trained

    # ------------------------------------------------------------------------------------------------ parameters that change

    def follow(self, kept: Sequence[int], groups: int, encoder: GroupEncoder) -> None:
        """Of the groups, these are ``kept``, and now there are so many."""
        log_scales = self._log_scales.new_zeros(2, groups)
        log_scales[:, : len(kept)] = self._log_scales[:, [*kept]]
        self._log_scales = log_scales
        if self.meta_optimizer is not None:
            self._adopt(encoder)

    def cache(self, device: torch.device, group_ids: Sequence[int], groups: int) -> None:
        """Moves to ``device``; ``group_ids`` are the groups of the T tensors."""
        self._log_scales, self._bounds = self._log_scales.to(device), self._bounds.to(device)
        ids = torch.tensor(group_ids, dtype=torch.long, device="cpu")
        self._order = torch.argsort(ids, stable=True).to(device)
        self._lengths = torch.zeros(groups, dtype=torch.long, device="cpu").index_add(0, ids, torch.ones_like(ids)).to(device)

    def kept(self) -> list[Tensor]:
        """The tensors on the device that it keeps from step to step."""
        return [self._log_scales, self._bounds, self._order, self._lengths]

    # ----------------------------------------------------------------------------------------------------------- checkpoints

    def saved(self, optimizer: MetaAdamW) -> dict[str, Any]:
        """What a checkpoint of the optimizer holds of its learner: copies."""
        last = optimizer._last
        assert last is not None
        if self.meta_optimizer is not None:
            self._adopt(optimizer.encoder)
        return {
            "policy": self.policy,
            "log_scales": self._log_scales.clone(),
            "last": last.without(optimizer._written()),
            "count": self._count if self.every > 1 else 0,  # the host's, which may not know that a step did not count
            "features": optimizer._features.clone(memory_format=torch.contiguous_format),
            "meta_optimizer": None if self.meta_optimizer is None else with_adam_states(self.meta_optimizer),
        }

    def check(self, saved: Any, optimizer: MetaAdamW) -> None:
        """Raises ValueError if ``saved``, of a checkpoint, is neither None nor of a learner like this one; nothing changes."""
        if saved is None:
            return
        check_keys(saved, _SAVED, "online")
        if saved["policy"] != self.policy:
            raise ValueError(f"loaded state dict has an OnlineLearner of policy {saved['policy']!r}, here it is {self.policy!r}")
        last = optimizer._last
        assert last is not None
        for name, like in (("log_scales", self._log_scales), ("last", last.numbers), ("features", optimizer._features)):
            check_tensor(saved[name], like, f"{name} of the OnlineLearner")
        check_count(saved["count"], "count of the OnlineLearner")
        if self.meta_optimizer is not None:
            self._adopt(optimizer.encoder)
            known = STATE if isinstance(self.meta_optimizer, _ADAMS) else ()
            where = "loaded state dict of the OnlineLearner"
            check_states(self.meta_optimizer, saved["meta_optimizer"], where, ("lr",), known, OF_OTHER_OPTIMIZERS)

    def restore(self, saved: Mapping[str, Any] | None, optimizer: MetaAdamW) -> None:
        """Takes over what was saved, and checked; begins anew without it."""
        last = optimizer._last
        assert last is not None
        self._times_set = optimizer.count_set[0]
        if saved is None:
            self._log_scales.zero_()
            last.forget()
            self._count = _steps_done(optimizer)
            if self.meta_optimizer is not None:
                self.meta_optimizer.state.clear()
            return
        self._log_scales.copy_(saved["log_scales"])
        last.numbers[1:].copy_(saved["last"][1:])
        self._count = int(saved["count"]) or _steps_done(optimizer)
        optimizer._features = saved["features"].detach().clone().to(optimizer._features)
        if self.meta_optimizer is not None:
            self.meta_optimizer.load_state_dict(copy.deepcopy(saved["meta_optimizer"]))


def _intervals(ranges: Any) -> tuple[tuple[float, float], tuple[float, float]]:
    """Of the logarithms of both scales, the least and the most.

    Raises:
        ValueError: neither numbers nor pairs, or intervals without 0, at which the logarithms begin.
    """
    if isinstance(ranges, Sequence) and len(ranges) == 2:
        pairs = [(-x, x) if isinstance(x, Real) else x for x in ranges]
        if all(isinstance(x, Sequence) and len(x) == 2 and all(isinstance(y, Real) for y in x) for x in pairs):
            first, second = ((float(low), float(high)) for low, high in pairs)
            if all(-math.inf < low <= 0.0 <= high < math.inf for low, high in (first, second)):
                return first, second
    raise ValueError(f"Invalid range: {ranges!r} (two, each a number from 0 on or a pair around 0: of ln lr_scale and ln wd_scale)")


def _steps_done(optimizer: MetaAdamW) -> int:
    return 0 if devices.is_fake(optimizer._counts) else optimizer.steps_done


def _capturable(optimizer: MetaAdamW) -> bool:
    return any(group["capturable"] for group in optimizer.param_groups)


def _trained(encoder: GroupEncoder) -> list[Tensor]:
    """All parameters of an encoder. Group embeddings come last: those of later groups then move no others in a checkpoint."""
    own = [p for name, p in encoder.named_parameters() if not name.startswith("group_embeddings.")]
    return [*own, *encoder.group_embeddings]


def _fused_adam(params: Sequence[Tensor], lr: float) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, lr=lr, fused=True, capturable=True)
