"""Runs the tests of the GPU's kernels on csrc/cuda.cu compiled for the CPU (cuda_on_cpu/), in a process of their own."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from . import cuda_on_cpu

HERE = Path(__file__).parent
FILES = ("test_gpu_ops.py", "test_gpu_optimizer.py", "test_gpu_random.py")


@pytest.mark.skipif(bool(cuda_on_cpu.unavailable()), reason=str(cuda_on_cpu.unavailable()))
def test_emulated():
    environment = {**os.environ, "CUDA_ON_CPU": str(cuda_on_cpu.build()), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *(str(HERE / name) for name in FILES)]
    run = subprocess.run(command, cwd=HERE.parent, env=environment, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stdout + run.stderr
    counts = {what: int(count) for count, what in re.findall(r"(\d+) (passed|skipped)", run.stdout)}
    assert counts["passed"] > 400, run.stdout
    assert counts["skipped"] == 3, run.stdout  # CUDA graphs, two devices, a model that moves
