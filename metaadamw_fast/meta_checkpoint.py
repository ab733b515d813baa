"""What a checkpoint of a meta-learner must hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .core.checkpoint import check_count, check_keys, check_states, check_tensor

MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
STATE = ("step", "exp_avg", "exp_avg_sq")  # of a parameter that has had a gradient
OF_OTHER_OPTIMIZERS = (*MOMENTS, "momentum_buffer", "square_avg")  # of the shape of the parameter


def check_learner(optimizer: Optimizer, log_vars: Tensor, state_dict: Mapping[str, Any]) -> None:
    """Raises ValueError if a meta-learner with this meta-optimizer cannot take ``state_dict``."""
    where = "loaded state dict of the meta-learner"
    check_keys(state_dict, ("log_vars", "meta_optimizer", "updates"), where)
    check_tensor(state_dict["log_vars"], log_vars, "log_vars")
    check_count(state_dict["updates"], "updates")
    known = STATE if isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW)) else ()
    check_states(optimizer, state_dict["meta_optimizer"], where, ("lr",), known, OF_OTHER_OPTIMIZERS)


def with_adam_states(optimizer: Optimizer) -> dict[str, Any]:
    """The optimizer's state dict with, for Adam and AdamW, also the states that its first step would begin with."""
    state_dict = optimizer.state_dict()
    if type(optimizer) in (torch.optim.Adam, torch.optim.AdamW):
        for group, saved in zip(optimizer.param_groups, state_dict["param_groups"], strict=True):
            for p, index in zip(group["params"], saved["params"], strict=True):
                if index not in state_dict["state"]:
                    state_dict["state"][index] = _first_state(group, p)
    return state_dict


def complete_states(optimizer: Optimizer) -> None:
    """Gives Adam or AdamW the states that its first step would begin with."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p not in optimizer.state:
                optimizer.state[p] = _first_state(group, p)


def _first_state(group: Mapping[str, Any], p: Tensor) -> dict[str, Tensor]:
    names = MOMENTS if group["amsgrad"] else MOMENTS[:2]
    step = torch.zeros((), dtype=torch.float32, device=p.device if group["capturable"] or group["fused"] else "cpu")
    return {"step": step, **{name: torch.zeros_like(p, memory_format=torch.preserve_format).detach() for name in names}}
