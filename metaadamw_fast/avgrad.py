"""AVGrad: Adam whose denominator is the mean of the second moment over all steps; all but its formula is in core/."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import rounding
from .adam import fixed_vectors, mean_of_second_moment, with_mean
from .core import devices
from .core.optimizer import FusedOptimizer
from .core.rule import PARAM, Decision, Rule, State, Step

AVGRAD = Rule(
    "avgrad",
    states=(State("exp_avg"), State("exp_avg_sq", square=True), State("average_sq", wide=True, square=True)),
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
        return Decision(fixed_vectors(self._backend, step, step.hyper.beta1, step.hyper.beta2), {})

    def converted(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Adam's and AdamW's get A = v."""
        return with_mean(state_dict, ("average_sq",))

    def restore(self, extra: dict[str, Any] | None, state_dict: dict[str, Any]) -> None:
        """Also of a checkpoint by DCP, which leaves what Adam's lacks as it was here."""
        if extra is None:
            mean_of_second_moment(self)
