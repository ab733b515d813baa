"""Which elements the CUDA kernels touch: their index functions, run on the CPU by cuda_mapping.cpp."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent / "cuda_mapping.cpp"
COMPILER = shutil.which(os.environ.get("CXX", "g++"))


@pytest.mark.skipif(COMPILER is None, reason="there is no g++")
@pytest.mark.skipif(not (SOURCE.parent.parent / "csrc").is_dir(), reason="the C++ sources are not here")
def test_every_element_is_touched_once_and_where_it_lies(tmp_path):
    program = tmp_path / "cuda_mapping"
    flags = ["-std=c++20", "-pthread", "-O2", "-Wall", "-Werror", "-fsanitize=undefined", "-fno-sanitize-recover=all"]
    subprocess.run([COMPILER, *flags, str(SOURCE), "-o", str(program)], check=True)
    run = subprocess.run([str(program)], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
