"""Predictions of the kernels and of whole steps: what `python -m bench.kernels` writes, and `make gpu-check` reads."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from bench import model
from bench.compiled import ROOT, Kernel, sources_hash
from bench.loops import TYPES, Case, fixed_cycles
from bench.model import GPU, GPUS, Resources, Work
from bench.shapes import named_shapes
from bench.warp import Loop

RESULTS = ROOT / "bench" / "results"
MODELS = ("minigpt-1.7m", "gpt2-124m", "gpt2-xl-1.56b", "2000x1", "10000x64")
DTYPES = {"float32": "fp32", "bfloat16": "bf16, fp32 states"}  # of a table of bench/gpu_step.py, and what its kernels are here

# Kernels of a step besides those on elements: features, encoder and modulation, most of them eager operations. With lagged
# statistics some more keep what the next step needs. tests/test_encoder_graph.py counts them.
BETWEEN = {"exact": 39, "lagged": 42}


class Compiled(NamedTuple):
    """A case on one architecture."""

    backend: str
    case: Case
    architecture: str
    kernel: Kernel
    loop: Loop
    chunk: int

    def work(self, tensors: int = 148, several_chunks: bool = True) -> Work:
        """As the model takes it."""
        resources = Resources(self.kernel.threads, self.kernel.registers, self.kernel.shared)
        fixed = sum(fixed_cycles(self.kernel, self.case.is_update, tensors, several_chunks).values())
        return Work(self.loop, resources, sum(self.case.loads), sum(self.case.stores), fixed)


def row(compiled: Compiled) -> dict[str, Any]:
    """One line of the table."""
    gpus = [gpu for gpu in GPUS if gpu.architecture == compiled.architecture]
    work = compiled.work()
    resident = work.resources.resident(gpus[0])
    return {
        "backend": compiled.backend,
        "case": compiled.case.name,
        "architecture": compiled.architecture,
        "registers": compiled.kernel.registers,
        "shared_bytes": compiled.kernel.shared,
        "spill_bytes": compiled.kernel.spills,
        "threads": work.resources.threads,
        "blocks_per_multiprocessor": resident,
        "instructions_per_element": round(compiled.loop.instructions, 1),
        "bytes_in_flight": round(compiled.loop.bytes_in_flight * work.resources.threads * resident),
        "bytes_per_element": compiled.case.bytes,
        "fixed_cycles": fixed_cycles(compiled.kernel, compiled.case.is_update, 148, several_chunks=True),
        "issue_share_at_peak": {gpu.name: round(work.issue_share(gpu), 3) for gpu in gpus},
        # Stores of 4 bytes in a stride of 16 take four times their bytes of the second-level cache, which the model leaves out.
        "is_upper_bound": not compiled.case.whole,
        "share_of_peak": {gpu.name: round(work.saturated_share(gpu, compiled.chunk), 3) for gpu in gpus},
    }


def step_seconds(compiled: list[Compiled], gpu: GPU, name: str, dtype: str) -> dict[str, float]:
    """Seconds of device time of each side of a table of bench/gpu_step.py."""
    numels = [math.prod(shape) for _, shape in named_shapes(name)]
    label = DTYPES[dtype]
    word = TYPES[label][1]
    here = {
        (x.backend, x.case.name.removesuffix(f"; {label}")): x
        for x in compiled
        if x.architecture == gpu.architecture and x.case.name.endswith(f"; {label}")
    }
    small = model.GAP + model.SMALL

    def launch(backend: str, what: str) -> float:
        x = here[backend, what]
        chunks = sum(max(-(-numel // x.chunk), 1) for numel in numels)
        return model.GAP + x.work(len(numels), max(numels) > x.chunk).seconds(gpu, chunks, sum(numels))

    seconds: dict[str, float] = {}
    for backend in dict.fromkeys(backend for backend, _ in here):
        if not seconds:
            # At the bandwidth that our update reaches, but in as many launches as torch needs, none shorter than a small kernel.
            update = here[backend, "update"]
            launches = model.torch_launches(numels)
            moved = 7 * word * sum(numels) / (update.work().saturated_share(gpu, update.chunk) * gpu.bandwidth)
            seconds["torch fused"] = launches * model.GAP + max(moved, launches * model.SMALL)
        statistics, update_alone, lagged = (launch(backend, what) for what in ("statistics of g, m", "update", "lagged"))
        exact = statistics + update_alone
        seconds[f"MetaAdamW {backend}"] = exact + BETWEEN["exact"] * small
        seconds[f"MetaAdamW {backend}, lagged"] = lagged + BETWEEN["lagged"] * small
        if backend == "cpp":
            seconds["MetaAdamW cpp, encoder_graph"] = exact + BETWEEN["exact"] * (model.GRAPH_GAP + model.SMALL)
        seconds[f"{backend}: update alone"] = update_alone
        seconds[f"{backend}: statistics alone"] = statistics
        seconds[f"{backend}: features and encoder alone"] = (BETWEEN["exact"] - 1) * small  # without the modulation
    return seconds


def predict(compiled: list[Compiled], sources: str) -> dict[str, Any]:
    """Everything that is written; ``sources`` is their hash."""
    architectures = {x.architecture for x in compiled}
    steps = [
        {"gpu": gpu.name, "device": gpu.device, "model": name, "dtype": dtype, "seconds": step_seconds(compiled, gpu, name, dtype)}
        for gpu in GPUS
        if gpu.architecture in architectures
        for name in MODELS
        for dtype in DTYPES
    ]
    return {
        "sources": sources,
        "chunks": {x.backend: x.chunk for x in compiled},
        "between": BETWEEN,
        "rows": [row(x) for x in compiled],
        "steps": steps,
    }


def are_current(file: Path = RESULTS / "predictions.json") -> bool:
    """Whether there are predictions, of the sources as they are now."""
    return file.exists() and json.loads(file.read_text(encoding="utf-8")).get("sources") == sources_hash()


def predicted(device_name: str, name: str, dtype: str, file: Path = RESULTS / "predictions.json") -> dict[str, float]:
    """Seconds of each side of a table of bench/gpu_step.py on this GPU; empty where nothing was predicted for it."""
    if not file.exists():
        return {}
    for step in json.loads(file.read_text(encoding="utf-8"))["steps"]:
        if device_name.startswith(step["device"]) and (step["model"], step["dtype"]) == (name, dtype):
            seconds: dict[str, float] = step["seconds"]
            return seconds
    return {}


# ------------------------------------------------------------------------------------------------------------------- printing


def _table(heads: list[str], lines: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [heads, ["---"] * len(heads), *lines])


def _shares(shares: dict[str, float]) -> str:
    return ", ".join(f"{share:.0%}" for share in shares.values())


def kernel_table(rows: list[dict[str, Any]], architecture: str) -> str:
    """The kernels on one architecture."""
    gpus = ", ".join(gpu.name for gpu in GPUS if gpu.architecture == architecture)
    heads = ["backend", "kernel", "registers", "shared", "spills", "blocks × threads", "instructions / element", "in flight, KiB"]
    heads += ["bytes / element", f"issue slots at peak ({gpus})", f"predicted share of peak ({gpus})"]
    lines = [
        [
            r["backend"], r["case"], str(r["registers"]), str(r["shared_bytes"]), str(r["spill_bytes"]),
            f"{r['blocks_per_multiprocessor']} × {r['threads']}", f"{r['instructions_per_element']:.0f}",
            f"{r['bytes_in_flight'] / 1024:.0f}", str(r["bytes_per_element"]), _shares(r["issue_share_at_peak"]),
            "≤ " * r["is_upper_bound"] + _shares(r["share_of_peak"]),
        ]
        for r in rows
        if r["architecture"] == architecture
    ]  # fmt: skip
    return _table(heads, lines)


def step_table(steps: list[dict[str, Any]], dtype: str) -> str:
    """Whole steps: milliseconds of device time, and what they are of torch's fused AdamW."""
    sides = [side for side in steps[0]["seconds"] if side.startswith(("torch", "MetaAdamW"))]
    lines = []
    for step in steps:
        if step["dtype"] == dtype:
            base = step["seconds"]["torch fused"]
            cells = [f"{x * 1e3:.3f} ({x / base:.2f})" for side, x in step["seconds"].items() if side in sides]
            lines.append([step["gpu"], step["model"], *cells])
    return _table(["GPU", "model", *sides], lines)


ABOUT = """Written by `python -m bench.kernels` from what nvcc and Triton make of the kernels. **Nothing here was measured**:
`make gpu-check` on a GPU holds these figures against its own and flags what is off by more than 15 %. The model, each formula with
its reason and its source, is bench/model.py; the loops are found in the SASS by bench/loops.py.

- *In flight*: bytes of loads that the resident blocks of a multiprocessor wait for at a time. CUB wants {saturating}.
- *Issue slots at peak*: of those that all multiprocessors have, what the kernel would need to move the data sheet's bandwidth.
- *Share of peak*: of that bandwidth, on full chunks without end; a chunk has {chunks} elements. *≤*: an upper bound.
- Where operands are float32 and bfloat16 mixed, C++ rows are a mean of the ways for float32 and for 16 bits throughout, weighted by
  how often each operand is converted."""

ABOUT_STEPS = """A launch waits {gap:.1f} µs for the kernel before it, {graph_gap:.1f} in a CUDA graph; each of the small kernels
around the encoder takes {small:.1f} µs besides. There are {between}. torch's fused AdamW moves 7 words an element at the share of
the bandwidth that our update reaches. In bfloat16, MetaAdamW keeps float32 states and torch bfloat16 ones: it takes no others."""


def markdown(found: dict[str, Any]) -> str:
    """predictions.md."""
    saturating = ", ".join(f"{gpu.saturating >> 10} KiB ({gpu.name})" for gpu in GPUS)
    chunks = " or ".join(f"{chunk:,} ({backend})" for backend, chunk in found["chunks"].items())
    parts = ["# The kernels as compiled, and how long they should take", ABOUT.format(saturating=saturating, chunks=chunks)]
    for architecture in sorted({r["architecture"] for r in found["rows"]}, key=float):
        parts += [f"## sm_{architecture.replace('.', '')}", kernel_table(found["rows"], architecture)]
    between = "{exact} ({lagged} lagged)".format(**found["between"])
    microseconds = {"gap": model.GAP * 1e6, "graph_gap": model.GRAPH_GAP * 1e6, "small": model.SMALL * 1e6}
    parts += [
        "## Whole steps: ms of device time (ratio to torch's fused AdamW)",
        ABOUT_STEPS.format(between=between, **microseconds),
    ]
    for dtype in DTYPES:
        parts += [f"### {dtype}", step_table(found["steps"], dtype)]
    return "\n\n".join(parts) + "\n"


def changes(before: dict[str, Any], after: dict[str, Any]) -> str:
    """What differs between two files of predictions, as before → after; of the architectures and backends that both have."""
    old, new = ({(r["backend"], r["case"], r["architecture"]): r for r in found["rows"]} for found in (before, after))
    columns = (
        "registers",
        "spill_bytes",
        "blocks_per_multiprocessor",
        "instructions_per_element",
        "bytes_in_flight",
        "share_of_peak",
    )

    def cell(row: dict[str, Any], column: str) -> str:
        return _shares(row[column]) if column == "share_of_peak" else str(row[column])

    lines = []
    for key in old.keys() & new.keys():
        pairs = [(cell(old[key], column), cell(new[key], column)) for column in columns]
        if any(a != b for a, b in pairs):
            lines.append([*key, *(a if a == b else f"{a} → **{b}**" for a, b in pairs)])
    only = [
        f"only {when}: {', '.join(map(str, sorted(x)))}"
        for when, x in (("before", old.keys() - new), ("after", new.keys() - old))
        if x
    ]
    parts = [_table(["backend", "kernel", "architecture", *columns], sorted(lines)) if lines else "No kernel has changed.", *only]
    past = {(s["gpu"], s["model"], s["dtype"]): s["seconds"] for s in before["steps"]}
    lines = []
    for step in after["steps"]:
        key = step["gpu"], step["model"], step["dtype"]
        for side, seconds in step["seconds"].items():
            was = past.get(key, {}).get(side)
            if was is not None and abs(seconds / was - 1) > 0.01:
                lines.append([*key, side, f"{was * 1e3:.3f} → **{seconds * 1e3:.3f}**", f"{seconds / was - 1:+.0%}"])
    parts.append(_table(["GPU", "model", "dtype", "side", "ms", ""], lines) if lines else "No step changes by more than 1 %.")
    return "\n\n".join(parts)
