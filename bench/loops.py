"""The kernels on elements, case by case: which loop of the compiled kernel a case takes, and what a block does besides.

A C++ kernel serves all dtypes, so its loops branch by them; a Triton kernel knows them when it is compiled. A loop is found by what
it loads, stores and computes. Where none or several fit, that is an error with the case's name: the kernel was changed.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

from bench.compiled import Kernel
from bench.sass import Block, Cost, Instruction, blocks_of, conversions, loops_of, path_through
from bench.warp import Loop

# ---------------------------------------------------------------------------------------------------------------- the cases


class Case(NamedTuple):
    """One kernel on rows of one combination of dtypes. Sizes are bytes of an element."""

    name: str
    kernel: str  # of csrc/cuda.cu
    loads: tuple[int, ...]
    stores: tuple[int, ...]
    types: str  # the way that a C++ kernel goes: "float32", "16 bits", "mixed"
    whole: bool = True  # in groups of 16 bytes; else element by element, as where an address is not a multiple of 16

    @property
    def is_update(self) -> bool:
        """The update; else the statistics."""
        return bool(self.stores)

    @property
    def bytes(self) -> int:
        """Read and written, for each element."""
        return sum(self.loads) + sum(self.stores)


STATS = "measure_kernel<metaadamw::AdamW, false>"
UPDATE, STOCHASTIC, FOUND, BOTH = (
    f"update_kernel<metaadamw::AdamW, {found}, {stochastic}>" for found in ("false", "true") for stochastic in ("false", "true")
)
TYPES = {"fp32": ("float32", 4, 4), "bf16, fp32 states": ("mixed", 2, 4), "bf16": ("16 bits", 2, 2)}


def cases() -> list[Case]:
    """Everything that the table shows."""
    made = []
    for label, (types, word, state) in TYPES.items():
        made.append(Case(f"statistics of g, m; {label}", STATS, (word, state), (), types))
        made.append(Case(f"statistics of all four; {label}", STATS, (word, state, word, state), (), types))
    for title, kernel in (("update", UPDATE), ("lagged", FOUND), ("stochastic", STOCHASTIC), ("lagged, stochastic", BOTH)):
        for label, (types, word, state) in TYPES.items():
            if "stochastic" not in title or word == 2:  # float32 is not rounded
                made.append(Case(f"{title}; {label}", kernel, (word, state, word, state), (state, word, state), types))
    made.append(Case("statistics of g, m; fp32, misaligned", STATS, (4, 4), (), "float32", whole=False))
    made.append(Case("update; fp32, misaligned", UPDATE, (4, 4, 4, 4), (4, 4, 4), "float32", whole=False))
    return made


# --------------------------------------------------------------------------------------------------------- finding the loops


class LoopNotFoundError(Exception):
    """A kernel does not have the loop that a case describes: it was changed, and this file must be too."""


def _count(size: int, block: Block) -> Cost:
    """Loads and stores of ``size`` bytes, square roots, products."""
    return (
        sum(x.is_access("LDG", size) for x in block.instructions),
        sum(x.is_access("STG", size) for x in block.instructions),
        sum(x.name == "MUFU.RSQ" for x in block.instructions),
        sum({"FMUL": 1, "FMUL2": 2}.get(x.opcode, 0) for x in block.instructions),
    )


# A kernel's ways differ in their conversions. The cheapest way by each of these costs is that of ...
def _float32(block: Block) -> Cost:
    return conversions(block), len(block.instructions)


def _bfloat16(block: Block) -> Cost:
    """... operands that all have 16 bits, so that float16 is the only other choice."""
    return sum(x.name.startswith(("HADD2.F32", "F2FP.F16", "F2F.F16")) for x in block.instructions), len(block.instructions)


def _narrowest(block: Block) -> Cost:
    """... 16-bit operands where float32 is a choice, too."""
    return -conversions(block), len(block.instructions)


# How far g and p lead from the way of four float32 operands to that of four narrow ones. In an update g is converted once, m twice,
# p and v three times (read, stored, summed as stored): 4 of 9; if it sums what it finds, p and v twice, too: 3 of 7. In the
# statistics each is converted once.
MIXED_UPDATE, MIXED_FOUND, MIXED_STATISTICS = 4 / 9, 3 / 7, 1 / 2


def cuda_loop(kernel: Kernel, case: Case) -> Loop:
    """The loop of a C++ kernel that a case takes.

    Raises:
        LoopNotFoundError: there is none, or more than one.
    """
    if not case.whole:
        return _element_loop(kernel, case)
    elements = 16 // max(case.loads)

    def accepts(counts: Cost, loads: int) -> bool:
        read, written, roots, products = counts
        if case.is_update:
            return (read, written, roots) == (loads, len(case.stores), elements)
        return read == loads and products in (3 * elements, 5 * elements)  # without and with p and v

    def way(cost: Callable[[Block], Cost]) -> tuple[Instruction, ...]:
        # Loads of operands that the statistics do not want are branched around, or predicated off: then all four are on the path.
        for loads in (len(case.loads), 4):
            found = _paths(kernel, cost, functools.partial(_count, 16), functools.partial(accepts, loads=loads))
            if found:
                break
        return _only(found, case)

    if case.types == "mixed":
        of_update = MIXED_FOUND if case.kernel in (FOUND, BOTH) else MIXED_UPDATE
        part = of_update if case.is_update else MIXED_STATISTICS
        ways = ((1 - part, way(_float32)), (part, way(_narrowest)))
    else:
        ways = ((1.0, way(_float32 if case.types == "float32" else _bfloat16)),)
    return Loop(ways, elements, elements * sum(case.loads))


def _element_loop(kernel: Kernel, case: Case) -> Loop:
    """A thread takes 4 neighbours one after the other: the first load brings the line in which the others find theirs."""

    def accepts(counts: Cost) -> bool:
        read, written, roots, products = counts
        if case.is_update:
            return (read, written, roots) == (len(case.loads), len(case.stores), 1)
        return (read, written, roots) == (len(case.loads), 0, 0) and products in (3, 5)

    # There is one for rows whose groups have 4 elements and one for 8, of the same source: the first is taken.
    path = _only(_paths(kernel, _float32, functools.partial(_count, 4), accepts)[:1], case)
    cached = tuple(x._replace(name="LD_FROM_L1") if x.opcode == "LDG" else x for x in path)
    return Loop(((0.25, path), (0.75, cached)), 1, sum(case.loads))


def triton_loop(kernel: Kernel, case: Case, elements: int) -> Loop:
    """The loop of a Triton kernel, of whose blocks of lanes a thread has ``elements``.

    Raises:
        LoopNotFoundError: there is none, or more than one.
    """

    def count(block: Block) -> Cost:
        wide, narrow = _count(16, block), _count(8, block)
        return 16 * wide[0] + 8 * narrow[0], 16 * wide[1] + 8 * narrow[1], *wide[2:]

    def accepts(counts: Cost) -> bool:
        read, written, roots, products = counts
        moved = (read, written) == (elements * sum(case.loads), elements * sum(case.stores))
        idle = products % elements  # on Blackwell two products are one instruction, of which one half may be idle
        return moved and (roots == elements if case.is_update else products - min(idle, 2) in (3 * elements, 5 * elements))

    return Loop(((1.0, _only(_paths(kernel, _float32, count, accepts), case)),), elements, elements * sum(case.loads))


def _paths(
    kernel: Kernel, cost: Callable[[Block], Cost], count: Callable[[Block], Cost], accepts: Callable[[Cost], bool]
) -> list[tuple[Instruction, ...]]:
    blocks = blocks_of(kernel.sass)
    found = [(body, path_through(blocks, (header, body), cost, count, accepts)) for header, body in loops_of(blocks)]
    kept = [(body, path) for body, path in found if path is not None]
    # A loop around the one that is meant has the same path within a longer one.
    return [tuple(path) for body, path in kept if not any(other < body for other, _ in kept)]


def _only(paths: list[tuple[Instruction, ...]], case: Case) -> tuple[Instruction, ...]:
    if len(paths) != 1:
        raise LoopNotFoundError(
            f"{case.name}: {len(paths)} loops of {case.kernel} load, store and compute what bench/loops.py expects, not one."
            " The kernel was changed: teach bench/loops.py its new loop"
        )
    return paths[0]


# --------------------------------------------------------------------------------------------- what a block does besides its loop

# Cycles. Measured by others (gpu-benches, see bench/model.py): an access that the second-level cache answers (gpu-latency on a
# GH200), and the start of a block (gpu-stream's threads last so much longer than their load). Counted by hand in the SASS: a step
# of the search, most of which find their line in the first cache; a bit of the step count in the two power loops; root, reciprocal
# and quotient in float64 behind them; the sums over the block.
L2_HIT, BLOCK_START, BARRIER, SEARCH_STEP, POWER_BIT, FOLD, BLOCK_SUMS = 281, 400, 30, 100, 50, 400, 350
STEP_BITS = 14


def fixed_cycles(kernel: Kernel, is_update: bool, tensors: int, several_chunks: bool) -> dict[str, float]:
    """Cycles of each thing that a block waits for outside of its loop. Whether it searches and takes powers is seen in the SASS."""
    blocks = blocks_of(kernel.sass)
    bodies = [[x for i in body for x in blocks[i].instructions] for _, body in loops_of(blocks)]
    opcodes = [Counter(x.opcode for x in body) for body in bodies if len(body) < 60]
    # In a search one load decides where the next goes, and that is all; the loop of a power multiplies in float64.
    searches = any(
        x["LDG"] == 1 and x["SEL"] and not any(o.startswith(("F", "D", "MUFU", "ST", "BAR", "SHFL", "CALL")) for o in x)
        for x in opcodes
    )
    powers = any(x["DMUL"] and not x["LDG"] for x in opcodes)
    steps = {"start": float(BLOCK_START)}
    steps["chunk to tensor"] = SEARCH_STEP * math.ceil(math.log2(max(tensors, 2))) if searches else L2_HIT
    steps["row"] = L2_HIT + BARRIER
    if is_update:
        steps["hyper-parameters"] = 2 * L2_HIT + BARRIER
        steps["powers and roots"] = STEP_BITS * POWER_BIT + FOLD if powers else 0
    steps["sums"] = BLOCK_SUMS
    steps["ticket"] = 3 * L2_HIT if several_chunks else 0
    return steps
