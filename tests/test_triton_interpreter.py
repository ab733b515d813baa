"""Runs test_gpu_ops.py through Triton's interpreter: in other processes, since it is chosen when Triton is imported."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is built for Linux only")

PARTS = {"dtypes and sizes": "every_dtype", "everything else": "not every_dtype"}  # two processes, for two cores


@pytest.fixture(scope="module")
def processes():
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning"]
    command.append(str(Path(__file__).with_name("test_gpu_ops.py")))
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    started = {
        part: subprocess.Popen(
            [*command, "-k", chosen],
            cwd=Path(__file__).parent.parent,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for part, chosen in PARTS.items()
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
    assert int(re.search(r"(\d+) passed", output)[1]) > 30, output
