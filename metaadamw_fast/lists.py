"""The states of an optimizer as the lists that the ops take, cached from step to step, and what shows that others wrote them."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from itertools import chain
from operator import attrgetter, is_
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import sync
from .grouping import Member
from .ops import addresses_of, expected_objects, listed_objects, mark_written
from .sharding import is_sharded, local, local_gradient

MASTER = "master_param"
_local_of = attrgetter("_local_tensor")  # of DTensors; as sharding.local, for thousands of them
_version_of = attrgetter("_version")


class _Rows(NamedTuple):
    """The rows that have a gradient, and all that an update of them writes.

    Attributes:
        absent: the other rows.
        counts: [T + 1], 1 for each of them and, behind all rows, for the optimizer's own count; just 1 if no row is absent.
        written: parameters or their masters, and moments; of a DTensor the shard, which the kernels write, and the DTensor.
        copies, masters: parameters with a master, and the masters.
    """

    absent: list[int]
    counts: Tensor | int
    written: list[Tensor]
    copies: list[Tensor]
    masters: list[Tensor]


class StateLists:
    """Allocates the states that are missing, lists them all and hands them to the backend.

    Of a DTensor all lists but ``leaves`` have this rank's shard; its states are DTensors of the same placements.

    Args:
        members: the T parameters.
        state: ``optimizer.state``, completed in place. Every ``state[p]["step"]`` becomes a view of one [T] tensor, so that one
            operation counts all of them and checkpoints still see torch's 0-dim steps.
        param_groups: ``optimizer.param_groups``.
        device: of the parameters. The steps live there too: nothing is copied to or from the host in a step.
        launch: the class of the backend that holds the lists between two steps.
        done: 0-dim, the steps that the optimizer has taken; copied. The lists then count them as ``self.done``.
        state_dtype: of the moments that are allocated; None for that of the parameter.
        master_weights: whether bfloat16 and float16 parameters have a float32 copy, ``state[p]["master_param"]``, which is updated.

    Raises:
        RuntimeError: a state that does not fit its parameter.
    """

    def __init__(
        self,
        members: Sequence[Member],
        state: MutableMapping[Tensor, Any],
        param_groups: Sequence[Mapping[str, Any]],
        device: torch.device,
        launch: Any,
        done: Tensor,
        *,
        state_dtype: torch.dtype | None = None,
        master_weights: bool = False,
    ) -> None:
        self.leaves = [m.param for m in members]  # what autograd knows
        self.params = [local(p) for p in self.leaves]
        self.device = device
        # The optimizer's own count stands behind those of the parameters: one operation counts all.
        self._counts = _stacked([*(state[p].get("step", 0.0) for p in self.leaves), done], torch.float32, device)
        self.steps, self.done = self._counts[:-1], self._counts[-1]
        self.warm = False  # whether a step was taken with these lists: everything is compiled and uploaded then
        with_maximum = [bool(param_groups[m.param_group]["amsgrad"]) for m in members]
        for p, wanted, step in zip(self.leaves, with_maximum, self.steps.unbind(), strict=True):
            for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")[: 3 if wanted else 2]:
                if name not in state[p]:
                    state[p][name] = torch.zeros_like(p, dtype=state_dtype, memory_format=torch.preserve_format)
                state[p][name] = state[p][name].to(device)
            if master_weights and p.dtype in (torch.bfloat16, torch.float16):
                if MASTER not in state[p]:
                    state[p][MASTER] = p.detach().to(torch.float32, copy=True, memory_format=torch.preserve_format)
                state[p][MASTER] = state[p][MASTER].to(device)
            state[p]["step"] = step
        states = [state[p] for p in self.leaves]
        self.exp_avgs = [local(s["exp_avg"]) for s in states]
        self.exp_avg_sqs = [local(s["exp_avg_sq"]) for s in states]
        maxima = [local(s["max_exp_avg_sq"]) if wanted else None for s, wanted in zip(states, with_maximum, strict=True)]
        self.max_exp_avg_sqs = maxima if any(x is not None for x in maxima) else None
        self.updated = [local(s[MASTER]) if MASTER in s else p for s, p in zip(states, self.params, strict=True)]
        self._copies = [t for t, (p, x) in enumerate(zip(self.params, self.updated, strict=True)) if x is not p]
        self._copies_seen: list[int] | None = None  # their versions when the masters were last brought up to date
        self.launch = launch(
            [None] * len(states), self.exp_avgs, self.updated, self.exp_avg_sqs, self.max_exp_avg_sqs, written=True
        )
        self._state, self._param_groups = state, param_groups
        self._found = listed_objects(self._containers())
        self._addresses = addresses_of(self._found)
        self._outlined = self._outline()
        # DTensors with their shards: a write through the one or the other changes the version of that one only.
        self._outer = [x for x in self._found if isinstance(x, Tensor) and is_sharded(x)]
        self._shards = list(map(_local_of, self._outer))
        copies = [self.params[t] for t in self._copies]
        self._tensors = [*self.updated, *self.exp_avgs, *self.exp_avg_sqs, *(x for x in maxima if x is not None), *copies]
        self._written = [_written(*row) for row in zip(self.leaves, states, with_maximum, strict=True)]
        # Held, so that no other storage can come to lie at one of these addresses: a new address is then the sign of new data.
        self._storages = [x.untyped_storage() for x in self._tensors]
        self._places = self._where()
        self._sums = torch.zeros(len(states), 2, dtype=torch.float64, device=device)  # Σp², Σv² of what the last update left
        self._summed = self.updated + self.exp_avg_sqs + copies + self._outer
        self._sums_of: int | None = None  # the `_version` that they are right for; None if they are not
        self._rows = self._rows_without([])
        self._rise: int | None = None  # by how much an update of these rows raises `_version`; None until one has
        self._seen = self._version()  # what the step under way has found

    # ------------------------------------------------------------------------------------------------ what others have written

    def stale(self, state: Mapping[Tensor, Any], param_groups: Sequence[Mapping[str, Any]]) -> bool:
        """Whether a parameter or a state has been replaced, or the data of one (``p.data = x``, ``model.to``), or amsgrad.

        ``state`` and ``param_groups`` are the optimizer's of now, which may be others, too.
        """
        return (
            state is not self._state
            or param_groups is not self._param_groups
            or expected_objects(self._containers(), self._addresses) is None
            or self._outline() != self._outlined
            or self._where() != self._places
            or not all(map(is_, map(_local_of, self._outer), self._shards))
        )

    def _containers(self) -> list[Any]:
        """The parameters as the param groups list them, then all that ``optimizer.state`` holds."""
        params = [x if type(x := group["params"]) is list else list(x) for group in self._param_groups]
        return [*params, *self._state.values()]

    def _outline(self) -> list[tuple[bool, int]]:
        return [(group["amsgrad"], len(group["params"])) for group in self._param_groups]

    def _where(self) -> tuple[list[int], list[tuple[int, ...]]]:
        # Strides of the parameters only: `p.data = p.data.t()` is a thing people write, the same of a state is not.
        if self._tensors and sync.is_fake(self._tensors[0]):
            return [], []  # no memory
        return [*map(Tensor.data_ptr, self._tensors)], [*map(Tensor.stride, self.params)]

    def carried(self) -> Tensor | None:
        """[T, 2] float64 Σp², Σv² as the last update left them, or None if an in-place operation has written one since."""
        return self._sums if self._sums_of == self._seen else None

    def new_sums(self, sums: Tensor, go: Tensor | bool = True) -> Tensor:
        """Where the update writes Σp², Σv², [T, 2] float64; rows that it leaves alone keep those of ``sums`` [T, S]."""
        if (self._rows.absent or go is not True) and self.carried() is None:
            self._sums.copy_(sums[:, 3:5])
        return self._sums

    def exchange_sums(self, new: Tensor) -> Tensor:
        """Puts other sums in the place of :meth:`new_sums`; returns a copy of what was there, [T, 2]."""
        old = self._sums.clone()
        self._sums.copy_(new)
        return old

    def forget_sums(self) -> None:
        """Says that the sums which the last update left are not to be used."""
        self._sums_of = None

    def invalidate(self) -> None:
        """Says that somebody wrote what no version counter tells of."""
        self._sums_of = self._copies_seen = None

    def _version(self) -> int:
        """The version counters of all that Σp² and Σv² depend on, added up. Counters only rise: equal sums are equal versions."""
        return sum(map(_version_of, self._summed))

    # ------------------------------------------------------------------------------------------------------------- the steps

    def kept(self) -> list[Tensor]:
        """The tensors on the device that it keeps from step to step, besides parameters and states."""
        counts = self._rows.counts
        return [self._counts, self._sums, *([counts] if isinstance(counts, Tensor) else []), *self.launch.kept()]

    @property
    def complete(self) -> bool:
        """Whether every parameter has a gradient."""
        return not self._rows.absent

    def gradients(self) -> list[Tensor | None]:
        """``.grad`` of every parameter as it is now, of a DTensor this rank's shard."""
        if not self._outer:
            return [p.grad for p in self.leaves]
        return [local_gradient(p) for p in self.leaves]

    def set_gradients(self, grads: Sequence[Tensor | None]) -> None:
        """The gradients of this step, None where there is none.

        Raises:
            RuntimeError: a sparse gradient, or one of another shape or device. Nothing has changed then.
        """
        self.launch.set_gradients(grads)
        absent = [t for t, g in enumerate(grads) if g is None]
        if absent != self._rows.absent:
            self._rows, self._rise = self._rows_without(absent), None
        self._seen = self._version()

    def _rows_without(self, absent: list[int]) -> _Rows:
        missing = set(absent)
        counts: Tensor | int = 1
        if absent:
            numbers = [float(t not in missing) for t in range(len(self.leaves))]
            counts = sync.upload([[*numbers, 1.0]], self._counts.dtype, self.device)[0]
        written = list(chain.from_iterable(xs for t, xs in enumerate(self._written) if t not in missing))
        copies = [t for t in self._copies if t not in missing]
        return _Rows(absent, counts, written, [self.params[t] for t in copies], [self.updated[t] for t in copies])

    def after_update(self, go: Tensor | bool = True) -> None:
        """Counts the step of the rows that have a gradient, and marks what was written; counts nothing if ``go`` is False."""
        rows = self._rows
        self._counts += rows.counts if go is True else rows.counts * go
        before = self._version() if self._rise is None else 0
        mark_written(rows.written)
        if rows.copies:
            torch._foreach_copy_(rows.copies, rows.masters)
        if self._copies:
            self._copies_seen = self._copy_versions()
        if self._rise is None:
            self._rise = self._version() - before
        # Not the version of now: a user's thread may have written since the step looked, and then the next one reads everything.
        self._sums_of = self._seen + self._rise

    def take_up_copies(self) -> None:
        """Brings the float32 masters up to date with parameters that others have written: they are the model, what they say counts.

        A master stays what it is where its parameter still is its rounding, so that nothing is lost where nothing was written.
        """
        versions = self._copy_versions()
        seen = self._copies_seen or [-1] * len(versions)
        for t, now, then in zip(self._copies, versions, seen, strict=True):
            if now != then:
                p, master = self.params[t], self.updated[t]
                master.copy_(torch.where(master.to(p.dtype) == p, master, p.to(master.dtype)))
        if versions != seen:
            self._copies_seen, self._seen = versions, self._version()

    def _copy_versions(self) -> list[int]:
        return [self.leaves[t]._version + self.params[t]._version for t in self._copies]  # of a DTensor also its shard's


def _stacked(counts: Sequence[Tensor | float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """0-dim tensors and numbers as one vector. The host does not read them."""
    return torch.stack([torch.as_tensor(x, dtype=dtype, device=device).reshape(()) for x in counts])


def _written(param: Tensor, state: Mapping[str, Tensor], with_maximum: bool) -> list[Tensor]:
    """All that an update of one row writes. The kernels write the shard of a DTensor: both have a version counter."""
    whole = [state.get(MASTER, param), state["exp_avg"], state["exp_avg_sq"]]
    whole += [state["max_exp_avg_sq"]] if with_maximum else []
    dtensors = [x for x in {*whole, param} if is_sharded(x)]
    return [*map(local, whole), *dtensors]
