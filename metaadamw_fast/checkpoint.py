"""What a MetaAdamW checkpoint holds besides torch's ``state`` and ``param_groups``, and how any AdamW checkpoint is loaded.

The extra content is one top-level key, ``metaadamw``: encoder, its random generator, step count, scales, and the carried
statistics of lagged mode. ``torch.optim.AdamW`` ignores it, so checkpoints load in both directions.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .optimizer import MetaAdamW

KEY = "metaadamw"
MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")


def extra_state(optimizer: MetaAdamW) -> dict[str, Any]:
    """The content of the ``metaadamw`` key: tensors, numbers, lists and dicts only, for ``torch.load(weights_only=True)``."""
    return {
        "steps_done": optimizer.steps_done,
        "group_ids": list(optimizer._group_ids),
        "encoder": dict(optimizer.encoder.state_dict()),
        "generator": optimizer.encoder.generator.get_state(),
        "scales": optimizer._scales,
        "lagged": None if optimizer._lagged is None else list(optimizer._lagged),
    }


def check(optimizer: MetaAdamW, state_dict: Mapping[str, Any]) -> None:
    """Raises ValueError if ``state_dict`` does not fit the optimizer, before anything is changed."""
    for key in ("state", "param_groups"):
        if key not in state_dict:
            raise ValueError(f"loaded state dict has no {key!r}: it is not an optimizer checkpoint, or it is truncated")
    saved, own = state_dict["param_groups"], optimizer.param_groups
    for index, group in enumerate(saved):
        _check_keys(group, ("params", "lr", "betas", "eps", "weight_decay"), f"parameter group {index}")
    if len(saved) != len(own):
        raise ValueError(f"loaded state dict has {len(saved)} parameter groups, the optimizer has {len(own)}")
    for index, (a, b) in enumerate(zip(saved, own, strict=True)):
        if len(a["params"]) != len(b["params"]):
            raise ValueError(
                f"parameter group {index} has {len(a['params'])} parameters in the loaded state dict,"
                f" {len(b['params'])} in the optimizer"
            )
    for position, (param, values) in enumerate(_states(optimizer, state_dict)):
        if values:
            _check_keys(values, ("step", "exp_avg", "exp_avg_sq"), f"the state of parameter {position}")
        for name in MOMENTS:
            if name in values and not values[name].is_floating_point():
                raise ValueError(f"{name} of parameter {position} in the loaded state dict is {values[name].dtype}")
            if name in values and values[name].shape != param.shape:
                raise ValueError(
                    f"{name} of parameter {position} has shape {tuple(values[name].shape)} in the loaded state dict,"
                    f" the parameter has {tuple(param.shape)}"
                )
    if KEY not in state_dict:
        return
    extra = state_dict[KEY]
    _check_keys(extra, extra_state(optimizer).keys(), KEY)
    if list(extra["group_ids"]) != optimizer._group_ids:
        raise ValueError("loaded state dict groups the parameters differently: same model, grouping and order are needed")
    if extra["scales"].shape != optimizer._scales.shape:
        raise ValueError(f"loaded state dict has scales of shape {tuple(extra['scales'].shape)}")
    encoder = optimizer.encoder.state_dict()
    if extra["encoder"].keys() != encoder.keys():
        differing = sorted(extra["encoder"].keys() ^ encoder.keys())
        raise ValueError(f"loaded state dict has another encoder: {', '.join(differing[:4])} on one side only")
    for name, value in encoder.items():
        if extra["encoder"][name].shape != value.shape:
            raise ValueError(
                f"loaded state dict has another encoder: {name} is {tuple(extra['encoder'][name].shape)}, here {tuple(value.shape)}"
            )


def _check_keys(values: Mapping[str, Any], keys: Iterable[str], where: str) -> None:
    missing = [key for key in keys if key not in values]
    if missing:
        raise ValueError(f"{where} in the loaded state dict lacks {', '.join(missing)}")


def load_states(optimizer: MetaAdamW, state_dict: Mapping[str, Any]) -> None:
    """Copies moments and steps, keeping the saved dtypes (torch casts float32 moments to the parameter's)."""
    optimizer.state.clear()
    for param, values in _states(optimizer, state_dict):
        if values:
            state = optimizer.state[param]
            state["step"] = float(values["step"])
            for name in MOMENTS:
                if name in values:
                    # In the parameter's memory layout: the update then runs without a copy.
                    moment = torch.empty_like(param, dtype=values[name].dtype, memory_format=torch.preserve_format)
                    state[name] = moment.copy_(values[name])


def load_extra(optimizer: MetaAdamW, state_dict: Mapping[str, Any]) -> None:
    """Restores the ``metaadamw`` key; a checkpoint of plain AdamW leaves the encoder as it is and says so."""
    extra = state_dict.get(KEY)
    optimizer._lagged = None
    if extra is None:
        warnings.warn("checkpoint of a plain AdamW: moments and steps are loaded, the encoder stays as it is", stacklevel=4)
        optimizer.steps_done = int(max((float(state["step"]) for state in optimizer.state.values()), default=0))
        return
    optimizer.steps_done = int(extra["steps_done"])
    optimizer.encoder.load_state_dict(extra["encoder"])
    optimizer.encoder.generator.set_state(extra["generator"].cpu())
    optimizer._scales = _like(extra["scales"], optimizer._scales)
    if extra["lagged"] is not None:
        statistics, t = extra["lagged"]
        optimizer._lagged = (_like(statistics, optimizer._statistics), float(t))


def _like(value: Tensor, like: Tensor) -> Tensor:
    return value.detach().to(like.device, like.dtype, copy=True)


def _states(optimizer: MetaAdamW, state_dict: Mapping[str, Any]) -> list[tuple[Tensor, Mapping[str, Any]]]:
    """(parameter, its saved state) pairs in order; an empty state where AdamW never saw a gradient."""
    ids = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
    params = chain.from_iterable(group["params"] for group in optimizer.param_groups)
    return [(param, state_dict["state"].get(i, {})) for i, param in zip(ids, params, strict=True)]
