"""What AVGrad and MADA share as descendants of Adam: an update of which nothing is learned, and Adam's checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .core.optimizer import FusedOptimizer
from .core.rule import Step
from .core.sharding import local


def fixed_vectors(backend: Any, step: Step, beta1: Tensor, beta2: Tensor) -> Tensor:
    """The vectors of an update by AdamW or AVGrad [8, T] with betas float64 [T]; nothing of it is learned."""
    hyper, count = step.hyper, step.counts[:-1] + 1
    if step.counted is not None:
        count = count * step.counted  # 0: the update leaves the tensor alone
    decay_factor = 1 - hyper.lr * hyper.weight_decay
    vectors: Tensor = backend.update_vectors(hyper.lr, decay_factor, count, beta1, beta2, hyper.eps, step.grad_factor)
    return vectors


def with_mean(state_dict: dict[str, Any], states: Sequence[str]) -> dict[str, Any]:
    """A checkpoint of Adam with A = v, where ``states`` have an A, and zeros for the others that it lacks; a copy.

    With A = 0 the next step would be about √t times too long.
    """
    if not isinstance(state_dict, Mapping) or not isinstance(state_dict.get("state"), Mapping):
        return state_dict  # refused later
    completed = {}
    for key, state in state_dict["state"].items():
        if isinstance(state, Mapping) and "exp_avg_sq" in state:
            v = state["exp_avg_sq"]
            zeros = torch.zeros_like(v) if isinstance(v, Tensor) else v  # what is no tensor is refused later
            state = {**{name: v if name == "average_sq" else zeros for name in states}, **state}
        completed[key] = state
    return {**state_dict, "state": completed}


def mean_of_second_moment(optimizer: FusedOptimizer) -> None:
    """A = v where A is 0: DCP loads into what is there, and leaves what a checkpoint lacks as it was, zeros."""
    params = (p for group in optimizer.param_groups for p in group["params"])
    for state in (optimizer.state[p] for p in params if "average_sq" in optimizer.state.get(p, ())):
        mean, v = local(state["average_sq"]), local(state["exp_avg_sq"])
        mean.copy_(torch.where(mean == 0, v, mean))
