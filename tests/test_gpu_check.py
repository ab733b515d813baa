"""`make gpu-check` without a GPU: the same parts, the report and the exit status."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import gpu_check

ROOT = Path(__file__).parent.parent


def check(tmp_path, *arguments):
    command = [sys.executable, "-m", "bench.gpu_check", "--results", str(tmp_path), *arguments]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    results = tmp_path / "cpu-dry-run"
    report = results / "report.json"
    return run, json.loads(report.read_text()) if report.exists() else None, results


def test_tables_and_the_sanitizer_script_run_through(tmp_path):
    arguments = ["--device", "cpu", "--parts", "table", "memcheck", "--models", "148-tiny", "--seconds", "0.2"]
    run, report, results = check(tmp_path, *arguments)
    assert run.returncode == 0, run.stdout + run.stderr + (results / "report.md").read_text()
    assert [part["name"] for part in report["parts"]] == ["table 148-tiny float32", "table 148-tiny bfloat16", "memcheck"]
    for table, update in zip(report["tables"], (28, 22), strict=True):
        rows = {row["side"]: row for row in table["rows"]}
        assert rows["torch fused"]["ratio"]["median"] == 1
        assert rows["cpp: update alone"]["bytes_per_element"] == update
        assert rows["MetaAdamW cpp"]["bytes_per_element"] == {28: 36, 22: 28}[update]
        assert rows["MetaAdamW reference"]["device_seconds"]["median"] > 0
    text = (results / "report.md").read_text()
    assert "### 148-tiny, bfloat16: 148 tensors, 10,608 parameters" in text
    assert "every kernel has run" in (results / "memcheck.log").read_text()


def test_a_part_that_fails_hides_no_other(tmp_path):
    arguments = ["--device", "cpu", "--parts", "table", "memcheck", "--models", "no-such-model", "148-tiny", "--seconds", "0.1"]
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


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path):
    run, report, _ = check(tmp_path)
    assert run.returncode == 2
    assert report is None
    assert "torch sees no GPU" in run.stdout
