"""What the compilers make of the kernels on elements, and how long they should take: `python -m bench.kernels`.

    python -m bench.kernels [--csrc DIR] [--against OLD.json] [--architectures 9.0] [--results DIR]

Compiles csrc/cuda.cu with nvcc and the Triton kernels ahead of time for sm_80, sm_90 and sm_100, reads registers, shared memory and
spills from ptxas and the loops over 16-byte groups from the SASS (bench/loops.py), and predicts by bench/model.py what share of the
memory bandwidth each reaches and how long whole steps take. It needs no GPU and measures nothing. predictions.md and
predictions.json go to bench/results; `make gpu-check` holds them against what it measures. `--against` prints what has changed
since another such file.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from bench.compiled import ARCHITECTURES, ROOT, Kernel, build, compile_cuda, compile_triton, cuda_home, kind, sources_hash
from bench.loops import BOTH, FOUND, UPDATE, Case, LoopNotFoundError, cases, cuda_loop, triton_loop
from bench.predictions import RESULTS, Compiled, changes, markdown, predict


def chunk_of(csrc: Path) -> int:
    """Elements of a GPU's chunk, as the sources say."""
    text = "".join(path.read_text() for path in build()["source_files"](csrc) if path.suffix in (".h", ".cuh"))
    found = {name: int(value) for name, value in re.findall(r"constexpr \w+ (k\w*Chunk\w*) = (\d+);", text)}
    on_gpu = [value for name, value in found.items() if re.search("gpu|cuda|device", name, re.IGNORECASE)]
    chosen = on_gpu or list(found.values())
    if len(chosen) != 1:
        raise SystemExit(f"bench.kernels: which of {found} in {csrc} is the GPU's chunk? Say it: --chunk N")
    return chosen[0]


def find_kernel(kernels: dict[str, Kernel], name: str) -> Kernel:
    """The kernel of this name, which may have got more template arguments since.

    Raises:
        LoopNotFoundError: there is none, or more than one.
    """
    found = [x for x in kernels if x == name or x.startswith(name.removesuffix(">") + ",")]
    if len(found) != 1:
        raise LoopNotFoundError(
            f"csrc/cuda.cu has {len(found)} kernels {name}, not one; it has {', '.join(sorted(kernels))}."
            " A kernel was renamed: teach bench/loops.py its name"
        )
    return kernels[found[0]]


def compile_all_cuda(csrc: Path, architectures: list[str], chunk: int, directory: Path) -> list[Compiled]:
    """Every case of csrc/cuda.cu."""
    with ThreadPoolExecutor(2) as pool:
        jobs = {a: pool.submit(compile_cuda, a, directory / a, csrc) for a in architectures}
        kernels = {a: job.result() for a, job in jobs.items()}
    return [
        Compiled("cpp", case, a, (kernel := find_kernel(kernels[a], case.kernel)), cuda_loop(kernel, case), chunk)
        for case in cases()
        for a in architectures
    ]


def triton_constants(case: Case) -> tuple[Any, dict[str, Any]]:
    """The Triton kernel of a case and its compile-time arguments."""
    from metaadamw_fast.kernels.adamw import ADAMW
    from metaadamw_fast.kernels.engine import measure_constants, measure_kernel, update_constants, update_kernel

    kinds = (kind(*({4: 1, 2: 2}[size] for size in case.loads)),)
    if not case.is_update:
        return measure_kernel, measure_constants(ADAMW, (0, 1, 2, 3, 4) if len(case.loads) == 4 else (0, 1, 2), kinds)
    sums = ADAMW.found[-1] if case.kernel in (FOUND, BOTH) else len(ADAMW.left)
    constants = update_constants(ADAMW, sums, kinds)
    if case.kernel in (UPDATE, FOUND):
        constants["rounding_seed"] = None
    return update_kernel, constants


def compile_all_triton(architectures: list[str], directory: Path) -> list[Compiled]:
    """The same cases in Triton, but for misaligned addresses."""
    from metaadamw_fast.kernels.elements import BLOCK, CHUNK, WARPS
    from metaadamw_fast.kernels.engine import register_limit

    made = []
    for case in cases():
        for a in architectures if case.whole else ():
            function, constants = triton_constants(case)
            limit = {}
            if case.is_update:
                limit = register_limit(constants["kinds"], bool(constants["found"]), "rounding_seed" not in constants)
            kernel = compile_triton(function, constants, int(a.replace(".", "")), directory / "triton", num_warps=WARPS, **limit)
            renamed = case._replace(kernel=function.__name__)
            loop = triton_loop(kernel, renamed, BLOCK.value // kernel.threads)
            made.append(Compiled("triton", renamed, a, kernel, loop, CHUNK.value))
    return made


def main() -> int:
    """Compiles, predicts, writes; returns the exit status."""
    parser = argparse.ArgumentParser(description="The kernels as compiled, and how long they should take.")
    parser.add_argument("--csrc", type=Path, default=ROOT / "csrc", help="another folder of C++ sources")
    parser.add_argument("--chunk", type=int, help="elements of a GPU's chunk; default: as the sources say")
    parser.add_argument("--against", type=Path, metavar="OLD.json", help="print what has changed since")
    parser.add_argument("--architectures", nargs="+", default=list(ARCHITECTURES), choices=ARCHITECTURES)
    parser.add_argument("--backends", nargs="+", default=["cpp", "triton"], choices=["cpp", "triton"])
    parser.add_argument("--results", type=Path, default=RESULTS, help="where predictions.md and predictions.json go")
    options = parser.parse_args()
    if cuda_home() is None:
        print("bench.kernels: there is no nvcc (set CUDA_HOME)")
        return 2
    before = json.loads(options.against.read_text(encoding="utf-8")) if options.against else None
    with tempfile.TemporaryDirectory() as directory:
        chunk = options.chunk or chunk_of(options.csrc)
        compiled = compile_all_cuda(options.csrc, options.architectures, chunk, Path(directory))
        if "triton" in options.backends:
            compiled += compile_all_triton(options.architectures, Path(directory))
    found = predict(compiled, sources_hash(options.csrc))
    options.results.mkdir(parents=True, exist_ok=True)
    (options.results / "predictions.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (options.results / "predictions.md").write_text(markdown(found), encoding="utf-8")
    print(markdown(found) if before is None else changes(before, found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
