"""Parameters to groups, from names and modules. Pure functions: docs/algorithm.md section 1, MetaAdamW section 3.1.

A *group* shares one learning-rate scale and one weight-decay scale. It is independent of the entries of
``optimizer.param_groups``, which keep their own lr, betas, eps and weight decay.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .core import members as core_members

Grouping = str | Callable[[str, Tensor], Hashable]

_NAME_RULES = (
    ("embedding", ("embed",)),
    ("attention", ("attn", "attention")),
    ("ffn", ("ffn", "mlp", "feed_forward")),
    ("layernorm", ("norm",)),
)
_MODULE_RULES: tuple[tuple[str, type[nn.Module]], ...] = (
    ("linear", nn.Linear),
    ("embedding", nn.Embedding),
    ("attention", nn.MultiheadAttention),
    ("layernorm", nn.LayerNorm),
)


@dataclass(frozen=True)
class Member(core_members.Member):
    """One parameter and what grouping and features need to know of it."""

    type: str

    @property
    def layer(self) -> int | None:
        """The layer index in the name, or None."""
        return layer_index(self.name) if self.name is not None else None

    @property
    def is_bias(self) -> bool:
        """Whether the parameter is one-dimensional or called a bias."""
        return (not is_lazy(self.param) and self.param.dim() == 1) or (self.name or "").endswith("bias")

    @property
    def numel(self) -> int:
        """How many numbers it is: two for each complex one, none before a lazy module is initialized."""
        return 0 if is_lazy(self.param) else self.param.numel() * (2 if self.param.is_complex() else 1)


@dataclass
class Group:
    """Parameters that share one pair of scales.

    ``type``, ``bucket`` (0 early, 1 middle, 2 late) and ``is_bias`` are set for fine-grained groups, else None.
    ``members`` are the positions of its parameters in the optimizer's order, ``names`` and ``params`` the parameters themselves.
    """

    key: Hashable
    name: str
    type: str | None = None
    bucket: int | None = None
    is_bias: bool | None = None
    members: list[int] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    params: list[Tensor] = field(default_factory=list, repr=False)  # whose elements nobody wants to read


def layer_index(name: str) -> int | None:
    """The layer a name belongs to: the first number between dots, else one after the last dot, else None."""
    found = re.search(r"\.(\d+)\.", name) or re.search(r"\.(\d+)$", name)
    return int(found.group(1)) if found else None


def layer_type(name: str | None, owner: nn.Module | None) -> str:
    """Embedding, attention, ffn, layernorm or linear, by the name first and by the owning module second; else other.

    Unknown without a name.
    """
    if name is None:
        return "unknown"
    lowered = name.lower()
    for kind, parts in _NAME_RULES:
        if any(part in lowered for part in parts):
            return kind
    for kind, module in _MODULE_RULES:
        if isinstance(owner, module):
            return kind
    return "other"


def depth_bucket(index: int | None, max_layer: int) -> int:
    """0 for the first third of the layers, 2 for the last, 1 between, without an index, and in shallow models."""
    if index is None or max_layer <= 1:
        return 1
    if index < max_layer / 3:
        return 0
    return 2 if index > 2 * max_layer / 3 else 1


def max_layer(members: Iterable[Member]) -> int:
    """The largest layer index among the members, 0 if none has one."""
    return max((m.layer for m in members if m.layer is not None), default=0)


def describe(params: Sequence[tuple[str | None, Tensor, int]], model: nn.Module | None) -> list[Member]:
    """Members from (name, parameter, index of its ``param_groups`` entry); names and owners missing here come from ``model``."""
    owners: dict[Tensor, nn.Module] = {}
    names: dict[Tensor, str] = {}
    if model is not None:
        names.update({param: name for name, param in model.named_parameters()})
        for module in model.modules():
            for param in module.parameters(recurse=False):
                owners.setdefault(param, module)
    described = []
    for given, tensor, index in params:
        name = given or names.get(tensor)
        described.append(Member(tensor, name, index, layer_type(name, owners.get(tensor))))
    return described


def resolve(grouping: Grouping, members: Sequence[Member]) -> Grouping:
    """`grouping` with ``auto`` replaced: fine_grained if any name is known, else param_groups.

    Raises:
        ValueError: an unknown grouping, or fine_grained (or a callable) without any name.
    """
    named = any(m.name is not None for m in members)
    if grouping == "auto":
        return "fine_grained" if named else "param_groups"
    if not callable(grouping) and grouping not in ("param_groups", "fine_grained"):
        raise ValueError(f"Invalid grouping: {grouping!r} (auto, param_groups, fine_grained or a callable)")
    if grouping != "param_groups" and not named:
        raise ValueError(
            f"grouping={grouping if isinstance(grouping, str) else 'callable'} needs the parameters' names:"
            " pass model.named_parameters() or model="
        )
    return grouping


def _group_of(member: Member, grouping: Grouping, deepest: int) -> Group:
    """An empty group with the key, name and kind that `member` belongs to."""
    if callable(grouping):
        key = grouping(member.name or "", member.param)
        return Group(key, str(key))
    if grouping == "param_groups":
        return Group(member.param_group, f"param_group {member.param_group}")
    kind, bucket, is_bias = member.type, 0, False
    if member.name is not None:
        bucket, is_bias = depth_bucket(member.layer, deepest), member.is_bias
    name = f"{kind} {('early', 'middle', 'late')[bucket]} {'bias' if is_bias else 'weight'}"
    return Group((kind, bucket, is_bias), name, kind, bucket, is_bias)


def assign(groups: list[Group], members: Sequence[Member], grouping: Grouping, positions: Sequence[int]) -> list[int]:
    """Puts the members at these positions into groups, appending to ``groups`` in order of first appearance.

    Groups that exist keep their ids and their members. Nothing changes if the grouping raises.

    Returns:
        The group id of each of them.
    """
    ids = {group.key: i for i, group in enumerate(groups)}
    deepest = max_layer(members)
    group_ids = []
    found = [_group_of(member, grouping, deepest) for member in (members[i] for i in positions)]
    hash(tuple(group.key for group in found))  # raises TypeError while nothing has changed
    for position, group in zip(positions, found, strict=True):
        member = members[position]
        if group.key not in ids:
            ids[group.key] = len(groups)
            groups.append(group)
        group = groups[ids[group.key]]
        group.members.append(position)
        group.names.append(member.name or f"parameter {position}")
        group.params.append(member.param)
        group_ids.append(ids[group.key])
    return group_ids


class Groups(NamedTuple):
    """The groups, and the number of the one to which each parameter belongs."""

    groups: list[Group]
    ids: list[int]


def regroup(
    before: Groups, members: Sequence[Member], origins: Sequence[int | None], grouping: Grouping
) -> tuple[Groups, list[int | None]]:
    """Groups of the parameters that there are now; those that exist keep their order, and new ones come behind them.

    Args:
        before: of the parameters before.
        members: the parameters.
        origins: where each stood before; None for a new one.
        grouping: resolved.

    Returns:
        The groups, and the number that each had before; None for a new one.
    """
    groups = [replace(group, members=[], names=[], params=[]) for group in before.groups]
    ids = [None if t is None else before.ids[t] for t in origins]
    if grouping == "param_groups":  # whose numbers may have changed
        for number, member in zip(ids, members, strict=True):
            if number is not None:
                groups[number] = replace(groups[number], key=member.param_group, name=f"param_group {member.param_group}")
    joined = [t for t, number in enumerate(ids) if number is None]
    for t, number in zip(joined, assign(groups, members, grouping, joined), strict=True):
        ids[t] = number
    numbers = [number for number in ids if number is not None]
    used = sorted(set(numbers))
    names = {t: name for group in before.groups for t, name in zip(group.members, group.names, strict=True)}
    for number in used:
        of_group = [t for t, x in enumerate(numbers) if x == number]
        groups[number].members[:] = of_group
        groups[number].params[:] = [members[t].param for t in of_group]
        groups[number].names[:] = [
            (members[t].name or f"parameter {t}") if origin is None else names[origin]
            for t, origin in ((t, origins[t]) for t in of_group)
        ]
    known = len(before.groups)
    now = Groups([groups[number] for number in used], [used.index(number) for number in numbers])
    return now, [number if number < known else None for number in used]
