"""The states of an optimizer, the launch that updates them, and what shows that others wrote them.

Of the T parameters R have a *row* here: moments, a step count, a line of the launch table. The others (frozen, or without data yet)
get theirs with their first gradient. Until then no step reads or marks them, and only their norms are known.

Longer than 300 lines: what a step calls here relies on the order of the calls, which is best seen in one class.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, MutableMapping, Sequence
from itertools import compress
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metaadamw_fast.ops import mark_written
from metaadamw_fast.reference import start_of_update

from . import devices
from .allocation import Allocation, has_row
from .counts import StepCounts
from .held import HeldTensors, joined
from .members import Member
from .rule import PARAM, Rule
from .sharding import is_sharded, local_gradient
from .watch import FrozenSums, Mark, WatchedRows, as_real_gradient, version

_local_of = attrgetter("_local_tensor")  # of DTensors; as sharding.local, for thousands of them


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
    real ones. They are there from :meth:`hold`, or from the constructor, to :meth:`let_go`.

    Args:
        rule: of the optimizer.
        members: the T parameters, in the order of ``param_groups``.
        grads: T gradients, None where there is none. A parameter that has one gets a row.
        state: ``optimizer.state``, completed in place.
        param_groups: ``optimizer.param_groups``.
        device: of the rows.
        launch: the class of the backend that holds the lists between two steps.
        counts: float64 [T + 1], the steps of each parameter and, last, of the optimizer; counted in place.
        state_dtype: of the moments that are allocated; None for that of the parameter.
        master_weights: whether bfloat16 and float16 parameters have a float32 copy, ``state[p]["master_param"]``, which is updated.
        frozen_sums, marks: of the lists that these replace.

    Attributes:
        rows: which parameters have one; ``index`` is the same as int64 [R], None if all have.
        held: the tensors.
        captured_ready: whether a step was taken with these lists: everything is compiled and uploaded then, as a capture needs it.
        turns: float64 [T + 1], how often the rule's ``exchanged`` states of each parameter have changed their roles since these
            lists were made: the kernels read from it which is which. None if the rule has none.
        watched: which rows others write; None if the rule does not say that it has to be known.

    Raises:
        ValueError: a parameter that is to get a row and that no backend can update.
        RuntimeError: a state that does not fit its parameter. ``state`` is as it was then, in both cases.
    """

    def __init__(
        self,
        rule: Rule,
        members: Sequence[Member],
        grads: Sequence[Tensor | None],
        state: MutableMapping[Tensor, Any],
        param_groups: Sequence[Mapping[str, Any]],
        device: torch.device,
        launch: Any,
        counts: Tensor,
        *,
        state_dtype: torch.dtype | None = None,
        master_weights: bool = False,
        frozen_sums: FrozenSums | None = None,
        marks: Sequence[Mark] = (),
    ) -> None:
        leaves = [m.param for m in members]
        self._rule = rule
        carried = rule.carried.values()
        # Of `held.outer`: what the carried sums depend on.
        self._summed = [0, *(i for i, name in enumerate(rule.names, 1) if name in carried), -1] if carried else []
        self.device, self.captured_ready = device, False
        self._total = len(leaves)
        self.rows = [t for t, p in enumerate(leaves) if has_row(p, grads[t], state, device, rule)]
        of_rows = [leaves[t] for t in self.rows]
        complete = len(self.rows) == self._total
        self.index = None if complete else torch.tensor(self.rows, dtype=torch.long, device=device)
        wanted = [[s.flag is None or bool(param_groups[members[t].param_group][s.flag]) for s in rule.states] for t in self.rows]
        chosen = [[*column] for column in zip(*wanted, strict=True)] or [[] for _ in rule.states]
        allocation = Allocation(state, device, state_dtype, master_weights)
        try:
            for p, has in zip(of_rows, wanted, strict=True):
                allocation.complete(p, compress(rule.states, has))
            self.held = HeldTensors(rule, members, self.rows, chosen, state, param_groups)
            self.launch: Any = launch([None] * len(self.rows), *self.held.operands(), written=True, rule=rule.name)
        except Exception:
            allocation.undo()
            raise
        always = any(group.get("capturable") for group in param_groups)
        self.counts = StepCounts(counts, self.index, [state[p] for p in of_rows], always=always)
        # Again: the counts may have put tensors of their own there.
        self.held = HeldTensors(rule, members, self.rows, chosen, state, param_groups)
        self.watched = WatchedRows(self.held, marks) if rule.remembers else None
        self.turns = torch.zeros_like(counts) if rule.exchanged else None
        self._turns_known = True  # whether the names in `state` say what `turns` says, as far as Python can know
        ask = weakref.WeakMethod(self.held.operands)  # the launch belongs to these states
        self.launch.let_go(lambda: ask()())  # type: ignore[misc]
        first = [*rule.sums].index(next(iter(rule.carried))) if rule.carried else 0
        self._carried_columns = slice(first, first + len(rule.carried))
        # The carried sums of what the last update left.
        self._sums = torch.zeros(len(self.rows), len(rule.carried), dtype=torch.float64, device=device)
        self._sums_of: int | None = None  # the `_version` that they are right for; None if they are not
        self._copies_seen: list[int] | None = None  # versions of the parameters with a master when these were brought up to date
        self._present = self._present_without([])
        self._rise: int | None = None  # by how much an update of these rows raises `_version`; None until one has
        self._seen = self._version()  # what the step under way has found
        rest = sorted(set(range(self._total)) - set(self.rows))
        of_params = [[*rule.sums].index(name) for name, operand in rule.carried.items() if operand == PARAM]
        self._norm_column = of_params[0] if of_params else None  # Σp²
        watched = bool(rest) and self._norm_column is not None
        self.frozen_sums = FrozenSums([leaves[t] for t in rest], launch, device, frozen_sums) if watched else None
        self._rest = torch.tensor(rest, dtype=torch.long, device=device) if rest else None
        # [T, S] for the rows' sums to be put into, and the sums of frozen parameters that it was made of.
        self._around: Tensor | None = None
        self._around_of: Tensor | None = None

    def hold(self, state: Mapping[Any, Any], param_groups: Sequence[Mapping[str, Any]]) -> bool:
        """As :meth:`HeldTensors.hold`."""
        return self.held.hold(state, param_groups)

    def let_go(self) -> None:
        """As :meth:`HeldTensors.let_go`; also of gradients."""
        self._real_gradients: Sequence[Tensor | None] = ()
        self.held.let_go()

    # ----------------------------------------------------------------------------------------- rows and all T parameters

    def whole(self, sums: Tensor) -> Tensor:
        """[T, S] of all parameters from [R, S] of the rows: of the others Σp² is known, all else is 0."""
        if self._rest is None:
            return sums
        frozen = None if self.frozen_sums is None else self.frozen_sums.current()  # another tensor where a number has changed
        around = self._around
        if frozen is not self._around_of or around is None or (around.dtype, around.shape[1]) != (sums.dtype, sums.shape[1]):
            around = sums.new_zeros(self._total, sums.shape[1])
            if frozen is not None and self._norm_column is not None:
                around[:, self._norm_column].index_copy_(0, self._rest, frozen.to(sums.dtype))
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
        """[R, C] float64, the carried sums as the last update left them; None if a tensor of theirs has been written since."""
        return self._sums if self._sums_of == self._seen and self._rule.carried else None

    def written(self) -> list[int]:
        """Which of the T parameters others have written, or whose states, since the last update, if the rule has to know that."""
        return [] if self.watched is None else [self.rows[r] for r in self.watched.look()]

    def measure(self, dtype: torch.dtype, *, wanted: int, reuse: bool, vectors: Tensor | None = None) -> Tensor:
        """The sums [R, S] of the gradients and the states that ``wanted`` has a bit for.

        What the last update summed is not read again, if ``reuse``. ``vectors`` [H, T], if the rule's sums need them, are of the
        last update.
        """
        left = (1 << self._carried_columns.stop) - (1 << self._carried_columns.start)
        carried = self.carried() if reuse and wanted & left else None
        of_rows = None if vectors is None else self.of_rows(vectors).contiguous()
        sums: Tensor = self.launch.measure(wanted if carried is None else wanted & ~left, dtype, carried, of_rows)
        return sums

    def update(self, vectors: Tensor, sums: Tensor | None, should_step: Tensor | bool, seed: int | None) -> None:
        """The update with ``vectors`` [V, T]; rows that it leaves alone keep the carried columns of ``sums`` [R, S].

        No sums are carried over if ``sums`` is None.
        """
        new_sums = None if sums is None or not self._rule.carried else self._new_sums(sums, should_step)
        self.launch.update_(self.of_rows(vectors), new_sums, seed)
        self.after_update(should_step)

    def update_and_measure(self, vectors: Tensor, columns: int, should_step: Tensor | bool, seed: int | None) -> Tensor:
        """The update with ``vectors`` [V, T]; returns the first sums [R, S] of what it found, also in rows that it left alone."""
        sums = torch.empty(len(self.rows), columns, dtype=torch.float64, device=self.device)
        self.launch.update_(self.of_rows(vectors), sums, seed)
        self.after_update(should_step)
        self.forget_sums()  # of what it left there are none
        return sums

    def _new_sums(self, sums: Tensor, should_step: Tensor | bool) -> Tensor:
        """Where the update writes the carried sums; rows that it leaves alone keep those of ``sums`` [R, S]."""
        if (self._present.absent or should_step is not True) and self.carried() is None:
            self._sums.copy_(sums[:, self._carried_columns])
        return self._sums

    def forget_sums(self) -> None:
        """Says that the sums which the last update left are not to be used."""
        self._sums_of = None

    def invalidate(self) -> None:
        """Says that somebody wrote what no version counter tells of."""
        self._sums_of = self._copies_seen = None
        if self.frozen_sums is not None:
            self.frozen_sums.forget()

    def _version(self) -> int:
        """The version counters of all that the carried sums depend on, added up."""
        summed = [self.held.outer[i] for i in self._summed]
        versions = version(joined(summed))
        if self.held.sharded:  # a write through a DTensor or through its shard changes the version of that one only
            versions += sum(version(map(_local_of, filter(is_sharded, xs))) for xs in summed)
        return versions

    # ------------------------------------------------------------------------------------------------------------- the steps

    def kept(self) -> list[Tensor]:
        """The tensors on the device that it keeps from step to step, besides parameters and states."""
        own = [self._present.counts, self.index, self._rest, self._sums, self._around, self.turns]
        kept = [*self.counts.kept(), *(x for x in own if isinstance(x, Tensor))]
        return [*kept, *self.launch.kept(), *([] if self.frozen_sums is None else self.frozen_sums.kept())]

    @property
    def present(self) -> Tensor | None:
        """Float64 [T], 1 for parameters that have a gradient, else 0; None if all have."""
        counts = self._present.counts
        return counts[:-1] if isinstance(counts, Tensor) else None

    def gradients(self) -> list[Tensor | None]:
        """``.grad`` of the T parameters as it is now, of a DTensor this rank's shard."""
        return [local_gradient(p) for p in self.held.leaves] if self.held.sharded else [p.grad for p in self.held.leaves]

    def lacks(self, grads: Sequence[Tensor | None]) -> bool:
        """Whether a parameter has a gradient and no row."""
        return len(self.rows) < self._total and sum(g is not None for g in grads) > sum(grads[t] is not None for t in self.rows)

    def set_gradients(self, grads: Sequence[Tensor | None]) -> None:
        """The gradients of this step, T, None where there is none.

        Raises:
            RuntimeError: a sparse gradient, or one of another shape or device. Nothing has changed then.
        """
        of_rows = grads if self.index is None else [grads[t] for t in self.rows]
        if self.held.complex:
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
        rows = self._present.chosen
        if rows is None:
            whole = joined(self.held.outer)
        else:
            params, *others = self.held.outer
            whole = [*compress(params, rows)]
            for xs, has in zip(others, self.held.chosen, strict=True):
                whole += compress(xs, compress(rows, has))
        return [*whole, *map(_local_of, filter(is_sharded, whole))] if self.held.sharded else whole

    def count(self, should_step: Tensor | bool = True) -> None:
        """Counts the step of the optimizer and of the rows that have a gradient; nothing if ``should_step`` is False."""
        counts = self._present.counts
        increment = counts if should_step is True else counts * should_step
        self.counts.add(increment)
        if self.turns is not None:
            self.turns += increment

    def after_update(self, should_step: Tensor | bool = True) -> None:
        """Counts the step and marks what was written; counts nothing if ``should_step`` is False."""
        self.count(should_step)
        if self.turns is not None:
            # Only here does Python know which roles have changed: not where the device decides it, nor at a graph's replays.
            if should_step is True and self._turns_known and not devices.capturing(self.device):
                self.held.exchange(self._present.chosen)
            elif should_step is not False:
                self._turns_known = False
        before = self._version() if self._rise is None else 0
        mark_written(self._written())
        if self.held.masters:
            self._copies_seen = self._copy_versions()
        if self.watched is not None:
            self.watched.updated(as_before=self._rise is not None)
        if self._rise is None:
            self._rise = self._version() - before
        # Not the version of now: a user's thread may have written since the step looked, and then the next one reads everything.
        self._sums_of = self._seen + self._rise

    def settle_names(self, state: Mapping[Any, Any], params: Sequence[Tensor]) -> None:
        """Names the ``exchanged`` states in ``state`` as they are now; waits for the device where only that knows.

        ``params`` are the R parameters of the rows.
        """
        if self.turns is None or self._turns_known:
            return
        turns = self.turns[:-1] if self.index is None else self.turns[:-1].index_select(0, self.index)
        self.held.name_by([bool(turn % 2) for turn in turns.tolist()], [state.get(p, {}) for p in params])

    def sync_masters(self) -> None:
        """Brings the float32 masters up to date with parameters that others have written: they are the model, what they say counts.

        A master stays what it is where its parameter still is its rounding, so that nothing is lost where nothing was written. The
        update itself decides the same for each element. It is done before, where a version counter tells of a write, for the sake
        of the statistics, which are the masters'.
        """
        if not self.held.masters:
            return
        versions = self._copy_versions()
        seen = self._copies_seen or [-1] * len(versions)
        for p, master, now, then in zip(self.held.copies(), self.held.masters, versions, seen, strict=True):
            if now != then:
                master.copy_(start_of_update(master, p))
        if versions != seen:
            self._copies_seen, self._seen = versions, self._version()
            if self.watched is not None:
                self.watched.look()

    def _copy_versions(self) -> list[int]:
        outer = list(compress(self.held.outer[0], self.held.chosen[-1]))
        return [p._version + (x._version if x is not p else 0) for p, x in zip(outer, self.held.copies(), strict=True)]
