"""SASS as a graph: instructions, blocks, loops, and the path that a case takes through a loop.

A path is chosen by what the case says of it: how many loads and stores of which size, which conversions. Slow paths, which call a
subroutine for the root of a subnormal number or for a quotient that overflows, are never taken.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from operator import add
from typing import NamedTuple

# ------------------------------------------------------------------------------------------------------------------ parsing


class Instruction(NamedTuple):
    """One line of SASS."""

    guard: str  # "@!P0", or empty
    name: str  # "LDG.E.128"
    operands: tuple[str, ...]

    @property
    def opcode(self) -> str:
        """Without modifiers."""
        return self.name.partition(".")[0]

    @property
    def jumps(self) -> bool:
        """Whether control may go on elsewhere. For sm_80, ptxas also writes far jumps as calls of a label."""
        return self.opcode in ("BRA", "EXIT", "RET", "BRX", "JMP") or (self.opcode == "CALL" and ".L_" in self.operands[-1])

    def is_access(self, opcode: str, size: int) -> bool:
        """Whether this loads (LDG) or stores (STG) that many bytes of global memory a thread."""
        if self.opcode != opcode:
            return False
        parts = self.name.split(".")
        bits = 128 if "128" in parts else 64 if "64" in parts else 16 if "U16" in parts else 8 if {"U8", "S8"} & set(parts) else 32
        return bits == 8 * size


@dataclass
class Block:
    """Instructions without a branch among them."""

    instructions: list[Instruction] = field(default_factory=list)
    successors: list[int] = field(default_factory=list)

    @functools.cached_property
    def is_slow(self) -> bool:
        """Calls a subroutine: a case that hardly any element is."""
        return any(x.opcode == "CALL" and not x.jumps for x in self.instructions)


LINE = re.compile(r"\s*/\*[0-9a-f]{4,6}\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);")
LABEL = re.compile(r"(\.L_\w+):")
TARGET = re.compile(r"`\((\.L_\w+)\)")


@functools.lru_cache(maxsize=64)
def blocks_of(sass: str) -> list[Block]:
    """The control flow of a kernel, from its entry."""
    blocks, labels = [Block()], {}
    targets: dict[int, str] = {}
    for line in sass.splitlines():
        label = LABEL.match(line.strip())
        if label is not None:
            if blocks[-1].instructions:
                blocks.append(Block())
            labels[label[1]] = len(blocks) - 1
            continue
        match = LINE.match(line)
        if match is None:
            continue
        operands = tuple(x.strip() for x in match[3].split(",") if x.strip())
        instruction = Instruction(match[1] or "", match[2], operands)
        blocks[-1].instructions.append(instruction)
        if instruction.jumps:
            target = TARGET.search(match[3])
            if target is not None:
                targets[len(blocks) - 1] = target[1]
            blocks.append(Block())
    for i, block in enumerate(blocks):
        last = block.instructions[-1] if block.instructions else None
        leaves = last is not None and last.jumps
        # "BRA P0, label" and "BRA.U !UP0, label" are conditional too.
        conditional = last is not None and (bool(last.guard) or len(last.operands) > 1)
        if i in targets:
            block.successors.append(labels[targets[i]])
        if (not leaves or conditional) and i + 1 < len(blocks):
            block.successors.append(i + 1)
    return blocks


def loops_of(blocks: list[Block]) -> list[tuple[int, frozenset[int]]]:
    """Every natural loop: its header, and the blocks in it. A loop with several back edges counts once."""
    before: dict[int, list[int]] = {i: [] for i in range(len(blocks))}
    for i, block in enumerate(blocks):
        for successor in block.successors:
            before[successor].append(i)
    bodies: dict[int, set[int]] = {}
    for i, block in enumerate(blocks):
        for header in block.successors:
            if header > i:
                continue
            body, waiting = bodies.setdefault(header, {header}), [i]
            while waiting:
                at = waiting.pop()
                if at not in body:
                    body.add(at)
                    waiting += before[at]
    return [(header, frozenset(body)) for header, body in bodies.items()]


# -------------------------------------------------------------------------------------------------------------------- paths

Cost = tuple[int, ...]


def path_through(
    blocks: list[Block],
    loop: tuple[int, frozenset[int]],
    cost: Callable[[Block], Cost],
    count: Callable[[Block], Cost],
    accepts: Callable[[Cost], bool],
) -> list[Instruction] | None:
    """The cheapest way once around a loop, without slow blocks, whose blocks' ``count`` add up to what ``accepts`` wants."""
    header, body = loop
    # best[block][counts]: cost, and where it came from. Every jump backward but that to the header is an inner loop's, which is
    # walked at most once; so blocks in the order of their addresses are a topological order.
    best: dict[int, dict[Cost, tuple[Cost, tuple[int, Cost] | None]]] = {i: {} for i in body}

    def enter(at: int, counts: Cost, spent: Cost, origin: tuple[int, Cost] | None) -> None:
        if counts not in best[at] or spent < best[at][counts][0]:
            best[at][counts] = (spent, origin)

    ends: list[tuple[Cost, int, Cost]] = []
    enter(header, count(blocks[header]), cost(blocks[header]), None)
    for i in sorted(body):
        for counts, (spent, _) in best[i].items():
            for j in blocks[i].successors:
                if j == header:
                    if accepts(counts):
                        ends.append((spent, i, counts))
                elif j in body and j > i and not blocks[j].is_slow:
                    more, dearer = count(blocks[j]), cost(blocks[j])
                    enter(j, tuple(map(add, counts, more)), tuple(map(add, spent, dearer)), (i, counts))
    if not ends:
        return None
    _, at, counts = min(ends)
    way: list[int] = []
    place: tuple[int, Cost] | None = (at, counts)
    while place is not None:
        way.append(place[0])
        place = best[place[0]][place[1]][1]
    return [x for i in reversed(way) for x in blocks[i].instructions]


def conversions(block: Block) -> int:
    """Instructions that convert between float32 and the 16-bit types, of either kind."""
    return sum(x.name.startswith(("HADD2.F32", "F2FP", "F2F.F16", "F2F.BF16", "HADD2.BF16")) for x in block.instructions)
