"""What shows that others have written or replaced tensors, without holding the tensors' memory; and sums of what nobody updates."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import attrgetter
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from metaadamw_fast.checks import DTYPES

from . import devices
from .sharding import is_sharded, local

if TYPE_CHECKING:
    from .held import HeldTensors

_version_of = attrgetter("_version")


def version(tensors: Iterable[Tensor]) -> int:
    """The version counters, added up. Counters only rise: equal sums are equal versions."""
    return sum(map(_version_of, tensors))


def as_real(x: Tensor) -> Tensor:
    """A complex tensor as a real one of one dimension more, on the same memory; other tensors as they are."""
    return torch.view_as_real(x) if x.is_complex() else x


def as_real_gradient(x: Tensor) -> Tensor:
    """:func:`as_real` of a gradient, which autograd may hand out as a conjugated view."""
    return torch.view_as_real(x.resolve_conj()) if x.is_complex() and x.layout is torch.strided else x


def is_wrapper(x: Tensor) -> bool:
    """Whether ``x`` is of a subclass that decides itself what its operations do, as quantized weights are."""
    own = type(x).__torch_dispatch__ is not Tensor.__torch_dispatch__
    return own and not devices.is_fake(x) and not is_sharded(x)


def has_numbers(x: Tensor, device: torch.device) -> bool:
    """Whether a kernel on ``device`` can read the elements of ``x`` as numbers."""
    if is_lazy(x) or is_wrapper(x):
        return False
    x = local(x)
    return (x.is_floating_point() or x.is_complex()) and x.layout is torch.strided and x.device == device


class Storages:
    """The memory under some tensors, held weakly.

    A new tensor may come to lie at the address of one that was freed. The address alone would not show that it is another. So every
    storage tells when it is freed.

    Attributes:
        freed: whether one of them has been.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self.freed = False
        own = weakref.ref(self)

        def tell(_: Any) -> None:
            storages = own()
            if storages is not None:
                storages.freed = True

        self._references = [weakref.ref(x.untyped_storage(), tell) for x in tensors if not devices.is_fake(x)]


Places = Sequence[tuple[weakref.ref[Any], int, tuple[int, ...]] | None]


class Mark(NamedTuple):
    """What shows whether others have written a parameter or its states since a moment. It holds no memory.

    Attributes:
        param: the parameter.
        places: where it and each of its states lies, see :func:`place_of`; None for one that is not there.
        version: their version counters, added up.
    """

    param: weakref.ref[Tensor]
    places: Places
    version: int

    def fits(self, places: Places) -> bool:
        """Whether all of them still are where they were; a state may have come."""
        pairs = zip(self.places, places, strict=True)
        return all(x is None or (y is not None and x[0]() is y[0]() and x[1:] == y[1:]) for x, y in pairs)


def place_of(x: Tensor) -> tuple[weakref.ref[Any], int, tuple[int, ...]] | None:
    """The memory, the address and the strides of a tensor, of a DTensor those of its shard; None if it has no memory."""
    x = local(x)
    return None if devices.is_fake(x) else (weakref.ref(x.untyped_storage()), x.data_ptr(), x.stride())


def version_of(x: Tensor) -> int:
    """Its version counter; with that of its shard, which counts apart, if it is a DTensor."""
    return x._version + (local(x)._version if is_sharded(x) else 0)


class WatchedRows:
    """Which rows others have written between two steps: by version counters, and by memory where the lists were made anew.

    Args:
        held: the tensors, which are there now and whenever a method is called.
        marks: of the lists that these replace. A row without one is taken as it is found by the first :meth:`look`.
    """

    def __init__(self, held: HeldTensors, marks: Sequence[Mark]) -> None:
        self._held = held
        self._params = [weakref.ref(p) for p in held.outer[0]]
        self._places = held.by_row(place_of)
        self._rise: list[int] | None = None  # what an update adds to the counters of each row
        known = {id(p): mark for mark in marks if (p := mark.param()) is not None}
        self._versions: list[int | None] = [None] * len(self._params)
        for r, p in enumerate(held.outer[0]):
            mark = known.get(id(p))
            if mark is not None:
                self._versions[r] = mark.version if mark.fits(self._places[r]) else -1

    def look(self, *, again: bool = False) -> list[int]:
        """The rows that others have written since the last update or look; the next one finds them ``again``, if that is said."""
        now: list[int | None] = [*self._held.row_versions()]
        before = self._versions
        if not again:
            self._versions = now
        if before == now:
            return []
        return [r for r, (x, y) in enumerate(zip(before, now, strict=True)) if x is not None and x != y]

    def updated(self, *, as_before: bool) -> None:
        """Says that an update followed the last look, of the same rows ``as_before``."""
        # Not the counters of now, as `States.after_update` says.
        seen = [x or 0 for x in self._versions]
        if self._rise is None or not as_before:
            self._rise = [y - x for x, y in zip(seen, self._held.row_versions(), strict=True)]
        self._versions = [x + y for x, y in zip(seen, self._rise, strict=True)]

    def marks(self) -> list[Mark]:
        """For the lists that replace these."""
        rows = zip(self._params, self._places, self._versions, strict=True)
        return [Mark(p, places, version) for p, places, version in rows if version is not None]


def written_since(marks: Iterable[Mark], params: Sequence[Tensor], state: Mapping[Any, Any], names: Sequence[str]) -> list[int]:
    """Which of ``params`` others have written since the ``marks`` were set, or their states of these ``names``. Holds nothing."""
    numbers = {id(p): t for t, p in enumerate(params)}
    found = []
    for mark in marks:
        p = mark.param()
        number = None if p is None else numbers.get(id(p))
        if p is None or number is None:
            continue
        own = state.get(p, {})
        tensors = [x if isinstance(x, Tensor) else None for x in (p, *map(own.get, names))]
        places = [None if x is None else place_of(x) for x in tensors]
        if mark.version != sum(version_of(x) for x in tensors if x is not None) or not mark.fits(places):
            found.append(number)
    return found


class FrozenSums:
    """Σp² of parameters that have no state, read again only where a version counter or an address has changed.

    Args:
        params: R parameters; held as weakly as their memory.
        launch: the class of a backend's launches.
        device: of the sums. Parameters without numbers there count as zeros.
        previous: what this one replaces; its sums of the same parameters are kept.
    """

    def __init__(
        self, params: Sequence[Tensor], launch: Callable[..., Any], device: torch.device, previous: FrozenSums | None = None
    ) -> None:
        self._launch, self._device = launch, device
        self._params = [weakref.ref(p) for p in params]
        self._watched = [t for t, p in enumerate(params) if has_numbers(p, device)]
        self._keys: list[tuple[int, int] | None] = [None] * len(params)
        self._sums = torch.zeros(len(params), dtype=torch.float64, device=device)
        known = {} if previous is None or previous._device != device else previous._known()
        rows = [(t, known[id(p)]) for t, p in enumerate(params) if id(p) in known]
        for t, (key, _, _) in rows:
            self._keys[t] = key
        if rows and previous is not None:
            origins = torch.tensor([position for _, (_, position, _) in rows], device=device)
            self._sums[[t for t, _ in rows]] = previous._sums[origins]

    def _known(self) -> dict[int, tuple[tuple[int, int] | None, int, Tensor]]:
        alive = ((position, reference()) for position, reference in enumerate(self._params))
        return {id(p): (self._keys[position], position, p) for position, p in alive if p is not None}

    def forget(self) -> None:
        """Says that somebody may have written what no version counter tells of."""
        self._keys = [None] * len(self._keys)

    def current(self) -> Tensor:
        """[R] float64, of the shards where a parameter is a DTensor."""
        changed = []
        for t in self._watched:
            p = self._params[t]()
            if p is None:
                continue
            shard = local(p)
            fake = devices.is_fake(shard)
            seen = 0 if p.is_inference() else p._version  # inference tensors have no counter
            key = (seen, 0 if fake else shard.data_ptr())
            if key != self._keys[t]:
                self._keys[t] = key
                x = as_real(shard.detach())
                changed.append((t, x if x.dtype in DTYPES else x.float()))
        if changed:
            found = [x for _, x in changed]
            sums = self._launch([None] * len(found), found, written=False).tensor_stats(False, False, False, torch.float64)[:, 2]
            if len(changed) == len(self._keys):
                self._sums = sums.contiguous()
            else:
                self._sums = self._sums.index_copy(0, torch.tensor([t for t, _ in changed], device=self._device), sums)
        return self._sums

    def kept(self) -> list[Tensor]:
        """The tensors on the device that it keeps from step to step."""
        return [self._sums]
