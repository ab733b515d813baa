"""How the tests share a machine among several processes: what every process of them sees before it imports torch.

The files that take longest come first, so that no worker of pytest-xdist is left alone with one at the end.
"""

import os
from pathlib import Path

# An idle thread of OpenMP spins, and takes the core that another worker's thread waits for: such tests took three times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

LONGEST_FIRST = (
    "test_cuda_build.py",
    "test_triton_interpreter.py",
    "test_cuda_emulated.py",
    "test_triton_compile.py",
    "test_gpu_check.py",
    "test_killed.py",
    "test_sharding.py",
    "test_resharding.py",
    "test_mada_cases.py",
    "test_mada_ops.py",
)


def pytest_collection_modifyitems(items):
    def place(item):
        name = Path(item.path).name
        return LONGEST_FIRST.index(name) if name in LONGEST_FIRST else len(LONGEST_FIRST)

    items.sort(key=place)
