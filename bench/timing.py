"""Interleaved timing: the only way two times are compared here.

All sides run in one process and take turns, so drift of the clock, of the memory and of the neighbours hits every side
alike. A ratio is formed inside a round, from two times taken moments apart, and the tables show the median and the
quartiles of these ratios; quotients of times from different runs appear nowhere.
"""

import contextlib
import gc
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch

# A thread that waits for a processor holds up every other at the end of a parallel loop, for milliseconds each time. Then
# a step takes as long as it has loops, not as it has work, and a ratio tells about the scheduler. So a round in which the
# threads of this process waited for more than this share of it is dropped: the whole round, hence for every side alike.
WAIT_LIMIT = 0.02


@dataclass(frozen=True)
class Spread:
    """Median, quartiles, and the interval that covers the true median with 95 % confidence."""

    median: float
    q1: float
    q3: float
    low95: float
    high95: float

    @classmethod
    def of(cls, values: list[float]) -> "Spread":
        """Spread of at least two values. The interval is the distribution-free one, from the order statistics."""
        ordered, n = sorted(values), len(values)
        q1, median, q3 = statistics.quantiles(ordered, n=4, method="inclusive")
        # The number of values below the true median is binomial(n, 1/2): mean n/2, deviation sqrt(n)/2.
        rank = max(0, int(n / 2 - 0.98 * n**0.5))
        return cls(median, q1, q3, ordered[rank], ordered[n - 1 - rank])


@dataclass
class Times:
    """Seconds of one call of each side, one entry per round."""

    rounds: dict[str, list[float]]
    kept: list[int]  # the numbers of these rounds, among all that were run
    dropped: int  # rounds without a processor of their own, left out
    crowded: int  # such rounds that are in: too few others were to be had

    def spread(self, name: str) -> Spread:
        """Spread of the seconds of one side."""
        return Spread.of(self.rounds[name])

    def ratio(self, name: str, base: str) -> Spread:
        """Spread of time(name) / time(base), paired round by round."""
        return Spread.of([a / b for a, b in zip(self.rounds[name], self.rounds[base], strict=True)])

    def note(self) -> str:
        """How many rounds there are and whether they can be trusted."""
        text = f"{len(self.kept)} rounds" + (f", {self.dropped} dropped (waited for a processor)" if self.dropped else "")
        if self.crowded:
            text += f"\nNOT VALID: other processes held the processors in {self.crowded} of them; run it again"
        return text


def interleaved(
    sides: Mapping[str, Callable[[], object]],
    *,
    seconds: float,
    min_rounds: int = 9,
    max_rounds: int = 1_000,
    calls: int = 1,
    before_round: Callable[[int], None] | None = None,
    before_call: Callable[[], None] | None = None,
) -> Times:
    """Times of one call of each side.

    A round runs every side once, in a new random order: in a fixed order one side would always inherit the caches of the
    same predecessor. `calls` calls make one entry where a single one is near the clock's own cost. `before_round(i)` and
    `before_call()` run outside the timed region. After `seconds` it ends with `min_rounds` undisturbed rounds, or with
    what there is after three times as long.
    """
    order = list(sides)
    everything: list[dict[str, float]] = []
    undisturbed: list[int] = []
    shuffle = random.Random(0).shuffle
    gc.collect()
    gc.disable()  # as timeit does: a collection belongs to the process, not to the side it happens to hit
    try:
        start = time.perf_counter()
        while len(undisturbed) < max_rounds:
            spent = time.perf_counter() - start
            if len(everything) >= min_rounds and spent > seconds and (len(undisturbed) >= min_rounds or spent > 3 * seconds):
                break
            if before_round is not None:
                before_round(len(everything))
            shuffle(order)
            entry = {}
            waited, began = seconds_waited(), time.perf_counter()
            for name in order:
                call = sides[name]
                if before_call is not None:
                    before_call()
                begin = time.perf_counter()
                for _ in range(calls):
                    call()
                entry[name] = (time.perf_counter() - begin) / calls
            if seconds_waited() - waited <= WAIT_LIMIT * (time.perf_counter() - began):
                undisturbed.append(len(everything))
            everything.append(entry)
    finally:
        gc.enable()
    enough = len(undisturbed) >= min_rounds
    kept = undisturbed if enough else list(range(len(everything)))
    return Times(
        {name: [everything[i][name] for i in kept] for name in sides},
        kept,
        dropped=len(everything) - len(kept),
        crowded=len(kept) - len(undisturbed),
    )


def seconds_waited() -> float:
    """Seconds that the threads of this process were ready to run and had no processor; 0 where the system does not tell."""
    nanoseconds = 0
    for file in Path("/proc/self/task").glob("*/schedstat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # the thread ended since it was listed
            nanoseconds += int(file.read_text().split()[1])  # "running waiting timeslices"
    return nanoseconds * 1e-9


def cache_bytes() -> int:
    """Size of the last-level cache; 64 MiB where the system does not tell."""
    size = os.sysconf("SC_LEVEL3_CACHE_SIZE") if "SC_LEVEL3_CACHE_SIZE" in os.sysconf_names else 0
    return size if size > 0 else 64 * 2**20


def machine() -> dict[str, Any]:
    """What figures were measured on and with, to stand beside them."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = {x.partition(":")[0].strip(): x.partition(":")[2].strip() for x in lines if ":" in x}
    processor = names.get("model name", platform.processor())
    details = " ".join(f"{name.replace(' ', '_')}={names[name]}" for name in ("cpu family", "model") if name in names)
    return {
        "processor": f"{processor} {details}".strip(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "date": date.today().isoformat(),
    }


class Memory:
    """Three measured bandwidths that other traffic is compared with, on buffers that no cache holds.

    `copy` reads one buffer and writes another: bytes count as read + written, but a store to a line that is not in the
    cache reads the line first, and that hidden read is not counted. An optimizer works in place and has none, so its
    share of the copy can exceed 1. `in place` negates a buffer where it lies: also one word read and one written,
    without the hidden read. `read` sums a buffer up: where it is hardly more than half of `in place`, writes cost little beside
    reads, and a step takes about as long as its reads.
    """

    def __init__(self) -> None:
        elements = max(2 * cache_bytes(), 256 * 2**20) // 4
        # Written once each: page faults are not bandwidth, and untouched pages could all be one page of zeros.
        self.source = torch.full((elements,), 1.5)
        self.target = torch.full((elements,), 2.5)
        self.bytes = elements * 4  # of one buffer

    def copy(self) -> None:
        """Also evicts everything else from the caches."""
        self.target.copy_(self.source)

    def bandwidths(self, repeats: int = 5) -> dict[str, list[float]]:
        """Bytes per second of `repeats` passes of each kind."""
        sides = {"copy": self.copy, "in place": self.source.neg_, "read": self.source.sum}
        buffers = {"copy": 2, "in place": 2, "read": 1}
        times = interleaved(sides, seconds=2.0, min_rounds=repeats, max_rounds=repeats)
        return {name: [buffers[name] * self.bytes / t for t in seconds] for name, seconds in times.rounds.items()}
