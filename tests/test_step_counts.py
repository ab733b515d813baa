"""Step counts beyond 2^24, where float32 stands still: features, vectors and the dice of stochastic rounding take exact ones.

test_triton_interpreter.py and test_cuda_emulated.py run this with their kernels.
"""

import pytest
import torch

from metaadamw_fast import FeatureConfig, ops, reference, rounding
from metaadamw_fast.features import feature_table, training_progress
from metaadamw_fast.grouping import Member

from .cases import BF16, F32, F64, same_bits
from .optimizers import AVGRAD
from .test_policy import PLACES, modulation_arguments, place, run, statistics_of, table_of  # noqa: F401

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
    table = feature_table([Member(p, "p", 0, "other")], [0], 1, config, 6, torch.empty(0, dtype=torch.float64))
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


COUNTS = [0, 1, 2**24 - 1, 2**24, 2**24 + 1, 2**24 + 2, 2**31, 2**32 - 2, 2**32 - 1, 2**32, 2**40 + 3, 2**53 - 2]


@pytest.mark.parametrize("count", COUNTS)
def test_features_know_the_exact_progress(run, count):  # noqa: F811
    config = FeatureConfig("basic")
    statistics = statistics_of(6, config, F64)
    table = table_of(config, [0, 1, 2, 1, 0, 2], statistics)
    found = run("group_features", statistics, table, torch.tensor(float(count), dtype=F64), 1, 2**25)
    assert (found[:, config.time_column] == (count + 1) / 2**25).all()
    narrow = torch.tensor(float(count))
    if narrow.double() == count:
        assert same_bits(found, run("group_features", statistics, table, narrow, 1, 2**25))


@pytest.mark.parametrize("released", [False, True])
def test_vectors_of_an_update_have_the_exact_count(run, released):  # noqa: F811
    tensors = len(COUNTS)
    scales, group_of, *hyper, _ = modulation_arguments(tensors)
    counts = torch.tensor(COUNTS, dtype=F64)
    found = run("modulation", scales, group_of, *hyper, counts, None, released)
    assert found[2].tolist() == [x + 1 for x in COUNTS]
    plain = reference.modulation(scales, group_of, *hyper, counts, None, released)
    torch.testing.assert_close(found, run("update_vectors", *plain.unbind()), rtol=1e-12, atol=0, equal_nan=True)
    exact = counts.float().double() == counts
    narrow = run("modulation", scales, group_of, *hyper, counts.float(), None, released)
    assert same_bits(found[:, exact], narrow[:, exact])
    assert narrow[2, COUNTS.index(2**24 + 1)] == 2**24 + 1  # rounded to the count before


@pytest.mark.parametrize("dtype", [torch.int64, torch.float16])
def test_counts_are_of_float32_or_float64(run, dtype):  # noqa: F811
    config = FeatureConfig("basic")
    statistics = statistics_of(6, config, F32)
    table = table_of(config, [0, 1, 2, 1, 0, 2], statistics)
    with pytest.raises(RuntimeError, match=r"done must"):
        run("group_features", statistics, table, torch.tensor(3, dtype=dtype), 1, None)
    *arguments, steps = modulation_arguments(6)
    with pytest.raises(RuntimeError, match=r"steps must"):
        run("modulation", *arguments, steps.to(dtype), None, False)


@pytest.fixture(params=[place(*x) for x in [("reference", "cpu"), *PLACES]])
def throw(request):
    """One roll of the dice: a parameter of ones that an update brings to 1.003."""
    backend, device = request.param

    def throw(step, seed=7):
        lists = [[torch.ones(3000, dtype=BF16, device=device)], *([torch.zeros(3000, device=device)] for _ in range(3))]
        ops.adamw_update_(*lists, 0.0, 1.003, step=float(step), rounding_seed=seed, backend=backend)
        return lists[0][0].cpu()

    return throw


def test_every_count_throws_the_dice_anew(throw):
    thrown = [throw(count + 1) for count in COUNTS]
    for i, x in enumerate(thrown):
        step = torch.tensor(COUNTS[i] + 1.0, dtype=F64)
        random = rounding.random_bits(7, step, 0, rounding.PARAM, torch.arange(3000))
        assert same_bits(x, rounding.round_stochastically(torch.full((3000,), 1.003), BF16, random).to(BF16))
        rate = 1 - 0.003 / 2**-7  # of landing on 1
        for y in thrown[:i]:
            assert abs((x != y).float().mean() - 2 * rate * (1 - rate)) < 0.05


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_mean_of_an_avgrad_counts_exactly(backend):
    p = torch.nn.Parameter(torch.zeros(3, dtype=F64))
    opt = AVGRAD([p], betas=(0.0, 0.0), backend=backend)
    p.grad = torch.ones(3, dtype=F64)
    opt.step()
    opt.state[p]["step"].fill_(LARGE)
    mean = opt.state[p]["average_sq"].zero_()
    expected = 0.0
    for k in range(LARGE + 1, LARGE + 5):
        opt.step()
        expected += (1 - expected) / k
        torch.testing.assert_close(mean, torch.full_like(mean, expected), rtol=1e-12, atol=0)  # another k: 6e-8


def test_neighbouring_steps_of_an_avgrad_round_differently():
    found = {}
    for backend in BACKENDS:
        p = torch.nn.Parameter(torch.ones(256, dtype=BF16))
        opt = AVGRAD([p], lr=1e-3, stochastic_rounding=True, seed=7, backend=backend)
        p.grad = torch.ones_like(p)
        opt.step()
        opt.state[p]["step"].fill_(LARGE)
        for step in range(3):
            with torch.no_grad():
                p.fill_(1.0)
            opt.step()
            found[backend, step] = p.detach().clone()
    for step in range(3):
        assert same_bits(found["cpp", step], found["reference", step])
        assert 0 < (found["cpp", step] != 1).sum() < 256
        assert not torch.equal(found["cpp", step], found["cpp", (step + 1) % 3])


# As of the time when counts were float32 and a row had five operands.
DICE = {
    (1, 1): [3378948736, 270927722, 1203375014, 3273213949, 2533454034],
    (1, 2): [1608670130, 2969323141, 3764363525, 1073290461, 680357469],
    (1, 3): [536496400, 1153765614, 3960184235, 1234671776, 3162758720],
    (16777217, 1): [2650829013, 2766058158, 1296345127, 3185049764, 3271697289],
    (16777217, 2): [668671421, 1733010403, 877868515, 1580574616, 1627710874],
    (16777217, 3): [3720831683, 3844506307, 1472356476, 3359611353, 4060392960],
    (4294967295, 1): [1482831577, 2686277827, 3367764525, 3464105500, 2490717164],
    (4294967295, 2): [1214128185, 3730084646, 3240401101, 701985512, 3385470430],
    (4294967295, 3): [1791163191, 1949734242, 2990924298, 3971200204, 1051810392],
}


def test_the_dice_of_counts_below_2_32_and_of_large_tensors_stay():
    element = torch.tensor([0, 1, 2**32 - 1, 2**32, 2**33 + 5])
    drawn = {
        (step, operand): rounding.random_bits(2**40 + 5, torch.tensor(float(step), dtype=F64), 3, operand, element).tolist()
        for step, operand in DICE
    }
    assert drawn == DICE
