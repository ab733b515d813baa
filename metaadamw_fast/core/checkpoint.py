"""What the checkpoint of a fused optimizer holds besides torch's ``state`` and ``param_groups``, and how it is loaded.

The extra content is one key, the optimizer's ``checkpoint_key``: step counts, the seed of stochastic rounding, and what the
optimizer's ``saved`` adds. torch's optimizers ignore it, so checkpoints load in both directions where states have the same names.
It stands at the top level and, the same object, in the first param group, since ``torch.distributed.checkpoint`` (DCP) keeps only
``state`` and ``param_groups``. What it holds has the same structure in every optimizer of the same options: DCP loads into what is
there. Its tensors are copies: a DCP load that fails midway has written into torch's own moments, as with any optimizer, but not
into the extra content. The param group of the optimizer itself has the key too, with None: DCP's flattened form finds what it looks
for by the keys that are there.

DCP wants all that the optimizer has to be in the checkpoint. Between a fused optimizer and torch's, whose param groups have other
keys, it needs ``planner=DefaultLoadPlanner(allow_partial_load=True)``, and so it does for checkpoints from before a key was added.
It saves no state of parameters that do not require a gradient: the moments of one that was trained and then frozen are lost.

A few lines longer than 300: what is saved, checked and loaded is one format, written down once.

A parameter that never had a gradient and requires none has no state, and no entry in a checkpoint.
"""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from metaadamw_fast.rounding import signed

from .allocation import MASTER
from .hyperparameters import check_hyperparameters
from .sharding import laid_out_as
from .watch import as_real

if TYPE_CHECKING:
    from .optimizer import FusedOptimizer

SKIPPED, ROUNDING = "skipped_steps", "rounding_seed"
STEPS = "steps"  # the exact counts of all parameters; a state's "step" is float32, as torch's
GROUP_KEYS = ("lr", "betas", "eps", "weight_decay")


def extra_state(optimizer: FusedOptimizer) -> dict[str, Any]:
    """The extra content: tensors, numbers, lists and dicts only, for ``torch.load(weights_only=True)``.

    All tensors are copies: who loads into them in place, as DCP does, changes nothing here before ``load_state_dict``.
    """
    return {
        "steps_done": optimizer.steps_done,
        STEPS: optimizer._counts[:-1].clone(),
        SKIPPED: optimizer.skipped_steps,
        ROUNDING: None if optimizer._rounding_seed is None else int(optimizer._rounding_seed),
        **optimizer.saved(),
    }


def reserve(optimizer: FusedOptimizer) -> None:
    """Gives the first param group, and no other, its place for the extra content."""
    for group in optimizer.param_groups:
        group.pop(optimizer.checkpoint_key, None)
    for group in optimizer.param_groups[:1]:
        group[optimizer.checkpoint_key] = None


def saved(optimizer: FusedOptimizer) -> dict[str, Any]:
    """Torch's state dict, parameters replaced by their numbers, with the extra content in both of its places."""
    params = chain.from_iterable(group["params"] for group in optimizer.param_groups)
    numbers: dict[Tensor, int] = {}
    for number, param in enumerate(params):
        numbers.setdefault(param, number)
    groups = [{**group, "params": [numbers[p] for p in group["params"]]} for group in optimizer.saved_groups()]
    key = optimizer.checkpoint_key
    extra = groups[0][key] = extra_state(optimizer)
    states = list(optimizer.state.items())  # at once: another thread may be in a step
    numbered = {numbers.get(p, p) if isinstance(p, Tensor) else p: x for p, x in states}
    return {"state": numbered, "param_groups": groups, key: extra}


def load(optimizer: FusedOptimizer, state_dict: dict[str, Any]) -> None:
    """Loads what :func:`saved` returned, or torch's own checkpoint of an optimizer with the same states.

    Raises:
        ValueError: it does not fit, or holds what cannot be; nothing has changed then.
    """
    state_dict = with_extra_on_top(state_dict, optimizer.checkpoint_key)
    check(optimizer, state_dict)
    state_dict = without_old_extra(state_dict, optimizer.checkpoint_key)
    groups = copy.deepcopy(state_dict["param_groups"])
    for group, own in zip(groups, optimizer.param_groups, strict=True):
        group["params"] = own["params"]
        if "param_names" in own:
            group.setdefault("param_names", own["param_names"])
    optimizer._drop_states()  # while the states are those that it lists
    optimizer._marks = []  # whatever is written until the next step belongs to the checkpoint, as the model's weights do
    optimizer.__setstate__({"state": defaultdict(dict), "param_groups": groups})
    load_states(optimizer, state_dict)
    extra = state_dict.get(optimizer.checkpoint_key)
    counts, exact = optimizer._counts[:-1], None if extra is None else extra.get(STEPS)
    counts.zero_() if exact is None else counts.copy_(exact)
    # Takes the counts from the states, the exact ones where those are their roundings. A state that is missing, and is to start as
    # its parameter, waits for the next step: the model may be loaded after the optimizer.
    optimizer._prepare(allocated=False if _lacks_copies(optimizer) else None)
    if extra is None:
        optimizer.steps_done = int(_most_steps(state_dict))
    else:
        optimizer.steps_done = int(extra["steps_done"])
        if optimizer._skipped is not None:
            optimizer._skipped.fill_(int(extra.get(SKIPPED, 0)))
        if optimizer._rounding_seed is not None and extra.get(ROUNDING) is not None:
            optimizer._rounding_seed = signed(int(extra[ROUNDING]))
    optimizer.restore(extra, state_dict)
    optimizer._cache()


def with_extra_on_top(state_dict: Any, key: str) -> Any:
    """A checkpoint with the extra content at the top level only, wherever it was; other than a checkpoint as it is."""
    groups = state_dict.get("param_groups") if isinstance(state_dict, Mapping) else None
    if not isinstance(groups, Sequence) or not groups or not isinstance(groups[0], Mapping) or key not in groups[0]:
        return state_dict
    others = [{k: x for k, x in group.items() if k != key} if isinstance(group, Mapping) else group for group in groups]
    return {key: groups[0][key], **state_dict, "param_groups": others}


def check(optimizer: FusedOptimizer, state_dict: dict[str, Any]) -> None:
    """Raises ValueError if ``state_dict`` does not fit the optimizer or holds what cannot be, before anything is changed."""
    rule, key = optimizer.rule, optimizer.checkpoint_key
    try:
        check_states(optimizer, state_dict, "loaded state dict", GROUP_KEYS, ("step", *rule.always), (*rule.names, MASTER))
    except ValueError as error:
        hint = optimizer.hint(state_dict)
        if hint:
            raise ValueError(f"{error}. {hint}") from error
        raise
    for index, group in enumerate(state_dict["param_groups"]):
        try:
            check_hyperparameters(group)
        except (TypeError, LookupError, ValueError) as error:
            raise ValueError(f"parameter group {index} in the loaded state dict: {error}") from error
    if key not in state_dict:
        return
    extra, counts = state_dict[key], optimizer._counts[:-1]
    check_keys(extra, ("steps_done",), key)
    check_count(extra["steps_done"], "steps_done")
    check_count(extra.get(SKIPPED, 0), SKIPPED)
    if STEPS in extra:
        check_tensor(extra[STEPS], counts, STEPS)
        if not bool((extra[STEPS] >= 0).all() & extra[STEPS].isfinite().all()):
            raise ValueError(f"{STEPS} in the loaded state dict are not all numbers from 0 on")
    seed = extra.get(ROUNDING)
    if seed is not None and (type(seed) is not int or not -(2**63) <= seed < 2**64):
        raise ValueError(f"{ROUNDING} in the loaded state dict is {seed!r}, not a 64-bit integer")
    optimizer.check_saved(extra, state_dict)


def without_old_extra(state_dict: dict[str, Any], key: str) -> dict[str, Any]:
    """A checked checkpoint without the extra content if that is older than the states.

    torch's optimizer loads the param group with the extra content in it, and saves it again after steps of its own.
    """
    if key not in state_dict:
        return state_dict
    rounded = torch.tensor(float(state_dict[key]["steps_done"]), dtype=torch.float32).item()  # as the states' own counts are
    if _most_steps(state_dict) <= rounded:
        return state_dict
    return {name: value for name, value in state_dict.items() if name != key}


def _most_steps(state_dict: Mapping[str, Any]) -> float:
    """The largest step count of a parameter. What users keep among the states may have a "step" of its own."""
    states = [state_dict["state"].get(number, {}) for number in _numbers(state_dict)]
    return max((float(state["step"]) for state in states if "step" in state), default=0.0)


def check_states(
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
        check_keys(group, ("params", *group_keys), f"parameter group {index}")
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
        check_keys(values, (), f"the state of parameter {position}")
        if any(key in values for key in state_keys):
            check_keys(values, state_keys, f"the state of parameter {position}")
        if "step" in values:
            check_number(values["step"], f"step of parameter {position}")
        for name in elementwise:
            if name in values:
                check_tensor(values[name], param, f"{name} of parameter {position}")


def check_keys(values: Any, keys: Iterable[str], where: str) -> None:
    """Raises ValueError unless ``values`` is a dict with these keys."""
    if not isinstance(values, Mapping):
        raise ValueError(f"{where} in the loaded state dict is of type {type(values).__name__}, not a dict")
    missing = [key for key in keys if key not in values]
    if missing:
        raise ValueError(f"{where} in the loaded state dict lacks {', '.join(missing)}")


def check_tensor(value: Any, like: Tensor, where: str) -> None:
    """Raises ValueError unless ``value`` is a dense floating-point tensor of the shape of ``like``."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{where} in the loaded state dict is of type {type(value).__name__}, not a tensor")
    right_kind = value.is_floating_point() or (value.is_complex() and like.is_complex())
    if not right_kind or value.layout is not torch.strided or (value.is_meta and not like.is_meta):
        raise ValueError(f"{where} in the loaded state dict is {value.dtype}, {value.layout}, on {value.device}")
    if value.shape != like.shape:
        raise ValueError(f"{where} has shape {tuple(value.shape)} in the loaded state dict, here {tuple(like.shape)}")


def check_number(value: Any, where: str) -> None:
    """Raises ValueError unless ``value`` is a finite number that is not negative, or a tensor with one."""
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex() and not value.is_meta:
        value = value.item()
    if not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise ValueError(f"{where} in the loaded state dict is {value!r}, not a number from 0 on")


def check_count(value: Any, where: str) -> None:
    """Raises ValueError unless ``value`` is a whole number from 0 on."""
    check_number(value, where)
    if value != int(value):
        raise ValueError(f"{where} in the loaded state dict is {value!r}, not an integer")


def load_states(optimizer: FusedOptimizer, state_dict: Mapping[str, Any]) -> None:
    """Copies states and steps, keeping the saved dtypes: torch casts float32 moments to the parameter's.

    torch has cast a wide state, too, if its optimizer loaded and saved the checkpoint in between: such a state is widened again.
    What users keep beside them is copied, too, and otherwise left alone.
    """
    states = {state.name: state for state in optimizer.rule.states}
    ours = ("step", *states, MASTER)
    for param, values in _states(optimizer, state_dict):
        # Of a frozen parameter earlier versions kept moments, too, which are 0 if it never was trained.
        untouched = not param.requires_grad and float(values.get("step", 1.0)) == 0
        for name, value in values.items():
            if untouched and name in ours:
                continue
            state = optimizer.state[param]
            if name == "step":
                state[name] = float(value)
            elif name in states or (name == MASTER and optimizer._master_weights):
                wide = name in states and states[name].wide
                dtype = torch.promote_types(value.dtype, torch.float32) if wide else value.dtype
                # In the parameter's memory layout: the update then runs without a copy.
                state[name] = torch.empty_like(param, dtype=dtype, memory_format=torch.preserve_format)
                state[name].copy_(laid_out_as(value, param))
                if name in states and states[name].square:
                    as_real(state[name]).abs_()
            elif name not in ours:
                state[name] = _copied_beside(value, param)
    numbers = set(_numbers(state_dict))
    for key, value in state_dict["state"].items():
        if key not in numbers:
            optimizer.state[key] = copy.deepcopy(value)


def _lacks_copies(optimizer: FusedOptimizer) -> bool:
    """Whether a parameter with states lacks one that starts as the parameter."""
    names = [state.name for state in optimizer.rule.states if state.of_param]
    first = optimizer.rule.states[0].name
    states = [own for own in optimizer.state.values() if isinstance(own, Mapping) and first in own]
    return any(name not in own for own in states for name in names)


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


def _states(optimizer: Optimizer, state_dict: Mapping[str, Any]) -> list[tuple[Tensor, Mapping[str, Any]]]:
    """(parameter, its saved state) pairs in order; an empty state where AdamW never saw a gradient."""
    params = chain.from_iterable(group["params"] for group in optimizer.param_groups)
    return [(p, state_dict["state"].get(number, {})) for number, p in zip(_numbers(state_dict), params, strict=True)]


def _numbers(state_dict: Mapping[str, Any]) -> list[Any]:
    """What stands for the parameters in a checkpoint, in their order: the keys of their states."""
    return list(chain.from_iterable(group["params"] for group in state_dict["param_groups"]))
