"""The parameters that ``param_groups`` list: what is known of each, and who stands where after others have changed them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.nn.parameter import is_lazy


@dataclass(frozen=True)
class Member:
    """One parameter: ``name`` is None when unknown, ``param_group`` the index of its entry of ``optimizer.param_groups``."""

    param: Tensor = field(repr=False)
    name: str | None
    param_group: int


def listed(param_groups: Sequence[Mapping[str, Any]]) -> list[tuple[str | None, Tensor, int]]:
    """(name, parameter, index of its param group), in order."""
    rows = []
    for index, group in enumerate(param_groups):
        names = group.get("param_names", [None] * len(group["params"]))
        rows += [(name, param, index) for name, param in zip(names, group["params"], strict=True)]
    return rows


def repeats(param_groups: Sequence[Mapping[str, Any]]) -> bool:
    """Whether ``param_groups`` list a parameter twice, as others can make them."""
    params = [p for group in param_groups for p in group["params"]]
    return len(set(params)) < len(params)


def origins(before: Sequence[Member], now: Sequence[Member]) -> list[int | None]:
    """Where each of the members stood before; None for a new one.

    What takes the place of another of the same shape stands where that stood.
    """
    places = {m.param: t for t, m in enumerate(before)}
    present = {m.param for m in now}
    gone = [t for t, m in enumerate(before) if m.param not in present]
    fresh = [m.param for m in now if m.param not in places]
    if len(gone) == len(fresh) and all(_alike(before[t].param, p) for t, p in zip(gone, fresh, strict=True)):
        places.update(zip(fresh, gone, strict=True))
    return [places.get(m.param) for m in now]


def _alike(old: Tensor, new: Tensor) -> bool:
    """Whether a parameter may stand for another: of one shape."""
    return not is_lazy(old) and not is_lazy(new) and old.shape == new.shape
