"""pytest-benchmark timings of one step of a MiniGPT: `pytest bench --benchmark-only`.

pytest-benchmark times one side after the other: good for watching one side. Compare sides with `python -m bench.step`.
"""

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.optimizers import CONTENDERS, Workload


@pytest.mark.parametrize("side", ["fused", "clip", "ours"])
def test_minigpt_step(benchmark: BenchmarkFixture, side: str) -> None:
    """One step on 1.7 M parameters."""
    workload = Workload("minigpt-1.7m")
    contender = CONTENDERS[side](workload)
    contender.warm_up(workload)
    benchmark.extra_info["bytes_per_element"] = 4 * (contender.words or 0)
    benchmark(contender.step)
