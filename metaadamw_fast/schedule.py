"""When the next meta-update of a training loop is due, and where its batches come from."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from .optimizer import MetaAdamW


class Schedule:
    """Tells when an optimizer's own count of steps has come to the next multiple of ``steps``.

    A device may leave out a step that the host has called, and a checkpoint sets the count anew. So the host has a bound only: the
    last count that it read, and one more for each call since. It waits for the device where the bound has come to the multiple.

    Args:
        optimizer: whose ``steps_done`` counts.
        steps: from one time to the next.
        warm_up: only multiples beyond it count.
    """

    def __init__(self, optimizer: MetaAdamW, steps: int, warm_up: int) -> None:
        self._optimizer, self._steps, self._warm_up = optimizer, steps, warm_up
        self._times_set = optimizer.count_set[0]
        self._read()

    def _read(self) -> None:
        self._count = self._optimizer.steps_done
        self._calls, self._step_calls = 0, self._optimizer.step_calls

    def due(self) -> bool:
        """Whether the count has passed a multiple since the last call. To be called after every step.

        A replay of a captured step calls no ``step``. So each call of this method stands for at least one.
        """
        times_set, value = self._optimizer.count_set
        if times_set != self._times_set:
            self._times_set, self._count = times_set, value
        self._calls += 1
        next_due = (max(self._count, self._warm_up) // self._steps + 1) * self._steps
        if self._count + max(self._calls, self._optimizer.step_calls - self._step_calls) < next_due:
            return False
        self._read()
        return self._count >= next_due


class Endless:
    """Batches, begun again at their end; a ValueError, every time, if there are none. (A generator would raise it only once.)"""

    _END = object()

    def __init__(self, batches: Iterable[Any], name: str) -> None:
        self._batches, self._name = batches, name
        self._rest = iter(())  # iter() of a loader starts its workers: not before the first batch is asked for

    def __next__(self) -> Any:
        batch = next(self._rest, self._END)
        if batch is self._END:
            self._rest = iter(self._batches)
            batch = next(self._rest, self._END)
        if batch is self._END:
            raise ValueError(f"{self._name} has no more batches")
        return batch
