"""Step counts beyond 2^24, where float32 stands still: features, vectors and the dice of stochastic rounding take exact ones."""

import pytest
import torch

from metaadamw_fast import FeatureConfig, ops, rounding
from metaadamw_fast.features import feature_table, training_progress
from metaadamw_fast.grouping import Member

BACKENDS = ["cpp", "reference"]
LARGE = 2**24


def backend_of(name):
    return ops.resolve_backend(name, torch.device("cpu"))


def hyper(count):
    one = torch.ones(count, dtype=torch.float64)
    return [0.1 * one, 0.01 * one, 0.9 * one, (1 - 2.0**-26) * one, 1e-8 * one]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_modulation_takes_both_dtypes(backend, dtype):
    scales, group_of = torch.ones(4, 1), torch.zeros(3, dtype=torch.long)
    steps = torch.tensor([0, 1, LARGE], dtype=dtype)
    vectors = backend_of(backend).modulation(scales, group_of, *hyper(3), None, steps, None, False)
    assert vectors[2].tolist() == [1, 2, LARGE + 1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_counts_are_exact(backend):
    scales, group_of = torch.ones(4, 1), torch.zeros(2, dtype=torch.long)
    steps = torch.tensor([LARGE + 1, 2**40 + 1], dtype=torch.float64)
    vectors = backend_of(backend).modulation(scales, group_of, *hyper(2), None, steps, None, False)
    assert vectors[2].tolist() == [LARGE + 2, 2**40 + 2]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_time_feature_takes_both_dtypes(backend, dtype):
    config = FeatureConfig("basic")
    p = torch.ones(3)
    table = feature_table([Member(p, "p", "other", 0)], [0], 1, config, 6, torch.empty(0, dtype=torch.float64))
    done = torch.tensor([7.0, LARGE + 1], dtype=dtype)[1]
    features = backend_of(backend).group_features(torch.ones(1, 5, dtype=torch.float64), table, done, 1, 2**25)
    assert features[0, config.time_column].item() == training_progress(float(done) + 1, 2**25)


def bits(backend, step, seed=7):
    p = torch.full((256,), 1.0 + 2**-9).bfloat16()
    state = [torch.zeros(256, dtype=torch.bfloat16) for _ in range(2)]
    grads = [torch.full((256,), 0.5, dtype=torch.bfloat16)]
    ops.adamw_update_(
        [p], grads, [state[0]], [state[1]], 1e-3, 1.0, step=float(step), betas=(0.0, 0.0), rounding_seed=seed, backend=backend
    )
    return p.tolist()


@pytest.mark.parametrize("step", [LARGE, 2**32 - 1, 2**32, 2**40, 2**52])
def test_neighbouring_steps_round_differently(step):
    found = [bits("cpp", step + i) for i in range(3)]
    assert found[0] != found[1] != found[2] != found[0]
    assert found == [bits("reference", step + i) for i in range(3)]


def test_steps_of_equal_low_halves_round_differently():
    assert bits("cpp", 5) != bits("cpp", 2**32 + 5)
    assert bits("cpp", 5) != bits("cpp", 2**33 + 5)


def test_small_steps_keep_their_dice():
    step, element = torch.tensor(5.0, dtype=torch.float64), torch.arange(3)
    assert rounding.random_bits(1, step, 2, rounding.PARAM, element).tolist() == [1866730436, 1174881390, 2047555486]
