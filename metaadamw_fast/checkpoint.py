"""What a MetaAdamW checkpoint holds besides that of any optimizer here: is it sound, and does it fit? See core/checkpoint.py.

The ``metaadamw`` key has, of MetaAdamW's own: encoder, its sizes and random generator, the groups, scales, and the statistics that
lagged mode goes on from. ``torch.optim.AdamW`` has no such key: its moments and steps are loaded, the encoder stays as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .core.checkpoint import check_keys, check_number, check_tensor
from .encoder import GroupEncoder

KEY, CONFIG, NAMED = "metaadamw", "config", "named"  # checkpoints of earlier versions have neither config nor named
OWN = ("group_ids", "encoder", "generator", "scales", "lagged")  # all of them have these


def difference_in_names(named: bool, state_dict: Any) -> str:
    """Says that names of parameters are known on one side only, and what to pass; empty if that is not so.

    ``named`` says whether the optimizer knows any.
    """
    extra = state_dict.get(KEY) if isinstance(state_dict, Mapping) else None
    groups = state_dict.get("param_groups") if isinstance(extra, Mapping) else None
    if not isinstance(extra, Mapping) or not isinstance(groups, Sequence):
        return ""
    in_groups = any("param_names" in group for group in groups if isinstance(group, Mapping))
    were_named = bool(extra.get(NAMED, in_groups))
    if were_named == named:
        return ""
    words, fit = ("with", "model.named_parameters(), or model=,") if were_named else ("without", 'grouping="param_groups"')
    return f"It was saved {words} names of the parameters, which decide the groups: pass {fit} to the optimizer"


def has_encoder(extra: Mapping[str, Any], group_ids: Sequence[int], groups: int, other_names: bool) -> bool:
    """Whether a checkpoint has an encoder of as many groups as the optimizer's; where only names make the difference, it need not.

    Raises:
        ValueError: the groups differ, for another reason.
    """
    ids = extra["group_ids"]
    if not isinstance(ids, (list, tuple)) or [type(i) for i in ids] != [int] * len(group_ids):
        raise ValueError("loaded state dict groups the parameters differently: group_ids must be a number for each of them")
    if list(ids) != group_ids and not other_names:
        raise ValueError("loaded state dict groups the parameters differently: same model, grouping and order are needed")
    return len(set(ids)) == groups


def check_encoder(extra: Mapping[str, Any], encoder: GroupEncoder, scales: Tensor) -> None:
    """Raises ValueError unless the encoder, its random generator and its last scales could be the optimizer's."""
    if CONFIG in extra:
        own = encoder.description()
        check_keys(extra[CONFIG], own.keys(), CONFIG)
        for name, value in own.items():
            if extra[CONFIG][name] != value:
                raise ValueError(f"loaded state dict has another encoder: {name} is {extra[CONFIG][name]!r}, here {value!r}")
    _check_weights(extra["encoder"], encoder.state_dict())
    try:
        torch.Generator().set_state(extra["generator"].cpu())
    except (AttributeError, TypeError, RuntimeError) as error:
        raise ValueError(f"generator in the loaded state dict is no state of a random generator: {error}") from error
    check_tensor(extra["scales"], scales, "scales")


def _check_weights(saved: Any, own: Mapping[str, Tensor]) -> None:
    if not isinstance(saved, Mapping) or saved.keys() != own.keys():
        differing = sorted(map(str, saved.keys() ^ own.keys())) if isinstance(saved, Mapping) else [f"{saved!r}"]
        raise ValueError(f"loaded state dict has another encoder: {', '.join(differing[:4])} on one side only")
    for name, value in own.items():
        check_tensor(saved[name], value, f"another encoder: {name}")
    dtypes = {str(value.dtype) for value in saved.values()}
    if len(dtypes) > 1:
        raise ValueError(f"encoder in the loaded state dict has several dtypes: {', '.join(sorted(dtypes))}")


def check_lagged(lagged: Any, statistics: Tensor) -> None:
    """Raises ValueError unless ``lagged`` is None or the pair of statistics and training progress."""
    if lagged is None:
        return
    if not isinstance(lagged, (list, tuple)) or len(lagged) != 2:
        raise ValueError("lagged in the loaded state dict is neither None nor the statistics with their t")
    check_tensor(lagged[0], statistics, "the statistics in lagged")
    check_number(lagged[1], "t in lagged")
