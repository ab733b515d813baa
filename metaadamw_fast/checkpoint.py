"""What a MetaAdamW checkpoint holds besides torch's ``state`` and ``param_groups``, and how any AdamW checkpoint is loaded.

The extra content is one key, ``metaadamw``: encoder, its sizes and random generator, step count, scales, the seed of stochastic
rounding, and the carried statistics of lagged mode. ``torch.optim.AdamW`` ignores it, so checkpoints load in both directions. It
stands at the top level and, the same object, in the first param group, since ``torch.distributed.checkpoint`` (DCP) keeps only
``state`` and ``param_groups``. What it holds has the same structure in every optimizer of the same options: DCP loads into what is
there. Its tensors are copies: a DCP load that fails midway has written into torch's own moments, as with any optimizer, but not
into the encoder. The param group of the optimizer itself has the key too, with None: DCP's flattened form finds what it looks for
by the keys that are there.

DCP wants all that the optimizer has to be in the checkpoint. Between MetaAdamW and ``torch.optim.AdamW``, whose param groups have
other keys, it needs ``planner=DefaultLoadPlanner(allow_partial_load=True)``, and so it does for checkpoints from before a key was
added. It saves no state of parameters that do not require a gradient: the moments of one that was trained and then frozen are lost.

A parameter that never had a gradient and requires none has no state, and no entry in a checkpoint.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .core.hyperparameters import check_hyperparameters
from .core.sharding import laid_out_as
from .core.states import MASTER
from .features import training_progress
from .rounding import signed

if TYPE_CHECKING:
    from .optimizer import MetaAdamW

KEY, CONFIG, SKIPPED, ROUNDING, NAMED = "metaadamw", "config", "skipped_steps", "rounding_seed", "named"
STEPS = "steps"  # the exact counts of all parameters; a state's "step" is float32, as torch's
LATER = {CONFIG, SKIPPED, ROUNDING, NAMED, STEPS}  # checkpoints of earlier versions do not have them
MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
STATE = ("step", "exp_avg", "exp_avg_sq")  # of a parameter that has had a gradient
OURS = ("step", *MOMENTS, MASTER)  # every other entry among a parameter's states is the user's, and kept as it is
ELEMENTWISE = (*MOMENTS, MASTER)  # of the shape of the parameter
OF_OTHER_OPTIMIZERS = (*MOMENTS, "momentum_buffer", "square_avg")  # the same, of those that may be meta-optimizers


def extra_state(optimizer: MetaAdamW) -> dict[str, Any]:
    """The content of the ``metaadamw`` key: tensors, numbers, lists and dicts only, for ``torch.load(weights_only=True)``.

    All tensors are copies: who loads into them in place, as DCP does, changes nothing here before ``load_state_dict``.
    """
    lagged = None
    if optimizer.statistics_mode == "lagged":
        lagged = [optimizer.lagged_statistics().clone(), training_progress(optimizer.steps_done, optimizer.total_steps)]
    return {
        "steps_done": optimizer.steps_done,
        STEPS: optimizer._counts[:-1].clone(),
        SKIPPED: optimizer.skipped_steps,
        "group_ids": list(optimizer._group_ids),
        NAMED: _has_names(optimizer),
        CONFIG: optimizer.encoder.description(),
        "encoder": {name: x.clone() for name, x in optimizer.encoder.state_dict().items()},
        # Contiguous, and on one device: torch.distributed.checkpoint broadcasts the memory of tensors, and from one device only.
        "generator": optimizer.encoder.generator.get_state().to(optimizer._scales.device),
        "scales": optimizer._scales.clone(memory_format=torch.contiguous_format),
        "lagged": lagged,
        ROUNDING: None if optimizer._rounding_seed is None else int(optimizer._rounding_seed),
    }


def reserve(optimizer: MetaAdamW) -> None:
    """Gives the first param group, and no other, its place for the extra content."""
    for group in optimizer.param_groups:
        group.pop(KEY, None)
    for group in optimizer.param_groups[:1]:
        group[KEY] = None


def saved(optimizer: MetaAdamW) -> dict[str, Any]:
    """Torch's state dict, parameters replaced by their numbers, with the extra content in both of its places."""
    params = chain.from_iterable(group["params"] for group in optimizer.param_groups)
    numbers: dict[Tensor, int] = {}
    for number, param in enumerate(params):
        numbers.setdefault(param, number)
    groups = [{**group, "params": [numbers[p] for p in group["params"]]} for group in optimizer.param_groups]
    extra = groups[0][KEY] = extra_state(optimizer)
    states = list(optimizer.state.items())  # at once: another thread may be in a step
    numbered = {numbers.get(p, p) if isinstance(p, Tensor) else p: x for p, x in states}
    return {"state": numbered, "param_groups": groups, KEY: extra}


def load(optimizer: MetaAdamW, state_dict: dict[str, Any]) -> None:
    """Loads what :func:`saved` returned, or a checkpoint of ``torch.optim.AdamW``.

    Raises:
        ValueError: it does not fit, or holds what cannot be; nothing has changed then.
    """
    state_dict = with_extra_on_top(state_dict)
    check(optimizer, state_dict)
    state_dict = without_old_extra(state_dict)
    groups = copy.deepcopy(state_dict["param_groups"])
    for group, own in zip(groups, optimizer.param_groups, strict=True):
        group["params"] = own["params"]
        if "param_names" in own:
            group.setdefault("param_names", own["param_names"])
    optimizer.__setstate__({"state": defaultdict(dict), "param_groups": groups})
    load_states(optimizer, state_dict)
    counts, exact = optimizer._counts[:-1], state_dict.get(KEY, {}).get(STEPS)
    counts.zero_() if exact is None else counts.copy_(exact)
    optimizer._prepare()  # the lists take the counts from the states, the exact ones where those are their roundings
    optimizer._cache()
    load_extra(optimizer, state_dict)


def with_extra_on_top(state_dict: Any) -> Any:
    """A checkpoint with the extra content at the top level only, wherever it was; other than a checkpoint as it is."""
    groups = state_dict.get("param_groups") if isinstance(state_dict, Mapping) else None
    if not isinstance(groups, Sequence) or not groups or not isinstance(groups[0], Mapping) or KEY not in groups[0]:
        return state_dict
    others = [{k: x for k, x in group.items() if k != KEY} if isinstance(group, Mapping) else group for group in groups]
    return {KEY: groups[0][KEY], **state_dict, "param_groups": others}


def check(optimizer: MetaAdamW, state_dict: Mapping[str, Any]) -> None:
    """Raises ValueError if ``state_dict`` does not fit the optimizer or holds what cannot be, before anything is changed."""
    try:
        group_keys = ("lr", "betas", "eps", "weight_decay")
        _check_states(optimizer, state_dict, "loaded state dict", group_keys, STATE, ELEMENTWISE)
    except ValueError as error:
        names = _difference_in_names(optimizer, state_dict)
        if names:
            raise ValueError(f"{error}. {names}") from error
        raise
    for index, group in enumerate(state_dict["param_groups"]):
        try:
            check_hyperparameters(group)
        except (TypeError, LookupError, ValueError) as error:
            raise ValueError(f"parameter group {index} in the loaded state dict: {error}") from error
    if KEY not in state_dict:
        return
    extra, own = state_dict[KEY], extra_state(optimizer)
    _check_keys(extra, own.keys() - LATER, KEY)
    _check_count(extra["steps_done"], "steps_done")
    _check_count(extra.get(SKIPPED, 0), SKIPPED)
    if STEPS in extra:
        _check_tensor(extra[STEPS], own[STEPS], STEPS)
        if not bool((extra[STEPS] >= 0).all() & extra[STEPS].isfinite().all()):
            raise ValueError(f"{STEPS} in the loaded state dict are not all numbers from 0 on")
    has_encoder = _has_encoder(optimizer, state_dict)
    seed = extra.get(ROUNDING)
    if seed is not None and (type(seed) is not int or not -(2**63) <= seed < 2**64):
        raise ValueError(f"{ROUNDING} in the loaded state dict is {seed!r}, not a 64-bit integer")
    if has_encoder:
        _check_encoder(extra, own)
    lagged = extra["lagged"]
    if lagged is not None:
        if not isinstance(lagged, (list, tuple)) or len(lagged) != 2:
            raise ValueError("lagged in the loaded state dict is neither None nor the statistics with their t")
        _check_tensor(lagged[0], optimizer._statistics, "the statistics in lagged")
        _check_number(lagged[1], "t in lagged")


def _has_names(optimizer: MetaAdamW) -> bool:
    return any(member.name is not None for member in optimizer._members)


def _difference_in_names(optimizer: MetaAdamW, state_dict: Any) -> str:
    """Says that names of parameters are known on one side only, and what to pass; empty if that is not so."""
    extra = state_dict.get(KEY) if isinstance(state_dict, Mapping) else None
    groups = state_dict.get("param_groups") if isinstance(extra, Mapping) else None
    if not isinstance(extra, Mapping) or not isinstance(groups, Sequence):
        return ""
    in_groups = any("param_names" in group for group in groups if isinstance(group, Mapping))
    named = bool(extra.get(NAMED, in_groups))
    if named == _has_names(optimizer):
        return ""
    words, fit = ("with", "model.named_parameters(), or model=,") if named else ("without", 'grouping="param_groups"')
    return f"It was saved {words} names of the parameters, which decide the groups: pass {fit} to the optimizer"


def _has_encoder(optimizer: MetaAdamW, state_dict: Mapping[str, Any]) -> bool:
    """Whether a checkpoint has an encoder of as many groups as the optimizer's; where only names make the difference, it need not.

    Raises:
        ValueError: the groups differ, for another reason.
    """
    ids = state_dict[KEY]["group_ids"]
    if not isinstance(ids, (list, tuple)) or [type(i) for i in ids] != [int] * len(optimizer._group_ids):
        raise ValueError("loaded state dict groups the parameters differently: group_ids must be a number for each of them")
    if list(ids) != optimizer._group_ids and not _difference_in_names(optimizer, state_dict):
        raise ValueError("loaded state dict groups the parameters differently: same model, grouping and order are needed")
    return len(set(ids)) == len(optimizer.groups)


def without_old_extra(state_dict: dict[str, Any]) -> dict[str, Any]:
    """A checked checkpoint without the extra content if that is older than the states.

    ``torch.optim.AdamW`` loads the param group with the extra content in it, and saves it again after steps of its own.
    """
    if KEY not in state_dict:
        return state_dict
    rounded = torch.tensor(float(state_dict[KEY]["steps_done"]), dtype=torch.float32).item()  # as the states' own counts are
    if _most_steps(state_dict) <= rounded:
        return state_dict
    return {key: value for key, value in state_dict.items() if key != KEY}


def _most_steps(state_dict: Mapping[str, Any]) -> float:
    """The largest step count of a parameter. What users keep among the states may have a "step" of its own."""
    states = [state_dict["state"].get(number, {}) for number in _numbers(state_dict)]
    return max((float(state["step"]) for state in states if "step" in state), default=0.0)


def check_learner(optimizer: Optimizer, log_vars: Tensor, state_dict: Mapping[str, Any]) -> None:
    """Raises ValueError if a meta-learner with this meta-optimizer cannot take ``state_dict``."""
    where = "loaded state dict of the meta-learner"
    _check_keys(state_dict, ("log_vars", "meta_optimizer", "updates"), where)
    _check_tensor(state_dict["log_vars"], log_vars, "log_vars")
    _check_count(state_dict["updates"], "updates")
    known = STATE if isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW)) else ()
    _check_states(optimizer, state_dict["meta_optimizer"], where, ("lr",), known, OF_OTHER_OPTIMIZERS)


def with_adam_states(optimizer: Optimizer) -> dict[str, Any]:
    """The optimizer's state dict with, for Adam and AdamW, also the states that its first step would begin with."""
    state_dict = optimizer.state_dict()
    if type(optimizer) in (torch.optim.Adam, torch.optim.AdamW):
        for group, saved in zip(optimizer.param_groups, state_dict["param_groups"], strict=True):
            names = MOMENTS if group["amsgrad"] else MOMENTS[:2]
            for p, index in zip(group["params"], saved["params"], strict=True):
                if index not in state_dict["state"]:
                    step = torch.tensor(0.0, device=p.device if group["capturable"] or group["fused"] else "cpu")
                    moments = {name: torch.zeros_like(p, memory_format=torch.preserve_format).detach() for name in names}
                    state_dict["state"][index] = {"step": step, **moments}
    return state_dict


def _check_states(
    optimizer: Optimizer,
    state_dict: Mapping[str, Any],
    where: str,
    group_keys: Iterable[str],
    state_keys: Collection[str],
    elementwise: Iterable[str],
) -> None:
    """Checks torch's part of an optimizer's checkpoint: as many parameters, and states that are theirs.

    A parameter has all of ``state_keys`` or none; those of ``elementwise`` that it has are of its shape.
    """
    if not isinstance(state_dict, Mapping):
        raise ValueError(f"{where} is of type {type(state_dict).__name__}: it is not an optimizer checkpoint")
    for key, kind in (("state", Mapping), ("param_groups", Sequence)):
        if not isinstance(state_dict.get(key), kind):
            raise ValueError(f"{where} has no {key!r}: it is not an optimizer checkpoint, or it is truncated")
    saved, own = state_dict["param_groups"], optimizer.param_groups
    for index, group in enumerate(saved):
        _check_keys(group, ("params", *group_keys), f"parameter group {index}")
    if len(saved) != len(own):
        raise ValueError(f"{where} has {len(saved)} parameter groups, the optimizer has {len(own)}")
    for index, (a, b) in enumerate(zip(saved, own, strict=True)):
        if not isinstance(a["params"], Sequence):
            raise ValueError(
                f"params of parameter group {index} in the {where} is of type {type(a['params']).__name__}, not a list"
            )
        if len(a["params"]) != len(b["params"]):
            raise ValueError(
                f"parameter group {index} has {len(a['params'])} parameters in the {where}, {len(b['params'])} in the optimizer"
            )
    for position, (param, values) in enumerate(_states(optimizer, state_dict)):
        _check_keys(values, (), f"the state of parameter {position}")
        if any(key in values for key in state_keys):
            _check_keys(values, state_keys, f"the state of parameter {position}")
        if "step" in values:
            _check_number(values["step"], f"step of parameter {position}")
        for name in elementwise:
            if name in values:
                _check_tensor(values[name], param, f"{name} of parameter {position}")


def _check_encoder(extra: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Checks that the encoder, its random generator and its last scales could be the optimizer's."""
    if CONFIG in extra:
        _check_keys(extra[CONFIG], own[CONFIG].keys(), CONFIG)
        for name, value in own[CONFIG].items():
            if extra[CONFIG][name] != value:
                raise ValueError(f"loaded state dict has another encoder: {name} is {extra[CONFIG][name]!r}, here {value!r}")
    _check_weights(extra["encoder"], own["encoder"])
    try:
        torch.Generator().set_state(extra["generator"].cpu())
    except (AttributeError, TypeError, RuntimeError) as error:
        raise ValueError(f"generator in the loaded state dict is no state of a random generator: {error}") from error
    _check_tensor(extra["scales"], own["scales"], "scales")


def _check_weights(saved: Mapping[str, Any], own: Mapping[str, Tensor]) -> None:
    if not isinstance(saved, Mapping) or saved.keys() != own.keys():
        differing = sorted(map(str, saved.keys() ^ own.keys())) if isinstance(saved, Mapping) else [f"{saved!r}"]
        raise ValueError(f"loaded state dict has another encoder: {', '.join(differing[:4])} on one side only")
    for name, value in own.items():
        _check_tensor(saved[name], value, f"another encoder: {name}")
    dtypes = {str(value.dtype) for value in saved.values()}
    if len(dtypes) > 1:
        raise ValueError(f"encoder in the loaded state dict has several dtypes: {', '.join(sorted(dtypes))}")


def _check_keys(values: Mapping[str, Any], keys: Iterable[str], where: str) -> None:
    if not isinstance(values, Mapping):
        raise ValueError(f"{where} in the loaded state dict is of type {type(values).__name__}, not a dict")
    missing = [key for key in keys if key not in values]
    if missing:
        raise ValueError(f"{where} in the loaded state dict lacks {', '.join(missing)}")


def _check_tensor(value: Any, like: Tensor, where: str) -> None:
    if not isinstance(value, Tensor):
        raise ValueError(f"{where} in the loaded state dict is of type {type(value).__name__}, not a tensor")
    right_kind = value.is_floating_point() or (value.is_complex() and like.is_complex())
    if not right_kind or value.layout is not torch.strided or (value.is_meta and not like.is_meta):
        raise ValueError(f"{where} in the loaded state dict is {value.dtype}, {value.layout}, on {value.device}")
    if value.shape != like.shape:
        raise ValueError(f"{where} has shape {tuple(value.shape)} in the loaded state dict, here {tuple(like.shape)}")


def _check_number(value: Any, where: str) -> None:
    """A finite number that is not negative, or a tensor with one."""
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex() and not value.is_meta:
        value = value.item()
    if not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise ValueError(f"{where} in the loaded state dict is {value!r}, not a number from 0 on")


def _check_count(value: Any, where: str) -> None:
    _check_number(value, where)
    if value != int(value):
        raise ValueError(f"{where} in the loaded state dict is {value!r}, not an integer")


def load_states(optimizer: MetaAdamW, state_dict: Mapping[str, Any]) -> None:
    """Copies moments and steps, keeping the saved dtypes (torch casts float32 moments to the parameter's), also the encoder's.

    What users keep beside them is copied, too, and otherwise left alone.
    """
    if KEY in state_dict and _has_encoder(optimizer, state_dict):
        optimizer.encoder.to(state_dict[KEY]["encoder"]["head.weight"].dtype)
    for param, values in _states(optimizer, state_dict):
        # Of a frozen parameter earlier versions kept moments, too, which are 0 if it never was trained.
        untouched = not param.requires_grad and float(values.get("step", 1.0)) == 0
        for name, value in values.items():
            if untouched and name in OURS:
                continue
            state = optimizer.state[param]
            if name == "step":
                state[name] = float(value)
            elif name in MOMENTS or (name == MASTER and optimizer._master_weights):
                # In the parameter's memory layout: the update then runs without a copy.
                state[name] = torch.empty_like(param, dtype=value.dtype, memory_format=torch.preserve_format)
                state[name].copy_(laid_out_as(value, param))
            elif name not in OURS:
                state[name] = _copied_beside(value, param)
    numbers = set(_numbers(state_dict))
    for key, value in state_dict["state"].items():
        if key not in numbers:
            optimizer.state[key] = copy.deepcopy(value)


def _copied_beside(value: Any, param: Tensor) -> Any:
    """A copy of what a user keeps for a parameter. Tensors come to its device, as in torch, and keep their dtype, as moments do."""
    if isinstance(value, Tensor):
        like = laid_out_as(value, param) if value.shape == param.shape else value
        return like.detach().clone().to(param.device)
    if isinstance(value, dict):
        return {key: _copied_beside(x, param) for key, x in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_copied_beside(x, param) for x in value)
    return copy.deepcopy(value)


def load_extra(optimizer: MetaAdamW, state_dict: Mapping[str, Any]) -> None:
    """Restores the ``metaadamw`` key; a checkpoint of plain AdamW leaves the encoder as it is and says so."""
    optimizer._lagged = None
    if KEY not in state_dict:
        warnings.warn("checkpoint of a plain AdamW: moments and steps are loaded, the encoder stays as it is", stacklevel=4)
        optimizer.steps_done = int(_most_steps(state_dict))
        return
    extra = state_dict[KEY]
    optimizer.steps_done = int(extra["steps_done"])
    if optimizer._skipped is not None:
        optimizer._skipped.fill_(int(extra.get(SKIPPED, 0)))
    if optimizer._rounding_seed is not None and extra.get(ROUNDING) is not None:
        optimizer._rounding_seed = signed(int(extra[ROUNDING]))
    if _has_encoder(optimizer, state_dict):
        optimizer.encoder.load_state_dict(extra["encoder"])
        optimizer.encoder.generator.set_state(extra["generator"].cpu())
        optimizer._scales = _like(extra["scales"], optimizer._scales)
    else:
        warnings.warn(
            f"the checkpoint has {len(set(extra['group_ids']))} groups, the optimizer has {len(optimizer.groups)}: moments and"
            f" steps are loaded, the encoder stays as it is. {_difference_in_names(optimizer, state_dict)}",
            stacklevel=4,
        )
    if extra["lagged"] is not None:
        optimizer._lagged = _like(extra["lagged"][0], optimizer._statistics)


def _like(value: Tensor, like: Tensor) -> Tensor:
    return value.detach().to(like.device, like.dtype, copy=True)


def _states(optimizer: Optimizer, state_dict: Mapping[str, Any]) -> list[tuple[Tensor, Mapping[str, Any]]]:
    """(parameter, its saved state) pairs in order; an empty state where AdamW never saw a gradient."""
    params = chain.from_iterable(group["params"] for group in optimizer.param_groups)
    return [(p, state_dict["state"].get(number, {})) for number, p in zip(_numbers(state_dict), params, strict=True)]


def _numbers(state_dict: Mapping[str, Any]) -> list[Any]:
    """What stands for the parameters in a checkpoint, in their order: the keys of their states."""
    return list(chain.from_iterable(group["params"] for group in state_dict["param_groups"]))
