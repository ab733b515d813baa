"""How a warp goes once around a loop: the cycles it takes by itself, those for which it holds the units of its scheduler."""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from bench.sass import Instruction

Path = tuple[Instruction, ...]

# Cycles from an instruction's issue to that of one which needs its result. Arithmetic: 4 on Volta and since (Jia et al. 2018, arXiv
# 1804.06826); a load that the first cache answers: 33 (github.com/RRZE-HPC/gpu-benches, gpu-latency). The others are round figures
# between what several published microbenchmarks say.
ARITHMETIC = 4
LATENCY = {"LDS": 30, "LDC": 30, "ULDC": 12, "LDCU": 12, "S2R": 20, "S2UR": 20, "MUFU": 20, "SHFL": 23, "FCHK": 14}
LATENCY |= {"LD_FROM_L1": 33, "F2F": 14, "F2I": 14, "I2F": 14, "DADD": 8, "DMUL": 8, "DFMA": 8, "DSETP": 8}
REGISTER = re.compile(r"\b(U?[RP])(\d+)(\.64)?")
PREDICATE = re.compile(r"U?P(?:\d|T)$")
PAIRED = ("FADD2", "FMUL2", "FFMA2")  # of sm_100: two float32 a lane
NO_RESULT = {"STG", "STS", "ST", "BRA", "BSSY", "BSYNC", "EXIT", "BAR", "NOP", "WARPSYNC", "RET", "CALL", "MEMBAR", "RED", "ERRBAR"}


def _registers(operand: str, width: int) -> Iterator[str]:
    for file, number, pair in REGISTER.findall(operand):
        for i in range(2 if pair else width if file in ("R", "UR") else 1):
            yield f"{file}{int(number) + i}"


def results_and_sources(x: Instruction) -> tuple[list[str], list[str]]:
    """The registers that an instruction writes, and those that it waits for."""
    parts = x.name.split(".")
    width = 4 if "128" in parts else 2 if "64" in parts or "WIDE" in parts or x.opcode in ("CS2R", *PAIRED) else 1
    is_double = x.opcode in ("DADD", "DMUL", "DFMA", "DSETP")
    count = 0  # of operands that are written: the first, and predicates that follow it
    if x.opcode not in NO_RESULT and x.operands:
        count = 1
        while count < len(x.operands) and PREDICATE.match(x.operands[count]):
            count += 1
        # A predicate first: a comparison, or an operation with a result behind it.
        if PREDICATE.match(x.operands[0]) and x.opcode in ("LOP3", "SHFL") and count < len(x.operands):
            count += 1
    from_f64 = parts[0] == "F2F" and "F64" in parts[1:2]
    results = [r for o in x.operands[:count] for r in _registers(o, 2 if is_double or from_f64 else width)]
    stored = width if x.opcode in ("STG", "STS", *PAIRED) else 2 if is_double else 1
    sources = [r for o in x.operands[count:] for r in _registers(o, 1 if "[" in o else stored)]
    return results, sources + list(_registers(x.guard, 1))


def period(path: Path, memory: float) -> float:
    """Cycles of a warp that has its scheduler to itself, from one time around to the next, if a load takes ``memory`` cycles.

    Instructions are issued in order, one a cycle, each when what it needs is there. Where a load is issued before the arithmetic of
    the time around before, the two overlap, and that shows here.
    """
    steps = [(*results_and_sources(x), memory if x.opcode == "LDG" else LATENCY.get(x.opcode, ARITHMETIC)) for x in path]
    ready: dict[str, float] = {}
    now, begun = 0.0, [0.0]
    for _ in range(4):
        for results, sources, latency in steps:
            now = max([now + 1, *(ready[r] for r in sources if r in ready)])
            for r in results:
                ready[r] = now + latency
        begun.append(now)
    return (begun[4] - begun[2]) / 2  # two times around: loads of every second one may be out together


# Which unit of a scheduler an instruction goes through. A unit of 16 lanes takes two cycles for a warp, one of 4 takes eight. From
# the table "Throughput of Native Arithmetic Instructions" of the CUDA C++ Programming Guide: integers, logic, comparisons and
# packing have 16 lanes; special functions and the other conversions 4; float32 and multiply-add of integers share 16 (sm_80) or 32,
# of which integers use 16.
UNIT = dict.fromkeys(("MUFU", "F2I", "I2F", "F2F", "FCHK"), "special")
UNIT |= dict.fromkeys(("FADD", "FMUL", "FFMA", "HADD2", "HFMA2", "HMUL2"), "float")
UNIT |= dict.fromkeys(PAIRED, "paired") | {"IMAD": "multiply"}
UNIT |= dict.fromkeys((*NO_RESULT, "LDG", "LDS", "LDC", "LD_FROM_L1", "S2R", "SHFL", "DADD", "DMUL", "DFMA"), "elsewhere")


def cycles_held(path: Path, architecture: str) -> dict[str, float]:
    """Cycles that one time around holds each unit of a scheduler; "issue" takes one for each instruction."""
    kinds = Counter("elsewhere" if x.opcode.startswith("U") else UNIT.get(x.opcode, "integer") for x in path)
    floats = kinds["float"] + 2 * kinds["paired"] + kinds["multiply"]
    return {
        "issue": len(path),
        "integer": 2 * kinds["integer"],
        "special": 8 * kinds["special"],
        "float": 2 * floats if architecture == "8.0" else max(floats, 2 * kinds["multiply"]),
    }


@dataclass(frozen=True, eq=False)
class Loop:
    """Once around a loop: the ways that a warp may take, with their weights. One way, or a mean of two."""

    ways: tuple[tuple[float, Path], ...]
    elements: int  # that a thread takes in it
    loads: int  # bytes that a thread loads in it

    def mean(self, of: Callable[[Path], float]) -> float:
        """The weighted mean of a number."""
        return sum(weight * of(way) for weight, way in self.ways)

    @property
    def instructions(self) -> float:
        """Issued for each element of a thread."""
        return self.mean(len) / self.elements

    def held(self, architecture: str) -> dict[str, float]:
        """Mean of `cycles_held`."""
        ways = [(weight, cycles_held(way, architecture)) for weight, way in self.ways]
        return {unit: sum(weight * held[unit] for weight, held in ways) for unit in ways[0][1]}

    @functools.cache  # noqa: B019 -- a few hundred numbers of loops that live as long as the program
    def period(self, memory: int) -> float:
        """Mean of `period`."""
        return self.mean(lambda way: period(way, memory))

    @property
    def bytes_in_flight(self) -> float:
        """Bytes that a thread waits for at a time, where memory is so slow that it only waits."""
        slow = 10_000_000
        return self.loads * slow / self.period(slow)
