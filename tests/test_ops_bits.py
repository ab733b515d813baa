"""The multi-tensor ops: what must be equal in every bit, what a non-finite value may touch, and their behaviour as torch ops."""

import itertools

import pytest
import torch

from metaadamw_fast import ops

from .cases import BLOCK, CHUNK, F32, F64, Hyper, clone, place, random_lists, same_bits

BACKENDS = pytest.mark.parametrize("backend", ["cpp", "reference"])


def test_equal_bits_whatever_the_threads_and_the_list():
    sizes = [3, CHUNK + 5, 0, 9 * CHUNK + 17, 1, 4 * CHUNK, *range(1, 200)]
    lists = random_lists([(n,) for n in sizes], "fp32", amsgrad=True)
    stats, after = lists.stats(), lists.map(clone).update(Hyper())
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 2, 3):
            torch.set_num_threads(count)
            assert same_bits(lists.stats(), stats)
            assert lists.map(clone).update(Hyper()).same_bits(after)
    finally:
        torch.set_num_threads(threads)
    for chosen in ([1], [3, 2], [4, 3, 0]):
        part = lists.rows(chosen)
        assert same_bits(part.stats(), stats[chosen])
        assert part.map(clone).update(Hyper()).same_bits(after.rows(chosen))


@pytest.mark.parametrize("grad_scale", [1.0, -1.0])
def test_a_factor_of_one_changes_no_bit_and_minus_one_negates(grad_scale):
    lists = random_lists([(5,), (BLOCK + 1,)], "fp32")
    scaled = lists.map(clone).update(Hyper(grad_scale=grad_scale))
    plain = lists.replaced("grads", lambda x: x * grad_scale).map(clone).update(Hyper())
    assert all(map(same_bits, scaled.params + scaled.exp_avgs, plain.params + plain.exp_avgs))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e30])
@BACKENDS
def test_non_finite_values_stay_where_they_are(backend, bad):
    lists = random_lists([(40,), (BLOCK + 40,), (40,)], "fp32", amsgrad=True)
    stats, after = lists.stats(backend), lists.map(clone).update(Hyper(), backend)
    spoiled = lists.replaced("grads", torch.clone)
    spoiled.grads[1][BLOCK + 3] = bad
    spoiled_stats, spoiled_after = spoiled.stats(backend, dtype=F32), spoiled.map(clone).update(Hyper(), backend)
    assert same_bits(spoiled_stats[[0, 2]], stats[[0, 2]].float())
    assert not spoiled_stats[1, 0].isfinite()
    elsewhere = torch.arange(BLOCK + 40) != BLOCK + 3
    for name in ("params", "exp_avgs", "exp_avg_sqs", "maxima"):
        for t, (x, y) in enumerate(zip(getattr(spoiled_after, name), getattr(after, name), strict=True)):
            kept = elsewhere if t == 1 else slice(None)
            assert same_bits(x[kept], y[kept])


@BACKENDS
def test_amsgrad_takes_the_maximum_as_torch_does(backend):
    nan, inf = float("nan"), float("inf")
    values = torch.tensor(list(itertools.product([0.0, 1.0, inf, nan], repeat=2)))  # of the second moment and the maximum
    lists = random_lists([(len(values),)], "fp32", amsgrad=True)
    lists.grads[0].zero_()
    lists.exp_avg_sqs[0].copy_(values[:, 0])
    lists.maxima[0].copy_(values[:, 1])
    want = torch.maximum(values[:, 1], 0.5 * values[:, 0])
    maxima = lists.update(Hyper(beta2=0.5), backend).maxima[0]
    torch.testing.assert_close(maxima, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("step", [1, 3], ids=["dense", "strided"])
@BACKENDS
def test_every_float16_is_read_and_every_rounding_to_it_is_torchs(backend, step):
    halves = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.float16)
    halves = halves[halves.isfinite()]
    up = halves.float().nextafter(torch.tensor(torch.inf))
    between = (halves.float() + halves.nextafter(torch.tensor(torch.inf, dtype=torch.float16)).float()) / 2  # ties
    values = torch.cat([halves.float(), up, between, torch.tensor([65519.9, 65520.0, -1e9, 1e-30, 2e-40])])
    values = values[values.isfinite()]
    n = len(values)
    p, v, m = (place(torch.zeros(n, dtype=torch.float16), step=step) for _ in range(3))
    ops.adamw_update_([p], [values], [m], [v], 0.0, 0.0, step=1, betas=(0.0, 0.0), eps=1.0, backend=backend)
    assert torch.equal(m, values.half())  # beta1 = 0: the momentum is the gradient
    p = place(halves, step=step)
    zeros = [torch.zeros(len(halves)) for _ in range(3)]
    ops.adamw_update_(zeros[:1], [p], zeros[1:2], zeros[2:], 0.0, 0.0, step=1, betas=(0.0, 0.0), eps=1.0, backend=backend)
    assert torch.equal(zeros[1], halves.float())


# ------------------------------------------------------------------------------------------------------------ as torch ops


@BACKENDS
def test_the_version_of_every_written_tensor_is_bumped(backend):
    lists = random_lists([(3,), (), (5, 2)], "fp32", amsgrad=True).replaced("params", torch.nn.Parameter)
    before = [x._version for x in lists.tensors()]
    lists.stats(backend)
    assert [x._version for x in lists.tensors()] == before
    lists.update(Hyper(), backend)
    written = {id(x) for x in lists.params + lists.exp_avgs + lists.exp_avg_sqs + lists.maxima}
    for x, version in zip(lists.tensors(), before, strict=True):
        assert (x._version > version) == (id(x) in written)


@pytest.mark.parametrize("dtypes", ["fp32", "bf16, fp32 states", "fp64"])
def test_opcheck(dtypes):
    p, g, m, v, maxima = random_lists([(3,), (2, 5)], dtypes, amsgrad=True)
    g[1] = place(g[1], order=(1, 0))
    hyper = [torch.full((2,), x, dtype=F64) for x in (0.1, 0.99, 3.0, 0.9, 0.999, 1e-8)]
    for params, squares, count in ((p, v, True), (None, None, False)):
        torch.library.opcheck(torch.ops.metaadamw_fast.tensor_stats.default, (g, m, params, squares, count, F32))
    for optional, scale in ((None, None), (maxima, torch.ones(2, dtype=F64))):
        torch.library.opcheck(torch.ops.metaadamw_fast.adamw_update_.default, (p, g, m, v, optional, *hyper, scale))
