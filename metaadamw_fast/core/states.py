"""The states of an optimizer as the lists that the ops take, kept from step to step, and what shows that others wrote them.

Of the T parameters R have a *row* here: moments, a step count, a line of the launch table. The others (frozen, or without data yet)
get theirs with their first gradient. Until then no step reads or marks them, and only their norms are known.

Between two steps nothing here holds a parameter or a state. Memory that others replace, by offloading for example, is free at once.
What is kept are the addresses of the objects and of their data, and weak references that tell when memory is freed.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from itertools import chain, compress
from operator import attrgetter, itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from metaadamw_fast.checks import DTYPES
from metaadamw_fast.grouping import Member
from metaadamw_fast.launch import Operands
from metaadamw_fast.ops import addresses_of, expected_objects, listed_objects, mark_written
from metaadamw_fast.reference import start_of_update

from . import devices
from .counts import StepCounts
from .sharding import is_sharded, local, local_gradient
from .watch import FrozenSums, Storages, as_real, as_real_gradient, is_wrapper, version

MASTER = "master_param"
_LOW_PRECISION = (torch.bfloat16, torch.float16)
_COMPLEX = {torch.float32: torch.complex64, torch.float64: torch.complex128}
_local_of = attrgetter("_local_tensor")  # of DTensors; as sharding.local, for thousands of them


def reason_against(p: Tensor, device: torch.device) -> str | None:
    """Why no backend on ``device`` can update ``p``; None if one can."""
    if is_lazy(p):
        return "MetaAdamW cannot update a parameter that is not initialized: run the model once before"
    if is_wrapper(p):
        return f"MetaAdamW cannot update a {type(p).__name__}: it is a subclass that is no plain memory"
    real = p.dtype.to_real() if p.is_complex() else p.dtype
    if real not in DTYPES or p.layout is not torch.strided:
        return f"MetaAdamW needs dense floating-point parameters, got {p.dtype}, {p.layout}"
    if p.numel() and any(stride == 0 and size > 1 for stride, size in zip(p.stride(), p.shape, strict=True)):
        return "MetaAdamW cannot update an expanded parameter: its elements share memory"
    if p.device != device:
        return f"MetaAdamW needs all parameters on one device, got {', '.join(sorted((str(device), str(p.device))))}"
    return None


def _picker(positions: Sequence[int]) -> Callable[[Sequence[Any]], Sequence[Any]]:
    """A function that takes these elements of a sequence."""
    if len(positions) > 1:
        return itemgetter(*positions)
    return lambda xs: [xs[i] for i in positions]


class _Places(NamedTuple):
    """Where each list stands among the objects that param groups and states list, by a :func:`_picker`."""

    leaves: Any  # T
    params: Any  # R, as all that follow
    exp_avgs: Any
    exp_avg_sqs: Any
    max_exp_avg_sqs: Any  # of the rows that have one
    masters: Any  # likewise


class _Present(NamedTuple):
    """The rows that have a gradient.

    Attributes:
        absent: the other rows.
        counts: [T + 1], 1 for each of them and for the optimizer's own count; just 1 if these are all T parameters.
        chosen: R bools; None if no row is absent.
    """

    absent: list[int]
    counts: Tensor | int
    chosen: list[bool] | None


class States:
    """Allocates the states that are missing, lists them all and hands them to the backend.

    Of a DTensor the lists have this rank's shard; its states are DTensors of the same placements. Complex tensors are listed as
    real ones. The lists are there from :meth:`take_up`, or from the constructor, to :meth:`let_go`.

    Args:
        members: the T parameters, in the order of ``param_groups``.
        grads: T gradients, None where there is none. A parameter that has one gets a row.
        state: ``optimizer.state``, completed in place.
        param_groups: ``optimizer.param_groups``.
        device: of the rows.
        launch: the class of the backend that holds the lists between two steps.
        counts: float64 [T + 1], the steps of each parameter and, last, of the optimizer; counted in place.
        early: whether every parameter that requires a gradient, and has data, gets its row now.
        state_dtype: of the moments that are allocated; None for that of the parameter.
        master_weights: whether bfloat16 and float16 parameters have a float32 copy, ``state[p]["master_param"]``, which is updated.
        frozen_sums: of the lists that these replace.

    Attributes:
        rows: which parameters have one; ``index`` is the same as int64 [R], None if all have.
        warm: whether a step was taken with these lists: everything is compiled and uploaded then.

    Raises:
        ValueError: a parameter that is to get a row and that no backend can update.
        RuntimeError: a state that does not fit its parameter. ``state`` is as it was then, in both cases.
    """

    def __init__(
        self,
        members: Sequence[Member],
        grads: Sequence[Tensor | None],
        state: MutableMapping[Tensor, Any],
        param_groups: Sequence[Mapping[str, Any]],
        device: torch.device,
        launch: Any,
        counts: Tensor,
        *,
        early: bool,
        state_dtype: torch.dtype | None = None,
        master_weights: bool = False,
        frozen_sums: FrozenSums | None = None,
    ) -> None:
        leaves = [m.param for m in members]
        self.device, self.warm = device, False
        self._total = len(leaves)
        self.rows = [t for t, p in enumerate(leaves) if _has_row(p, grads[t], state, device, early)]
        of_rows = [leaves[t] for t in self.rows]
        complete = len(self.rows) == self._total
        self.index = None if complete else torch.tensor(self.rows, dtype=torch.long, device=device)
        with_maximum = [bool(param_groups[members[t].param_group]["amsgrad"]) for t in self.rows]
        added: list[tuple[Tensor, str | None]] = []
        try:
            for p, wanted in zip(of_rows, with_maximum, strict=True):
                _complete(p, state, device, wanted, state_dtype, master_weights and p.dtype in _LOW_PRECISION, added)
            self._locate(of_rows, with_maximum, state, param_groups)
            self.launch: Any = launch([None] * len(self.rows), *self._operands(), written=True)
        except Exception:
            for p, name in reversed(added):
                if name is None:
                    state.pop(p, None)
                else:
                    state[p].pop(name, None)
            raise
        always = any(group.get("capturable") for group in param_groups)
        self.counts = StepCounts(counts, self.index, [state[p] for p in of_rows], always=always)
        self._locate(of_rows, with_maximum, state, param_groups)  # again: the counts may have put tensors of their own there
        ask = weakref.WeakMethod(self._operands)  # the launch belongs to these lists
        self.launch.let_go(lambda: ask()())  # type: ignore[misc]
        self._places_of_data = self._where()
        self._storages = Storages(self._tensors())
        self._sums = torch.zeros(len(self.rows), 2, dtype=torch.float64, device=device)  # Σp², Σv² of what the last update left
        self._sums_of: int | None = None  # the `_version` that they are right for; None if they are not
        self._copies_seen: list[int] | None = None  # versions of the parameters with a master when these were brought up to date
        self._present = self._present_without([])
        self._rise: int | None = None  # by how much an update of these rows raises `_version`; None until one has
        self._seen = self._version()  # what the step under way has found
        rest = sorted(set(range(self._total)) - set(self.rows))
        self.frozen_sums = FrozenSums([leaves[t] for t in rest], launch, device, frozen_sums) if rest else None
        self._rest = torch.tensor(rest, dtype=torch.long, device=device) if rest else None
        # [T, S] for the rows' sums to be put into, and the sums of frozen parameters that it was made of.
        self._around: Tensor | None = None
        self._around_of: Tensor | None = None

    # -------------------------------------------------------------------------------------------- the tensors, during a step

    def _locate(
        self,
        params: Sequence[Tensor],
        with_maximum: Sequence[bool],
        state: Mapping[Any, Any],
        param_groups: Sequence[Mapping[str, Any]],
    ) -> None:
        """Writes down where each tensor is listed, and takes them all up."""
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
        self._with_maximum = list(with_maximum)
        self._with_master = [(id(p), MASTER) in at for p in params]
        self._places = _Places(
            _picker(range(self._total)),
            _picker([places[id(p)] for p in params]),
            _picker([at[id(p), "exp_avg"] for p in params]),
            _picker([at[id(p), "exp_avg_sq"] for p in params]),
            _picker([at[id(p), "max_exp_avg_sq"] for p in compress(params, self._with_maximum)]),
            _picker([at[id(p), MASTER] for p in compress(params, self._with_master)]),
        )
        containers = _containers(state, param_groups)
        found = listed_objects(containers)
        self._addresses = addresses_of(found)
        self._owners = (id(state), id(param_groups))
        self._outlined = _outline(param_groups)
        self._sharded = any(isinstance(x, Tensor) and is_sharded(x) for x in found)
        self._complex = any(p.is_complex() for p in params)
        self._hold(found)

    def _hold(self, found: list[Any]) -> None:
        places = self._places
        self.leaves: Sequence[Tensor] = places.leaves(found)
        self._outer = [places.params(found), places.exp_avgs(found), places.exp_avg_sqs(found)]
        self._outer += [places.max_exp_avg_sqs(found), places.masters(found)]
        lists = [self._plain(xs) for xs in self._outer]
        self.params, self._exp_avgs, self._exp_avg_sqs, self._maxima, self._masters = lists

    def _plain(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """Their shards, as real tensors."""
        if self._sharded:
            tensors = [local(x) for x in tensors]
        return [as_real(x.detach()) if x.is_complex() else x for x in tensors] if self._complex else tensors

    def let_go(self) -> None:
        """Holds the tensors no longer; :meth:`take_up` brings them back."""
        self._real_gradients: Sequence[Tensor | None] = ()
        self.leaves = self.params = self._exp_avgs = self._exp_avg_sqs = self._maxima = self._masters = ()
        self._outer = [()] * 5

    def take_up(self, state: Mapping[Any, Any], param_groups: Sequence[Mapping[str, Any]]) -> bool:
        """Takes up the tensors, unless one has been replaced, or the data of one (``p.data = x``, ``model.to``), or amsgrad.

        ``state`` and ``param_groups`` are the optimizer's of now, which may be others, too. The lists serve no more if False is
        returned.
        """
        if (id(state), id(param_groups)) != self._owners or self._storages.freed or _outline(param_groups) != self._outlined:
            return False
        found = expected_objects(_containers(state, param_groups), self._addresses)
        if found is None:
            return False
        self._hold(found)
        if self._where() == self._places_of_data:
            return True
        self.let_go()
        return False

    def _tensors(self) -> list[Tensor]:
        """All tensors that an update of all rows writes."""
        return [*self.params, *self._exp_avgs, *self._exp_avg_sqs, *self._maxima, *self._masters]

    def _where(self) -> tuple[list[int], list[tuple[int, ...]]]:
        # Strides of the parameters only: `p.data = p.data.t()` happens, and the addresses stay. Nobody transposes a state in place.
        if self.params and devices.is_fake(self.params[0]):
            return [], []  # no memory
        return [*map(Tensor.data_ptr, self._tensors())], [*map(Tensor.stride, self.params)]

    def _spread_over_rows(self, tensors: Sequence[Tensor], chosen: Sequence[bool]) -> list[Tensor] | None:
        """R entries, without elements where a row is not ``chosen``; None if none is."""
        if not tensors:
            return None
        rest, absent = iter(tensors), tensors[0].new_empty(0)
        return [next(rest) if here else absent for here in chosen]

    def _updated(self) -> list[Tensor]:
        """What the kernels update as the parameter of each row: its master, or itself."""
        rest = iter(self._masters)
        return [next(rest) if here else p for p, here in zip(self.params, self._with_master, strict=True)]

    def _operands(self) -> Operands:
        maxima = self._spread_over_rows(self._maxima, self._with_maximum)
        copies = self._spread_over_rows(self.copies(), self._with_master)
        return Operands([*self._exp_avgs], self._updated(), [*self._exp_avg_sqs], maxima, copies)

    def copies(self) -> list[Tensor]:
        """The low-precision parameters that have a master."""
        return list(compress(self.params, self._with_master))

    def moments(self) -> tuple[list[Tensor], list[Tensor], list[Tensor] | None]:
        """R first moments, second moments and, with amsgrad, running maxima (without elements where a row has none)."""
        maxima = self._spread_over_rows(self._maxima, self._with_maximum)
        return [*self._exp_avgs], [*self._exp_avg_sqs], maxima

    # ----------------------------------------------------------------------------------------- rows and all T parameters

    def whole(self, sums: Tensor) -> Tensor:
        """[T, S] of all parameters from [R, S] of the rows: of the others Σp² is known, all else is 0."""
        if self._rest is None or self.frozen_sums is None:
            return sums
        frozen = self.frozen_sums.current()  # another tensor where a number of it has changed
        around = self._around
        if frozen is not self._around_of or around is None or (around.dtype, around.shape[1]) != (sums.dtype, sums.shape[1]):
            around = sums.new_zeros(self._total, sums.shape[1])
            around[:, 3].index_copy_(0, self._rest, frozen.to(sums.dtype))
            self._around, self._around_of = around, frozen
        return around if self.index is None else around.index_copy(0, self.index, sums)

    def of_rows(self, vectors: Tensor) -> Tensor:
        """[V, R] of the rows from [V, T] of all parameters."""
        return vectors if self.index is None else vectors.index_select(1, self.index)

    def spread(self, of_rows: Sequence[Any]) -> list[Any]:
        """T entries from R: None for parameters without a row."""
        out: list[Any] = [None] * self._total
        for t, x in zip(self.rows, of_rows, strict=True):
            out[t] = x
        return out

    # ---------------------------------------------------------------------------------------------- what others have written

    def carried(self) -> Tensor | None:
        """[R, 2] float64 Σp², Σv² as the last update left them, or None if an in-place operation has written one since."""
        return self._sums if self._sums_of == self._seen else None

    def new_sums(self, sums: Tensor, go: Tensor | bool = True) -> Tensor:
        """Where the update writes Σp², Σv², [R, 2] float64; rows that it leaves alone keep those of ``sums`` [R, S]."""
        if (self._present.absent or go is not True) and self.carried() is None:
            self._sums.copy_(sums[:, 3:5])
        return self._sums

    def exchange_sums(self, new: Tensor) -> Tensor:
        """Puts other sums in the place of :meth:`new_sums`; returns a copy of what was there, [R, 2]."""
        old = self._sums.clone()
        self._sums.copy_(new)
        return old

    def forget_sums(self) -> None:
        """Says that the sums which the last update left are not to be used."""
        self._sums_of = None

    def invalidate(self) -> None:
        """Says that somebody wrote what no version counter tells of."""
        self._sums_of = self._copies_seen = None
        if self.frozen_sums is not None:
            self.frozen_sums.forget()

    def _version(self) -> int:
        """The version counters of all that Σp² and Σv² depend on, added up."""
        params, _, exp_avg_sqs, _, masters = self._outer
        both = version(params) + version(exp_avg_sqs) + version(masters)
        if self._sharded:  # a write through a DTensor or through its shard changes the version of that one only
            both += sum(version(map(_local_of, filter(is_sharded, xs))) for xs in (params, exp_avg_sqs, masters))
        return both

    # ------------------------------------------------------------------------------------------------------------- the steps

    def kept(self) -> list[Tensor]:
        """The tensors on the device that it keeps from step to step, besides parameters and states."""
        own = [self._present.counts, self.index, self._rest, self._sums, self._around]
        kept = [*self.counts.kept(), *(x for x in own if isinstance(x, Tensor))]
        return [*kept, *self.launch.kept(), *([] if self.frozen_sums is None else self.frozen_sums.kept())]

    @property
    def complete(self) -> bool:
        """Whether every row has a gradient."""
        return not self._present.absent

    def gradients(self) -> list[Tensor | None]:
        """``.grad`` of the T parameters as it is now, of a DTensor this rank's shard."""
        return [local_gradient(p) for p in self.leaves] if self._sharded else [p.grad for p in self.leaves]

    def lacks(self, grads: Sequence[Tensor | None]) -> bool:
        """Whether a parameter has a gradient and no row."""
        return len(self.rows) < self._total and sum(g is not None for g in grads) > sum(grads[t] is not None for t in self.rows)

    def set_gradients(self, grads: Sequence[Tensor | None]) -> None:
        """The gradients of this step, T, None where there is none.

        Raises:
            RuntimeError: a sparse gradient, or one of another shape or device. Nothing has changed then.
        """
        of_rows = grads if self.index is None else [grads[t] for t in self.rows]
        if self._complex:
            # A launch knows addresses only, and what resolves a conjugated view is nobody else's.
            self._real_gradients = of_rows = [None if g is None else as_real_gradient(g) for g in of_rows]
        self.launch.set_gradients(of_rows)
        absent = [r for r, g in enumerate(of_rows) if g is None]
        if absent != self._present.absent:
            self._present, self._rise = self._present_without(absent), None
        self._seen = self._version()

    def _present_without(self, absent: list[int]) -> _Present:
        counts: Tensor | int = 1
        missing = set(absent)
        chosen = [r not in missing for r in range(len(self.rows))]
        if absent or self.index is not None:
            numbers = [0.0] * self._total + [1.0]
            for t in compress(self.rows, chosen):
                numbers[t] = 1.0
            counts = devices.upload([numbers], torch.float64, self.device)[0]
        return _Present(absent, counts, chosen if absent else None)

    def _written(self) -> list[Tensor]:
        """What an update has just written. The kernels write the shard of a DTensor: both have a version counter."""
        params, exp_avgs, exp_avg_sqs, maxima, masters = self._outer
        rows = self._present.chosen
        if rows is None:
            whole = [*params, *exp_avgs, *exp_avg_sqs, *maxima, *masters]
        else:
            whole = [*compress(params, rows), *compress(exp_avgs, rows), *compress(exp_avg_sqs, rows)]
            whole += compress(maxima, compress(rows, self._with_maximum))
            whole += compress(masters, compress(rows, self._with_master))
        return [*whole, *map(_local_of, filter(is_sharded, whole))] if self._sharded else whole

    def count(self, go: Tensor | bool = True) -> None:
        """Counts the step of the optimizer and of the rows that have a gradient; nothing if ``go`` is False."""
        counts = self._present.counts
        self.counts.add(counts if go is True else counts * go)

    def after_update(self, go: Tensor | bool = True) -> None:
        """Counts the step and marks what was written; counts nothing if ``go`` is False."""
        self.count(go)
        before = self._version() if self._rise is None else 0
        mark_written(self._written())
        if self._masters:
            self._copies_seen = self._copy_versions()
        if self._rise is None:
            self._rise = self._version() - before
        # Not the version of now: a user's thread may have written since the step looked, and then the next one reads everything.
        self._sums_of = self._seen + self._rise

    def take_up_copies(self) -> None:
        """Brings the float32 masters up to date with parameters that others have written: they are the model, what they say counts.

        A master stays what it is where its parameter still is its rounding, so that nothing is lost where nothing was written. The
        update itself decides the same for each element. It is done before, where a version counter tells of a write, for the sake
        of the statistics, which are the masters'.
        """
        if not self._masters:
            return
        versions = self._copy_versions()
        seen = self._copies_seen or [-1] * len(versions)
        for p, master, now, then in zip(self.copies(), self._masters, versions, seen, strict=True):
            if now != then:
                master.copy_(start_of_update(master, p))
        if versions != seen:
            self._copies_seen, self._seen = versions, self._version()

    def _copy_versions(self) -> list[int]:
        outer = list(compress(self._outer[0], self._with_master))
        return [p._version + (x._version if x is not p else 0) for p, x in zip(outer, self.copies(), strict=True)]


def _has_row(p: Tensor, grad: Tensor | None, state: Mapping[Tensor, Any], device: torch.device, early: bool) -> bool:
    """Whether a parameter has a state, or is to get one now.

    Raises:
        ValueError: it is to get one, and no backend can update it.
    """
    if "exp_avg" in state.get(p, ()):
        return True
    if grad is None:
        return early and p.requires_grad and not p.is_meta and reason_against(p, device) is None
    reason = reason_against(p, device)
    if reason is not None:
        raise ValueError(reason)
    return True


def _complete(
    p: Tensor,
    state: MutableMapping[Tensor, Any],
    device: torch.device,
    with_maximum: bool,
    state_dtype: torch.dtype | None,
    with_master: bool,
    added: list[tuple[Tensor, str | None]],
) -> None:
    """Gives a parameter the entries of its state that are missing, and notes in ``added`` which (None: the state itself)."""
    if p not in state:
        added.append((p, None))
    own = state.setdefault(p, {})
    dtype = _COMPLEX.get(state_dtype, p.dtype) if p.is_complex() and state_dtype is not None else state_dtype
    for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")[: 3 if with_maximum else 2]:
        if name not in own:
            added.append((p, name))
            own[name] = torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format)
        elif own[name].device != device:
            own[name] = own[name].to(device)
    if with_master:
        if MASTER not in own:
            added.append((p, MASTER))
            own[MASTER] = p.detach().to(torch.float32, copy=True, memory_format=torch.preserve_format)
        elif own[MASTER].device != device:
            own[MASTER] = own[MASTER].to(device)
    if "step" not in own:
        added.append((p, "step"))
        own["step"] = torch.zeros((), dtype=torch.float32, device=device)


def _containers(state: Mapping[Any, Any], param_groups: Sequence[Mapping[str, Any]]) -> list[Any]:
    """The parameters as the param groups list them, then all that ``optimizer.state`` holds."""
    params = [x if type(x := group["params"]) is list else list(x) for group in param_groups]
    return [*params, *state.values()]


def _outline(param_groups: Sequence[Mapping[str, Any]]) -> list[tuple[bool, int, Any]]:
    return [(group["amsgrad"], len(group["params"]), group.get("capturable")) for group in param_groups]
