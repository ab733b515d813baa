"""The tensors of parameters and states as lists, found anew in every step, and what shows that one of them has been replaced.

Between two steps nothing here holds a parameter or a state. Memory that others replace, by offloading for example, is free at once.
What is kept are the addresses of the objects and of their data, and weak references that tell when memory is freed.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain, compress
from operator import add, attrgetter, itemgetter
from typing import Any, NamedTuple, TypeVar

from torch import Tensor

from metaadamw_fast.launch import Operands
from metaadamw_fast.ops import addresses_of, expected_objects, listed_objects

from . import devices
from .allocation import MASTER
from .members import Member
from .rule import PARAM, Rule
from .sharding import is_sharded, local
from .watch import Storages, as_real


def joined(lists: Iterable[Sequence[Tensor]]) -> list[Tensor]:
    """One list of all, in a fraction of the time that ``itertools.chain`` takes for thousands of tensors."""
    out: list[Tensor] = []
    for xs in lists:
        out += xs
    return out


T = TypeVar("T")
_version_of = attrgetter("_version")


def _picker(positions: Sequence[int]) -> Callable[[Sequence[Any]], Sequence[Any]]:
    """A function that takes these elements of a sequence."""
    if len(positions) > 1:
        return itemgetter(*positions)
    return lambda xs: [xs[i] for i in positions]


class _Places(NamedTuple):
    """Where each list stands among the objects that param groups and states list, by a :func:`_picker`."""

    leaves: Any  # T
    params: Any  # R
    states: list[Any]  # one for each of the rule's states and, last, the masters: of the rows that have it


class HeldTensors:
    """Lists of the tensors that an optimizer's rows have, there from the constructor or :meth:`hold` to :meth:`let_go`.

    Args:
        rule: of the optimizer.
        members: the T parameters, in the order of ``param_groups``.
        rows: which R of them have a row.
        chosen: for each of the rule's states which rows have it, R bools.
        state: ``optimizer.state``, in which nothing is missing.
        param_groups: ``optimizer.param_groups``.

    Attributes:
        leaves: T parameters.
        outer: the parameters of the rows, each of the rule's states, the masters; as the user has them. A list has the rows that
            have such a tensor.
        params, states, masters: the same as the kernels take them: of a DTensor the shard, complex ones as real ones.
        chosen: for each of the rule's states and, last, the masters: which rows have one.

    Two states of a parameter may change their roles with every update, and so their entries in ``state``. Here each stays what it
    was when the lists were made.
        sharded, complex: whether there are such parameters.
    """

    def __init__(
        self,
        rule: Rule,
        members: Sequence[Member],
        rows: Sequence[int],
        chosen: Sequence[Sequence[bool]],
        state: Mapping[Any, Any],
        param_groups: Sequence[Mapping[str, Any]],
    ) -> None:
        self._rule, self._flags = rule, rule.flags
        params = [members[t].param for t in rows]
        at: dict[tuple[int, str], int] = {}
        number = sum(len(group["params"]) for group in param_groups)
        places = {id(p): i for i, p in enumerate(chain.from_iterable(group["params"] for group in param_groups))}
        for key, value in state.items():
            if isinstance(value, dict):
                for name in value:
                    at[id(key), name] = number
                    number += 1
            else:
                number += len(value) if isinstance(value, list) else 1
        self.chosen = [*chosen, [(id(p), MASTER) in at for p in params]]
        self._places = _Places(
            _picker(range(len(members))),
            _picker([places[id(p)] for p in params]),
            [
                _picker([at[id(p), name] for p in compress(params, has)])
                for name, has in zip((*rule.names, MASTER), self.chosen, strict=True)
            ],
        )
        found = listed_objects(_containers(state, param_groups))
        self._addresses = addresses_of(found)
        # Of each row where its two states that change their roles stand in `found`; which rows have changed them.
        both = rule.exchanged
        self._pairs = [] if both is None else [(at[id(p), both[0]], at[id(p), both[1]]) for p in params]
        self._exchanged = [False] * len(self._pairs)
        self._owners = (id(state), id(param_groups))
        self._outlined = _outline(param_groups, self._flags)
        self.sharded = any(isinstance(x, Tensor) and is_sharded(x) for x in found)
        self.complex = any(p.is_complex() for p in params)
        self._take(found)
        self._places_of_data = self._where()
        self._storages = Storages(self.written())

    def _take(self, found: list[Any]) -> None:
        places = self._places
        self.leaves: Sequence[Tensor] = places.leaves(found)
        self.outer: list[Sequence[Tensor]] = [places.params(found), *(pick(found) for pick in places.states)]
        self.params, *self.states, self.masters = [self._plain(xs) for xs in self.outer]

    def _plain(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """Their shards, as real tensors."""
        if self.sharded:
            tensors = [local(x) for x in tensors]
        return [as_real(x.detach()) if x.is_complex() else x for x in tensors] if self.complex else tensors

    def let_go(self) -> None:
        """Holds the tensors no longer; :meth:`hold` brings them back."""
        self.leaves = self.params = self.masters = ()
        self._entries: Sequence[Any] = ()
        self.states = [()] * len(self._rule.states)
        self.outer = [(), *self.states, ()]

    def hold(self, state: Mapping[Any, Any], param_groups: Sequence[Mapping[str, Any]]) -> bool:
        """Takes up the tensors, unless one has been replaced, or the data of one (``p.data = x``, ``model.to``), or a flag.

        ``state`` and ``param_groups`` are the optimizer's of now, which may be others, too. The lists serve no more if False is
        returned.
        """
        outlined = _outline(param_groups, self._flags)
        if (id(state), id(param_groups)) != self._owners or self._storages.freed or outlined != self._outlined:
            return False
        found = expected_objects(_containers(state, param_groups), self._addresses)
        if found is None:
            return False
        for i, j in compress(self._pairs, self._exchanged):
            found[i], found[j] = found[j], found[i]
        if self._pairs:
            self._entries = [state[p] for p in self._places.params(found)]
        self._take(found)
        if self._where() == self._places_of_data:
            return True
        self.let_go()
        return False

    def exchange(self, chosen: Sequence[bool] | None) -> None:
        """Exchanges the two states of the ``chosen`` rows in ``state``, of all if None. Only while the tensors are held."""
        rows = range(len(self._pairs)) if chosen is None else compress(range(len(self._pairs)), chosen)
        self._exchange([(r, self._entries[r]) for r in rows])

    def name_by(self, exchanged: Sequence[bool], entries: Sequence[Any]) -> None:
        """Brings the two states of each row in the order that ``exchanged`` says, R bools; ``entries`` are its states."""
        self._exchange([(r, entries[r]) for r, now in enumerate(exchanged) if now != self._exchanged[r]])

    def _exchange(self, rows: Sequence[tuple[int, Any]]) -> None:
        assert self._rule.exchanged is not None
        first, second = self._rule.exchanged
        addresses = array("Q", self._addresses)
        for r, entry in rows:
            if first in entry and second in entry:
                entry[first], entry[second] = entry[second], entry[first]
            i, j = self._pairs[r]
            addresses[i], addresses[j] = addresses[j], addresses[i]
            self._exchanged[r] = not self._exchanged[r]
        self._addresses = addresses.tobytes()

    def written(self) -> list[Tensor]:
        """All tensors that an update of all rows writes, as the kernels take them."""
        return joined([self.params, *self.states, self.masters])

    def row_versions(self) -> list[int]:
        """Of each row the version counters of its tensors, added up; of a DTensor and of its shard, which are counted apart."""
        versions = [0] * len(self.params)
        for xs, has in zip(self.outer, [None, *self.chosen], strict=True):
            own = map(_version_of, xs)
            if self.sharded:
                own = map(add, own, [x._version if (x := local(y)) is not y else 0 for y in xs])
            if len(xs) == len(versions):
                versions = [*map(add, versions, own)]
            elif xs and has is not None:
                versions = [n + next(own) if here else n for n, here in zip(versions, has, strict=True)]
        return versions

    def by_row(self, of: Callable[[Tensor], T | None]) -> list[list[T | None]]:
        """Of each row what ``of`` says of its parameter, each of its states and its master; None where it has none."""
        rows: list[list[T | None]] = [[] for _ in self.params]
        for xs, has in zip(self.outer, [[True] * len(rows), *self.chosen], strict=True):
            found = map(of, xs)
            for row, here in zip(rows, has, strict=True):
                row.append(next(found) if here and xs else None)
        return rows

    def _where(self) -> tuple[list[int], list[tuple[int, ...]]]:
        # Strides of the parameters only: `p.data = p.data.t()` happens, and the addresses stay. Nobody transposes a state in place.
        if self.params and devices.is_fake(self.params[0]):
            return [], []  # no memory
        return [*map(Tensor.data_ptr, self.written())], [*map(Tensor.stride, self.params)]

    # ------------------------------------------------------------------------------------------------- as the kernels take them

    def copies(self) -> list[Tensor]:
        """The low-precision parameters that have a master."""
        return list(compress(self.params, self.chosen[-1]))

    def updated(self) -> list[Tensor]:
        """What the kernels update as the parameter of each row: its master, or itself."""
        rest = iter(self.masters)
        return [next(rest) if here else p for p, here in zip(self.params, self.chosen[-1], strict=True)]

    def by_name(self) -> dict[str, list[Tensor] | None]:
        """R tensors of each state, without elements where a row does not have it; None where no row has it."""
        rows = zip(self._rule.states, self.states, self.chosen, strict=False)
        return {state.name: [*xs] if state.flag is None else _spread(xs, has) for state, xs, has in rows}

    def operands(self) -> Operands:
        """The lists as the arguments of a launch, in the order of the rule's operands; the low-precision parameters last."""
        lists = {**self.by_name(), PARAM: self.updated()}
        own = [None if name is None else lists.get(name) for name in self._rule.operands]
        return [own[0] or [], *own[1:], _spread(self.copies(), self.chosen[-1])]


def _spread(tensors: Sequence[Tensor], chosen: Sequence[bool]) -> list[Tensor] | None:
    """R entries, without elements where a row is not ``chosen``; None if none is."""
    if not tensors:
        return None
    rest, absent = iter(tensors), tensors[0].new_empty(0)
    return [next(rest) if here else absent for here in chosen]


def _containers(state: Mapping[Any, Any], param_groups: Sequence[Mapping[str, Any]]) -> list[Any]:
    """The parameters as the param groups list them, then all that ``optimizer.state`` holds."""
    params = [x if type(x := group["params"]) is list else list(x) for group in param_groups]
    return [*params, *state.values()]


def _outline(param_groups: Sequence[Mapping[str, Any]], flags: Sequence[str]) -> list[tuple[Any, ...]]:
    return [(*map(group.get, flags), len(group["params"]), group.get("capturable")) for group in param_groups]
