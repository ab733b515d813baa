"""AVGrad: Adam whose denominator is the mean of the second moment over all steps; all but its formula is in core/."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import rounding
from .core import devices
from .core.optimizer import FusedOptimizer
from .core.rule import PARAM, Decision, Rule, State, Step
from .core.sharding import local

AVGRAD = Rule(
    "avgrad",
    states=(State("exp_avg"), State("exp_avg_sq"), State("average_sq", wide=True)),
    operands=("exp_avg", PARAM, "exp_avg_sq", "average_sq"),
    vectors=("step_size", "decay_factor", "step", "beta1", "beta2", "inverse_sqrt_correction2", "eps", "grad_scale"),
    sums={"grad_sq": 2},
    carried={},
)


class AVGrad(FusedOptimizer):
    """AMSGrad with a mean over all steps in place of the maximum, with decoupled weight decay.

    Ozkara et al., *MADA*, arXiv 2401.08893 (2024); docs/algorithm.md section 12. ``m`` and ``v`` are Adam's moments of step t.
    ``A ← A + (v - A)/t``, and ``p ← (1 - lr·λ)·p - lr·(m/(1-β1^t)) / (√(A/(1-β2^t)) + ε)``. A is kept in float32 beside bfloat16
    and float16: in them the mean would stop moving after some hundred steps.

    Args:
        params: parameters, named parameters or param groups, as for any torch optimizer.
        lr, betas, eps, weight_decay: lr and weight_decay may be 1-element tensors.
        maximize, capturable, foreach, fused, differentiable, max_grad_norm, state_dtype, master_weights, stochastic_rounding, seed,
            skip_nonfinite, backend, allocate: as of :class:`~metaadamw_fast.MetaAdamW`. The mean is always rounded to nearest.

    ``statistics`` [T, 1], Σg² of each gradient, and ``grad_norm`` are those of the last step that summed gradients: steps do with
    ``max_grad_norm`` or ``skip_nonfinite``. ``load_state_dict`` also takes checkpoints of torch's Adam and AdamW, with A = v.

    Raises:
        ValueError, RuntimeError: as of :class:`~metaadamw_fast.MetaAdamW`.
    """

    checkpoint_key = "avgrad"
    rule = AVGRAD

    @devices.outside_inference_mode
    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.99),
        eps: float = 1e-6,
        weight_decay: float | Tensor = 0.0,
        *,
        maximize: bool = False,
        capturable: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        differentiable: bool = False,
        max_grad_norm: float | None = None,
        state_dtype: torch.dtype | None = None,
        master_weights: bool = False,
        stochastic_rounding: bool = False,
        seed: int = 0,
        skip_nonfinite: bool = False,
        backend: str = "auto",
        allocate: str = "eager",
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(
            params,
            {**defaults, "capturable": capturable},
            differentiable=differentiable,
            max_grad_norm=max_grad_norm,
            state_dtype=state_dtype,
            master_weights=master_weights,
            rounding_seed=rounding.signed(seed) if stochastic_rounding else None,
            skip_nonfinite=skip_nonfinite,
            backend=backend,
            allocate=allocate,
        )
        self._cache()

    def needs_sums(self) -> bool:
        """Nothing is decided by them."""
        return False

    def sums_dtype(self) -> torch.dtype:
        """The norm that clips is as exact as the sums."""
        return torch.float64

    def decide(self, sums: Tensor | None, step: Step) -> Decision:
        """The vectors of the update; no coefficient is learned."""
        hyper, count = step.hyper, step.counts[:-1] + 1
        if step.counted is not None:
            count = count * step.counted  # 0: the update leaves the tensor alone
        decay_factor = 1 - hyper.lr * hyper.weight_decay
        vectors = self._backend.update_vectors(hyper.lr, decay_factor, count, hyper.beta1, hyper.beta2, hyper.eps, step.grad_factor)
        return Decision(vectors, {})

    def converted(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Adam's and AdamW's get A = v."""
        return with_mean(state_dict, ("average_sq",), plain=True)

    def restore(self, extra: dict[str, Any] | None, state_dict: dict[str, Any]) -> None:
        """Also of a checkpoint by DCP, which leaves what Adam's lacks as it was here."""
        if extra is None:
            mean_of_second_moment(self)


def with_mean(state_dict: dict[str, Any], states: Sequence[str], *, plain: bool) -> dict[str, Any]:
    """A checkpoint of Adam with A = v, where ``states`` have an A, and zeros for the others that it lacks; a copy.

    With A = 0 the next step would be about √t times too long. MADA keeps a bit in the sign of A or of v; ``plain`` takes their
    magnitudes.
    """
    if not isinstance(state_dict, Mapping) or not isinstance(state_dict.get("state"), Mapping):
        return state_dict  # refused later
    completed = {}
    for key, state in state_dict["state"].items():
        if isinstance(state, Mapping) and "exp_avg_sq" in state:
            v = state["exp_avg_sq"]
            zeros = torch.zeros_like(v) if isinstance(v, Tensor) else v  # what is no tensor is refused later
            state = {**{name: v if name == "average_sq" else zeros for name in states}, **state}
            if plain:
                signed = ((name, state.get(name)) for name in ("exp_avg_sq", "average_sq"))
                state |= {name: x.abs() for name, x in signed if isinstance(x, Tensor) and not x.is_complex()}
        completed[key] = state
    return {**state_dict, "state": completed}


def mean_of_second_moment(optimizer: FusedOptimizer) -> None:
    """A = v where A is 0: DCP loads into what is there, and leaves what a checkpoint lacks as it was, zeros."""
    params = (p for group in optimizer.param_groups for p in group["params"])
    for state in (optimizer.state[p] for p in params if "average_sq" in optimizer.state.get(p, ())):
        mean, v = local(state["average_sq"]), local(state["exp_avg_sq"])
        mean.copy_(torch.where(mean == 0, v, mean))
