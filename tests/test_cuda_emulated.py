"""Runs the tests of a GPU's kernels on csrc/cuda.cu compiled for the CPU (cuda_on_cpu/): in processes of their own, all at once."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from . import cuda_on_cpu

HERE = Path(__file__).parent
# The files, and how many of their tests need a true GPU: for CUDA graphs; for two devices, a model that moves, another stream.
FILES = {
    "test_gpu_ops": 1,
    "test_gpu_optimizer": 6,
    "test_gpu_random": 0,
    "test_policy": 0,
    "test_step_counts": 0,
    "test_masters": 0,
    "test_avgrad_ops": 0,
    "test_mada_ops": 0,
    "test_mada_random": 0,
    "test_online_ops": 0,
}

pytestmark = pytest.mark.skipif(bool(cuda_on_cpu.unavailable()), reason=str(cuda_on_cpu.unavailable()))


@pytest.fixture(scope="module")
def processes():
    environment = {**os.environ, "CUDA_ON_CPU": str(cuda_on_cpu.build()), "OMP_NUM_THREADS": "1"}
    started = {
        name: subprocess.Popen(
            [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(HERE / f"{name}.py")],
            cwd=HERE.parent,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for name in FILES
    }
    yield started
    for process in started.values():
        process.kill()
        process.communicate()


@pytest.mark.parametrize("name", FILES)
def test_emulated(name, processes):
    output = processes[name].communicate(timeout=900)[0]
    assert processes[name].returncode == 0, output
    counts = {what: int(count) for count, what in re.findall(r"(\d+) (passed|skipped)", output)}
    assert counts["passed"] >= 18, output
    assert counts.get("skipped", 0) == FILES[name], output
