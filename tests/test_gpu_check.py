"""`make gpu-check` without a GPU: the same parts, the report and the exit status."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench import gpu_check, gpu_profile, sanitize

ROOT = Path(__file__).parent.parent


def check(tmp_path, *arguments):
    command = [sys.executable, "-m", "bench.gpu_check", "--results", str(tmp_path), *arguments]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    results = tmp_path / "cpu-dry-run"
    report = results / "report.json"
    return run, json.loads(report.read_text()) if report.exists() else None, results


def test_tables_and_the_sanitizer_script_run_through(tmp_path):
    arguments = ["--device", "cpu", "--parts", "table", "memcheck", "--models", "148-tiny", "--seconds", "0.05"]
    run, report, results = check(tmp_path, *arguments)
    assert run.returncode == 0, run.stdout + run.stderr + (results / "report.md").read_text()
    names = ["table 148-tiny float32", "table 148-tiny bfloat16", "table 148-tiny MADA", "memcheck"]
    assert [part["name"] for part in report["parts"]] == names
    rows = {row["side"]: row for row in report["tables"][2]["rows"]}
    bytes_of = {"exact": 92, "lagged": 64, "frozen": 28}
    for backend in ("cpp", "reference"):
        assert {kind: rows[f"MADA {backend}, {kind}"]["bytes_per_element"] for kind in bytes_of} == bytes_of
        assert rows[f"AVGrad {backend}"]["bytes_per_element"] == 36
    assert rows["autograd's MADA"]["device_seconds"]["median"] > 0
    for table, update in zip(report["tables"][:2], (28, 22), strict=True):
        rows = {row["side"]: row for row in table["rows"]}
        assert rows["torch fused"]["ratio"]["median"] == 1
        assert rows["cpp: update alone"]["bytes_per_element"] == update
        assert rows["MetaAdamW cpp"]["bytes_per_element"] == {28: 36, 22: 28}[update]
        assert rows["MetaAdamW reference"]["device_seconds"]["median"] > 0
    text = (results / "report.md").read_text()
    assert "### 148-tiny, bfloat16: 148 tensors, 10,608 parameters" in text
    assert "### 148-tiny, float32, MADA: 148 tensors, 10,608 parameters" in text
    assert "Nothing was predicted for this GPU" in text
    assert text.count("#### Profile of MetaAdamW cpp\n") == 1  # of float32
    profile = next(row["profile"] for row in report["tables"][0]["rows"] if row["side"] == "MetaAdamW cpp")
    assert "metaadamw_fast::launch_update_" in {row["name"] for row in profile["idle"]["host"]}
    assert "every kernel has run" in (results / "memcheck.log").read_text()


def test_a_part_that_fails_hides_no_other(tmp_path):
    arguments = ["--device", "cpu", "--parts", "table", "memcheck", "--models", "no-such-model", "148-tiny", "--seconds", "0.05"]
    run, report, results = check(tmp_path, *arguments)
    assert run.returncode == 1
    status = {part["name"]: part["status"] for part in report["parts"]}
    assert status["table no-such-model float32"] == 2
    assert status["memcheck"] == status["table 148-tiny float32"] == 0
    text = (results / "report.md").read_text()
    assert "| table no-such-model float32 | failed (2) |" in text
    assert "invalid choice: 'no-such-model'" in text
    assert "### 148-tiny, float32" in text


def test_a_part_that_does_not_end_is_stopped_and_one_that_cannot_start_told(tmp_path):
    endless = gpu_check.Part("endless", [sys.executable, "-c", "import time; time.sleep(60)"], 0.5)
    outcome = gpu_check.run(endless, tmp_path, gpu_check.time.monotonic() + 100)
    assert outcome.status is None
    assert outcome.seconds < 20
    assert "stopped after" in outcome.end
    missing = gpu_check.run(gpu_check.Part("missing", ["no-such-program"], 5), tmp_path, gpu_check.time.monotonic() + 100)
    assert missing.status is None
    assert "no no-such-program on the PATH" in missing.end
    late = gpu_check.run(endless, tmp_path, gpu_check.time.monotonic() - 1)
    assert late.status is None
    assert "no time left" in late.end
    text = gpu_check.report([outcome, missing], [], {"device": "x"})
    assert "| endless | did not end |" in text


def test_the_figures_that_are_wanted():
    def table(model, ratio, share, launches):
        sides = ("MetaAdamW cpp", "cpp: update alone", "cpp: statistics alone")
        return {
            "model": model,
            "dtype": "float32",
            "rows": [
                {"side": side, "ratio": {"median": r}, "share_of_copy": share, "launches": n}
                for side, r, n in zip(sides, (ratio, 1.0, 0.3), (22, 1, launches), strict=True)
            ],
        }

    good = gpu_check.figures([table("gpt2-xl-1.56b", 1.4, 0.9, 1)])
    assert len(good) == 4
    assert all(ok for *_, ok in good)
    bad = {what.split(": ")[1]: ok for what, _, _, ok in gpu_check.figures([table("gpt2-xl-1.56b", 1.5, 0.8, 2)])}
    assert not bad["exact step / torch fused"]
    assert not bad["update alone, share of a copy's bandwidth"]
    assert not bad["launches of statistics and update"]
    assert bad["update alone / torch fused"]


def test_measured_times_are_held_against_the_predicted_ones():
    def row(side, measured, predicted):
        spread = {"median": measured, "q1": measured, "q3": measured}
        made = {"side": side, "device_seconds": spread, "host_seconds": spread, "ratio": spread}
        return made | ({"predicted_seconds": predicted} if predicted else {})

    rows = [
        row("torch fused", 1.1e-3, 1e-3),
        row("MetaAdamW cpp", 2.4e-3, 2e-3),
        row("cpp: update alone", 0.8e-3, 1e-3),
        row("x", 1.0, None),
    ]
    table = {
        "model": "m",
        "dtype": "float32",
        "tensors": 1,
        "parameters": 1,
        "rounds": 5,
        "copy_bytes_per_second": {"median": 1e12},
    }
    text = gpu_check.report([], [table | {"rows": rows}], {"device": "x"})
    assert "Of 3 predicted times 1 are within 15%" in text
    assert "| m | float32 | MetaAdamW cpp | 2.400 | 2.000 | +20% |" in text
    assert "| m | float32 | cpp: update alone | 0.800 | 1.000 | -20% |" in text
    assert "| torch fused | 1.100 | 1.000 (+10%) |" in text
    assert "| MetaAdamW cpp | 2.400 | **2.000 (+20%)** |" in text
    assert "| x | 1000.000 | - |" in text


def test_a_profile_counts_launches_and_the_gaps_between_them():
    launches = [
        gpu_profile.Launch("void (anonymous namespace)::adamw_update_kernel<false, false>(metaadamw::Table)", 30.0, 50.0),
        gpu_profile.Launch(
            "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>, X>(int)", 12.0, 14.0
        ),
        gpu_profile.Launch(
            "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>, X>(int)", 17.0, 18.0
        ),
        gpu_profile.Launch("void (anonymous namespace)::tensor_stats_kernel<false>(metaadamw::Table)", 0.0, 10.0),
    ]
    found = gpu_profile.timeline(launches)
    assert (found["launches"], found["busy_us"], found["gaps_us"]) == (4, 33.0, 2.0 + 3.0 + 12.0)
    assert [(row["name"], row["count"], row["device_us"], row["gap_us"]) for row in found["kernels"]] == [
        ("tensor_stats_kernel", 1, 10.0, 0.0),
        ("vectorized_elementwise_kernel (CUDAFunctor_add)", 2, 3.0, 5.0),
        ("adamw_update_kernel", 1, 20.0, 12.0),
    ]
    assert gpu_profile.timeline([])["launches"] == 0
    one = {**found, "host_us": 60.0, "host": [{"name": "aten::add", "count": 2, "host_us": 9.0}]}
    text = gpu_profile.markdown("MetaAdamW cpp", {"queued": one, "idle": {**one, "gaps_us": 40.0}})
    assert "4 launches: 33 µs of kernels, 17 µs between them (40 µs from an idle GPU" in text
    assert "| vectorized_elementwise_kernel (CUDAFunctor_add) | 2 | 3.0 | 5.0 | 5.0 |" in text


class Calls(TorchDispatchMode):
    """What is launched on elements, and with which options a kernel is chosen."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        arguments = {a.name: x for a, x in zip(function._schema.arguments, args, strict=False)} | (kwargs or {})
        name = function._schema.name.rpartition("::")[2]
        if "update_" in name and "vectors" not in name:
            sums = arguments.get("new_sums")
            self.seen.add((name, sums is not None and sums.shape[1] == 5, arguments.get("rounding_seed") is not None))
        elif "tensor_stats" in name or name == "launch_measure":
            self.seen.add((name, bool(arguments.get("count_nonzero")) or arguments.get("sums", 0) >= 1 << 5))
        elif function.namespace == "metaadamw_fast":
            self.seen.add((name,))
        return function(*args, **(kwargs or {}))


def test_the_sanitizer_script_reaches_every_kernel(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["sanitize", "--device", "cpu", "--backends", "cpp"])
    with Calls() as calls:
        sanitize.main()
    wanted = {("launch_update_", found, stochastic) for found in (False, True) for stochastic in (False, True)}
    wanted |= {("launch_measure", False), ("launch_measure", True), ("tensor_stats", True)}
    wanted |= {("adamw_update_", False, False), ("adamw_update_", False, True)}
    wanted |= {("group_features",), ("scaled_gradients",), ("modulation",)}
    assert wanted <= calls.seen, wanted - calls.seen


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path):
    run, report, _ = check(tmp_path)
    assert run.returncode == 2
    assert report is None
    assert "torch sees no GPU" in run.stdout
