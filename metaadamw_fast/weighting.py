"""Priority-injected homoscedastic uncertainty weighting: MetaAdamW section 3.5, after Kendall et al., CVPR 2018."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .encoder import GroupEncoder

LOG_VAR_LIMIT = 4.0  # a term can be negative, and then the weighted sum is unbounded below in its log-variance
TERM_KINDS = ("regression", "classification")


def homoscedastic_sum(terms: Sequence[Tensor], log_vars: Tensor, priorities: Sequence[float], kinds: Sequence[str]) -> Tensor:
    """Σ_i ½·exp(-s_i)·L_i + ½·p_i·s_i; twice that for a classification term.

    Args:
        terms: the losses L_i, 0-dim.
        log_vars: [n], the learnable s_i = log σ_i².
        priorities: the p_i; a larger one keeps σ_i small, and so the term's weight large.
        kinds: ``regression`` or ``classification`` for each term.

    Returns:
        The weighted sum, 0-dim.
    """
    total = terms[0].new_zeros(())
    for term, log_var, priority, kind in zip(terms, log_vars.unbind(), priorities, kinds, strict=True):
        factor = 1.0 if kind == "classification" else 0.5
        total = total + factor * (torch.exp(-log_var) * term + priority * log_var)
    return total


def encoder_penalty(encoder: GroupEncoder, encoder_decay: float, gate_l1: float) -> Tensor:
    """Regularizes an encoder: the 2-norms, not squared, of the tensors of its layers and of head.weight; with gating Σ|gate|."""
    regularized = [*encoder.encoder.parameters(), encoder.head.weight]
    penalty = encoder_decay * torch.stack([p.norm() for p in regularized]).sum()
    return penalty + gate_l1 * encoder.feature_gates.abs().sum() if encoder.features.gating else penalty


def clamp_log_vars_(log_vars: Tensor) -> None:
    """Keeps each s_i in [-4, 4]; call after every update of them."""
    with torch.no_grad():
        log_vars.clamp_(-LOG_VAR_LIMIT, LOG_VAR_LIMIT)
