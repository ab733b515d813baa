"""Ops and optimizer through Triton's interpreter, in other processes: it is chosen when Triton is imported."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is built for Linux only")

# A process each: the arguments of pytest, and how many tests pass at least.
PARTS = {
    "dtypes and sizes": (["test_gpu_ops.py", "-k", "every_dtype"], 30),
    "everything else": (["test_gpu_ops.py", "-k", "not every_dtype"], 30),
    "around the encoder": (["test_policy.py"], 100),
    "AVGrad": (["test_avgrad_ops.py"], 40),
    "MADA": (["test_mada_triton.py"], 65),
    "online learning": (["test_online_ops.py", "-k", "fp32 or elsewhere or columns or master or vectors"], 15),
    "step counts": (["test_step_counts.py"], 18),
    "masters": (["test_masters.py"], 50),
    "the optimizer": (["test_gpu_optimizer.py", "-k", "float32 and (clipping or lagged or enhanced)"], 3),
}


@pytest.fixture(scope="module")
def processes():
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    started = {
        part: subprocess.Popen(
            [*command, str(Path(__file__).with_name(file)), *chosen],
            cwd=Path(__file__).parent.parent,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for part, ((file, *chosen), _) in PARTS.items()
    }
    yield started
    for process in started.values():
        process.kill()
        process.communicate()


@pytest.mark.parametrize("part", PARTS)
def test_interpreted(part, processes):
    output = processes[part].communicate(timeout=900)[0]
    assert processes[part].returncode == 0, output
    skipped = re.search(r"(\d+) skipped", output)
    assert skipped is None or int(skipped[1]) == 1, output  # CUDA graphs
    assert int(re.search(r"(\d+) passed", output)[1]) >= PARTS[part][1], output
