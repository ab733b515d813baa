"""pytest-benchmark timings of the encoder at G = 24, D = 8; ratios: `python -m bench.encoder`."""

from collections.abc import Callable
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.encoder import BASE, sides, with_backward, without_grad


@pytest.mark.parametrize("wrap", [without_grad, with_backward])
@pytest.mark.parametrize("side", [BASE, "GroupEncoder"])
def test_encoder(benchmark: BenchmarkFixture, side: str, wrap: Callable[..., Any]) -> None:
    """One forward pass, or one forward and backward pass."""
    function = sides(groups=24, dim=8, layers=2, heads=4, hidden=32)[side]
    benchmark(wrap(function))
