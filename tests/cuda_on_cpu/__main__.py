"""`make cuda-on-cpu`: the CUDA kernels on the CPU, for longer than `make test` has time.

First the kernels as they are: many random cases, all other tests with these kernels in the place of the CPU's, the sanitizers, and
the lines that no test reaches. Then the kernels broken at one place at a time, which the tool named beside it must notice. Prints a
table; the exit status is 1 if a line of it is not as it must be.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from typing import NamedTuple

from . import COMPILER, ROOT, Edit, build, unavailable

# What `make test` runs on the emulation.
TESTED = [
    f"tests/{name}.py"
    for name in (
        "test_policy",
        "test_step_counts",
        "test_masters",
        "test_avgrad_ops",
        "test_mada_ops",
        "test_mada_random",
        "test_gpu_random",
        "test_gpu_ops",
        "test_gpu_optimizer",
    )
]
# The other tests, but for those that build or interpret other kernels, measure, or compare with processes that know no emulation.
OTHERS = [
    "-p", "tests.emulated", "tests", "--deselect=tests/test_checkpoint.py::test_save_kill_load_continue",
    "--deselect=tests/test_ops_errors.py::test_lists",  # on the meta device, where the emulated ops do not run
    *(f"--ignore-glob=tests/test_{x}*" for x in ("bits", "cuda", "triton", "gpu", "memory", "distributed", "*sharding", "killed")),
]  # fmt: skip
# For ThreadSanitizer, which takes fifty times as long: launches with several chunks, strided and of 16 bits, and of the other ops.
FEW = "strided_chunks or more_tensors_than_a_block or (also_sums and emulated-bf16) or (by_chance and order1 and fp16)"


class Tool(NamedTuple):
    """Something that runs the kernels, and how it says that it found a fault."""

    name: str
    command: list[str]
    finding: str = r"^(?:E   +(?:\w+Error: )?|Fatal Python error: |case \d+, )(.{1,80})"  # a pattern, whose group is shown
    flags: tuple[str, ...] = ("-O1",)
    runtimes: tuple[str, ...] = ()  # libraries to be loaded before Python
    environment: tuple[tuple[str, str], ...] = ()

    def run(self, edit: Edit | None = None) -> tuple[bool, str]:
        """Whether it passed, and what it found."""
        runtimes = [
            subprocess.run([COMPILER, f"-print-file-name={x}"], capture_output=True, text=True, check=True).stdout.strip()
            for x in self.runtimes
        ]
        environment = {"CUDA_ON_CPU": str(build(edit, self.flags)), "OMP_NUM_THREADS": "1", "LD_PRELOAD": " ".join(runtimes)}
        environment = os.environ | environment | dict(self.environment)
        run = subprocess.run(self.command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        found = re.findall(self.finding, run.stdout, re.MULTILINE)
        if run.returncode != 0 and not found:
            print(run.stdout[-5000:])
        return run.returncode == 0, found[0] if found else ""


def pytest(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-s", *arguments]


def random_cases(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "tests.test_gpu_random", *arguments]


TESTS = Tool("make test", pytest("-x", *TESTED))
COVERAGE = Tool("gcov", pytest(*TESTED), flags=("-O0", "-g", "--coverage", "-fprofile-update=atomic"))
ADDRESSES = Tool(
    "ASan + UBSan",
    random_cases("--small"),
    r"(?:ERROR: AddressSanitizer: |runtime error: )(.{1,80})",
    ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize=vptr", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"),
    ("libasan.so", "libubsan.so"),
    (("ASAN_OPTIONS", "detect_leaks=0"),),
)
THREADS = Tool(
    "ThreadSanitizer",
    # It does not know every random layout of the address space.
    [*(["setarch", "-R"] if shutil.which("setarch") else []), *pytest(*TESTED, "-k", FEW)],
    r"^SUMMARY: ThreadSanitizer: (?:data race .*/)?(.{1,80})",
    ("-O1", "-g", "-fsanitize=thread", "-fno-omit-frame-pointer"),
    ("libtsan.so",),
    (
        ("TSAN_OPTIONS", "ignore_noninstrumented_modules=1 report_signal_unsafe=0 exitcode=0"),
        ("CUDA_ON_CPU_SEED", "1"),
        ("CUDA_ON_CPU_PAUSE", "300000"),
    ),
)

KERNELS, UTILS, POLICY, MAPPING = "engine_cuda.cuh", "cuda_utils.cuh", "cuda_policy.cuh", "mapping.h"
BARRIER, FENCE = "__syncthreads();", "__threadfence();"
BROKEN = [
    ("no barrier after the row", TESTS, Edit(KERNELS, "base[i] = row.data[i] + chunk.first", BARRIER)),
    ("no barrier after the layout", TESTS, Edit(KERNELS, "&table.layouts[row.layout])[threadIdx.x]", BARRIER)),
    ("no barrier after the coordinates", TESTS, Edit(KERNELS, "coordinates_of(layout.shape", BARRIER)),
    ("no barrier before the sums over warps", TESTS, Edit(UTILS, "of_warp[i][", BARRIER)),
    ("no barrier in the policies", TESTS, Edit(POLICY, "totals[threadIdx.x] = mine", BARRIER)),
    ("roles of gradients that change too early", TESTS, Edit(KERNELS, "(kExchanges<R>) {", "R::exchanged(", "!R::exchanged(")),
    ("a row that is left alone is written", TESTS, Edit(KERNELS, "const auto stores =", "|| moves.writes", "|| true")),
    ("no barrier in scaled_gradients", TESTS, Edit(POLICY, "total = of_block", BARRIER)),
    ("no barrier before the ticket", THREADS, Edit(UTILS, "// the partial sums before the ticket", BARRIER)),
    ("no barrier after the ticket", TESTS, Edit(UTILS, "last = atomicInc(", BARRIER)),
    ("a barrier that some threads do not reach", TESTS, Edit(UTILS, "if (!last) {", FENCE, f"if (threadIdx.x < 64) {BARRIER}")),
    ("no fence before the ticket", THREADS, Edit(UTILS, "table.partials[chunk.number", FENCE)),
    ("no fence after the ticket", THREADS, Edit(UTILS, "if (!last) {", FENCE)),
    ("atomicInc with a bound one too large", TESTS, Edit(UTILS, "last = atomicInc(", ", others)", ", 1 + others)")),
    ("coordinates not initialised", TESTS, Edit(KERNELS, "static_assert(kWords", "coordinates_of(", "if (0) coordinates_of(")),
    ("a group beyond the end, seen by the tests", TESTS, Edit(MAPPING, "      } else {", "first + V <= count", "first < count")),
    ("a group beyond the end", ADDRESSES, Edit(MAPPING, "      } else {", "first + V <= count", "first < count")),
    ("groups that are not aligned", ADDRESSES, Edit(MAPPING, "bool has_whole_groups(", "% group_bytes == 0", "% 1 == 0")),
]  # fmt: skip


def unreached() -> list[str]:
    """The statements of kernels and headers that the tests of the emulation do not reach."""
    directory = build(flags=COVERAGE.flags).parent
    for counts in directory.glob("*.gcda"):
        counts.unlink()
    passed, found = COVERAGE.run()
    if not passed:
        return [f"a test failed: {found}"]
    counts = Counter()
    for path in directory.glob("*.gcda"):
        command = [shutil.which("gcov") or "gcov", "--json-format", "--stdout", str(path)]
        for line in subprocess.run(command, cwd=directory, capture_output=True, text=True, check=True).stdout.splitlines():
            for file in json.loads(line)["files"]:
                for x in file["lines"]:
                    counts[file["file"], x["line_number"]] += x["count"]
    missed = []
    for path in sorted((directory / "csrc").glob("*.*h")) + sorted((directory / "csrc").glob("*.cu")):
        lines, begin = path.read_text().splitlines(), 1
        for number, line in enumerate(lines, 1):
            if not re.search(r"[;{}]\s*(//.*)?$", line):
                continue  # gcov counts a statement at any of its lines
            statement = [n for n in range(begin, number + 1) if (str(path), n) in counts]
            # At a brace it counts exceptions that pass.
            if statement and not any(counts[str(path), n] for n in statement) and line.strip() != "}":
                missed.append(f"{path.name}:{statement[0]}")
            begin = number + 1
    return missed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1000, help="random ones")
    parser.add_argument("--first", type=int, default=0, help="number of the first of them")
    parser.add_argument("--only", default="", help="the lines of the table that have this in them")
    options = parser.parse_args()
    if unavailable():
        sys.exit(f"cuda-on-cpu: {unavailable()}")
    wrong = 0

    def line(what: str, tool: str, outcome: str, right: bool) -> None:
        nonlocal wrong
        wrong += not right
        print(f"{'' if right else 'WRONG: '}{what:45} {tool:16} {outcome}", flush=True)

    cases = f"--cases={options.cases}", f"--first={options.first}"
    as_they_are = [
        Tool(f"{options.cases} random cases", random_cases(*cases), flags=("-O2",)),
        Tool("all other tests", pytest(*OTHERS), flags=("-O2",)),
        ADDRESSES,
        THREADS,
    ]
    for tool in as_they_are:
        if options.only in tool.name:
            passed, found = tool.run()
            line("the kernels as they are", tool.name, found or ("nothing found" if passed else "failed"), passed and not found)
    if options.only in COVERAGE.name:
        missed = unreached()
        line("the kernels as they are", COVERAGE.name, "; ".join(missed) or "every line is reached", not missed)
    for what, tool, edit in BROKEN:
        if options.only in f"{what} {tool.name}":
            _, found = tool.run(edit)
            line(what, tool.name, found or "nothing found", bool(found))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
