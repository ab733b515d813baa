"""Everything that needs a GPU, in one command: `make gpu-check`, or `python -m bench.gpu_check`.

Builds the extension with its CUDA kernels, runs the tests, compute-sanitizer and the benchmark tables, and writes
bench/results/<device>/report.md with report.json and the parts' whole output beside it. Measured times stand beside those that
bench/kernels.py predicted, and the whole steps of one model come with their profiles. It uses what is installed (torch,
triton, nvcc, pytest) and no network. Each part is a process with a time limit of its own: one that fails does not hide the
others. The exit status is 0 if every part passed and every figure was reached.

`--device cpu` goes through the same parts without a GPU, with what there is; that is how the tests run it.
"""

import argparse
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench.gpu_step import OFF, markdown, off
from bench.predictions import are_current

ROOT = Path(__file__).parent.parent
MODELS = ("resnet18-11.7m", "gpt2-124m", "gpt2-xl-1.56b", "2000x1", "10000x64")
PROFILED = "gpt2-124m"  # in float32: one table with profiles is enough to read
WITHOUT_GPU = ("test_cuda_build", "test_triton_compile", "test_triton_interpreter")  # proofs for machines that have none


@dataclass
class Part:
    """One process."""

    name: str
    command: list[str]
    limit: float  # seconds
    environment: dict[str, str] = field(default_factory=dict)
    table: Path | None = None  # the figures that it writes


@dataclass
class Outcome:
    """How a part ended: ``status`` 0 is well, None out of time or not started."""

    name: str
    status: int | None
    seconds: float
    end: str  # of its output


def parts(options: argparse.Namespace, results: Path) -> list[Part]:
    """What is to be done, in this order: the longest come last, so that they lose if time runs out."""
    python, device, gpu = options.python, options.device, options.device == "cuda"
    backends = ["--backends", *(("cpp", "triton") if gpu else ("cpp", "reference"))]
    build = {"METAADAMW_CUDA": "1" if gpu else "0"}
    # Without a GPU nothing is measured: one thread, so that a busy machine does not hold up those that wait for each other.
    threads = {} if gpu else {"OMP_NUM_THREADS": "1"}
    slack = 1 if gpu else 10  # the limits are those of a GPU machine
    if gpu:
        build["TORCH_CUDA_ARCH_LIST"] = "{}.{}".format(*torch.cuda.get_device_capability())
    # Compiling Triton's kernels takes most of the tests' time: processes side by side, where pytest-xdist is there.
    workers = ["-n", "8"] if gpu and importlib.util.find_spec("xdist") else []
    pytest = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *workers, "tests"]
    todo = [
        Part("build", [python, "setup.py", "build_ext", "--inplace"], 150, build),
        Part("gpu tests", [*pytest, "-m", "gpu"], 150),
    ]
    models = options.models or MODELS
    profiled = PROFILED if PROFILED in models else models[0]
    for model in models:
        for dtype in ("float32", "bfloat16"):
            table = results / f"{model}-{dtype}.json"
            command = [python, "-m", "bench.gpu_step", "--model", model, "--dtype", dtype, "--device", device, *backends]
            command += ["--seconds", str(options.seconds), "--json", str(table)]
            command += ["--profile"] * (model == profiled and dtype == "float32")
            todo.append(Part(f"table {model} {dtype}", command, 60 * slack, threads, table))
        if model == profiled:
            table = results / f"{model}-mada.json"
            command = [python, "-m", "bench.gpu_step", "--optimizer", "mada", "--model", model, "--device", device, *backends]
            command += ["--seconds", str(options.seconds), "--json", str(table)]
            todo.append(Part(f"table {model} MADA", command, 60 * slack, threads, table))
    script = [python, "-m", "bench.sanitize", "--device", device, *backends]
    for tool in ("memcheck", "racecheck", "initcheck"):
        checked = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *script] if gpu else script
        todo.append(Part(tool, checked, 90 * slack, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", **threads}))
    ignored = [f"--ignore=tests/{name}.py" for name in WITHOUT_GPU]
    todo.append(Part("other tests", [*pytest, "-m", "not gpu", *ignored], 240))
    return [part for part in todo if not options.parts or any(part.name.startswith(x) for x in options.parts)]


def run(part: Part, results: Path, end: float) -> Outcome:
    """Runs one part; its output goes to a file."""
    begin = time.monotonic()
    limit = min(part.limit, end - begin)
    log = results / f"{part.name.replace(' ', '-')}.log"
    status: int | None = None
    with log.open("w", encoding="utf-8") as output:
        if limit <= 0:
            output.write("not started: no time left\n")
        elif shutil.which(part.command[0]) is None:
            output.write(f"not started: there is no {part.command[0]} on the PATH\n")
        else:
            environment = {**os.environ, **part.environment}
            # A session of its own, so that what it started ends with it.
            process = subprocess.Popen(
                part.command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                status = process.wait(limit)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, 9)
                process.wait()
                output.write(f"\nstopped after {limit:.0f} s\n")
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return Outcome(part.name, status, time.monotonic() - begin, "\n".join(lines[-12:]))


def figures(tables: list[dict[str, Any]]) -> list[tuple[str, float, str, bool]]:
    """(what, measured, wanted, reached) of everything that this library claims on a GPU."""
    found = []
    for table in tables:
        if table["dtype"] != "float32" or not table["model"].startswith("gpt2"):
            continue
        rows = {row["side"]: row for row in table["rows"]}
        for backend in {name.split(":")[0] for name in rows if ":" in name}:
            exact, update = rows[f"MetaAdamW {backend}"], rows[f"{backend}: update alone"]
            measure = rows[f"{backend}: statistics alone"]
            where = f"{table['model']}, {backend}"
            ratio = exact["ratio"]["median"]
            found.append((f"{where}: exact step / torch fused", ratio, "<= 1.45", ratio <= 1.45))
            ratio = update["ratio"]["median"]
            found.append((f"{where}: update alone / torch fused", ratio, "<= 1.05", ratio <= 1.05))
            if "xl" in table["model"]:
                share = update["share_of_copy"]
                found.append((f"{where}: update alone, share of a copy's bandwidth", share, ">= 0.85", share >= 0.85))
            if "launches" in exact:
                both = measure["launches"] + update["launches"]
                found.append((f"{where}: launches of statistics and update", both, "<= 2", both <= 2))
    return found


def against_predictions(tables: list[dict[str, Any]]) -> list[str]:
    """How the measured times compare with the predicted ones, in Markdown."""
    known = [(table, row, by) for table in tables for row in table["rows"] if (by := off(row)) is not None]
    if not known:
        return ["", "Nothing was predicted for this GPU: bench/results/predictions.md has those of which it was."]
    lines = ["", f"Of {len(known)} predicted times {sum(abs(by) <= OFF for *_, by in known)} are within {OFF:.0%}. The others:", ""]
    lines += ["| model | dtype | side | measured ms | predicted ms | off by |", "|---|---|---|---|---|---|"]
    for table, row, by in sorted(known, key=lambda x: -abs(x[2])):
        if abs(by) > OFF:
            cells = [table["model"], table["dtype"], row["side"]]
            cells += [f"{row['device_seconds']['median'] * 1e3:.3f}", f"{row['predicted_seconds'] * 1e3:.3f}", f"{by:+.0%}"]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def report(outcomes: list[Outcome], tables: list[dict[str, Any]], about: dict[str, str]) -> str:
    """The report, in Markdown."""
    lines = [f"# {about['device']}", "", *(f"- {name}: {value}" for name, value in about.items() if name != "device"), ""]
    lines += ["| part | result | seconds |", "|---|---|---|"]
    for outcome in outcomes:
        result = "passed" if outcome.status == 0 else "did not end" if outcome.status is None else f"failed ({outcome.status})"
        lines.append(f"| {outcome.name} | {result} | {outcome.seconds:.0f} |")
    if tables:
        lines += ["", "| figure | measured | wanted | |", "|---|---|---|---|"]
        lines += [f"| {what} | {x:.2f} | {wanted} | {'reached' if ok else 'MISSED'} |" for what, x, wanted, ok in figures(tables)]
        lines += against_predictions(tables)
    lines += [f"\n{markdown(table)}" for table in tables]
    for outcome in outcomes:
        if outcome.status != 0:
            lines += ["", f"### the end of: {outcome.name}", "", "```", outcome.end, "```"]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Runs the parts and writes the report; returns the exit status."""
    parser = argparse.ArgumentParser(description="Everything that needs a GPU, in one command.")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--parts", nargs="+", help="only: build gpu table memcheck racecheck initcheck other")
    parser.add_argument("--models", nargs="+", help="of the tables")
    parser.add_argument("--seconds", type=float, default=4.0, help="of timing per table")
    parser.add_argument("--limit", type=float, default=530.0, help="seconds for everything")
    parser.add_argument("--python", default=sys.executable, help="that has torch")
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("torch sees no GPU here; --device cpu goes through the parts without one")
        return 2
    name = torch.cuda.get_device_name() if options.device == "cuda" else "cpu-dry-run"
    results = options.results / re.sub(r"\W+", "-", name).strip("-").lower()
    results.mkdir(parents=True, exist_ok=True)
    kernels = ROOT / "metaadamw_fast" / "kernels"
    if options.device == "cuda" and not kernels.exists():
        kernels.symlink_to("../kernels")  # where an installation has them; this runs from the sources
    end = time.monotonic() + options.limit * (1 if options.device == "cuda" else 10)
    outcomes: list[Outcome] = []
    tables: list[dict[str, Any]] = []
    about = {"device": name, "torch": torch.__version__, "Python": platform.python_version(), "CUDA": str(torch.version.cuda)}
    about["predictions"] = "of these sources" if are_current() else "of other sources: `python -m bench.kernels` makes them anew"
    for part in parts(options, results):
        if part.table is not None:
            part.table.unlink(missing_ok=True)  # of an earlier run
        outcomes.append(run(part, results, end))
        print(f"{part.name}: {'passed' if outcomes[-1].status == 0 else 'FAILED'} after {outcomes[-1].seconds:.0f} s", flush=True)
        if part.table is not None and part.table.exists():
            tables.append(json.loads(part.table.read_text()))
        # Written after every part: what stops this program leaves a report of what was done.
        (results / "report.md").write_text(report(outcomes, tables, about), encoding="utf-8")
    missed = [what for what, _, _, ok in figures(tables) if not ok] if options.device == "cuda" else []
    whole = {"about": about, "parts": [asdict(outcome) for outcome in outcomes], "tables": tables, "missed": missed}
    (results / "report.json").write_text(json.dumps(whole, indent=1), encoding="utf-8")
    for what in missed:
        print(f"MISSED: {what}")
    print(f"see {results / 'report.md'}")
    return 0 if not missed and all(outcome.status == 0 for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
