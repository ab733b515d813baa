"""The multi-tensor ops against `reference` on float64 copies, within the derived bounds of tolerances.py."""

import itertools
import random

import pytest
import torch

from metaadamw_fast import ops

from .cases import (
    BLOCK,
    CHUNK,
    DTYPES,
    F32,
    F64,
    LAYOUTS,
    LOW,
    SHAPES,
    SIZES,
    Hyper,
    assert_sums,
    assert_updated,
    clone,
    place,
    random_lists,
    same_bits,
)
from .tolerances import bias_correction_bound, unit_roundoff

CPP_AND_LOW = [("cpp", dtypes) for dtypes in DTYPES] + [("reference", dtypes) for dtypes in LOW]
PER_BACKEND = pytest.mark.parametrize(("backend", "dtypes"), CPP_AND_LOW)
BACKENDS = pytest.mark.parametrize("backend", ["cpp", "reference"])


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ------------------------------------------------------------------------------------------------------------ dtypes and sizes


@pytest.mark.parametrize("result", [F32, F64])
@PER_BACKEND
def test_sums_of_every_dtype_and_size(backend, dtypes, result):
    lists = random_lists(SIZES, dtypes)
    stats = lists.stats(backend, dtype=result)
    assert stats.dtype == result
    assert_sums(stats, lists, result)


@pytest.mark.parametrize("dtypes", DTYPES)
def test_sums_and_counts_of_small_integers_are_exact(dtypes):
    lists = random_lists(SIZES, dtypes, integers=True)
    p, g, m, v = lists.doubled()[:4]
    exact = [[(x * y).sum() for x, y in ((a, a), (a, b), (b, b), (c, c), (d, d))] for a, b, c, d in zip(g, m, p, v, strict=True)]
    counts = [[x.count_nonzero(), y.count_nonzero()] for x, y in zip(g, m, strict=True)]
    want = torch.tensor([a + b for a, b in zip(exact, counts, strict=True)], dtype=F64)
    assert torch.equal(lists.stats(), want)
    dots = ops.tensor_dots(lists.grads, lists.exp_avgs, dtype=F64, backend="cpp")
    assert torch.equal(dots, want[:, 1])


@BACKENDS
def test_sums_across_blocks_and_chunks_are_in_float64(backend):
    x = torch.zeros(3 * CHUNK // BLOCK, BLOCK)
    x[0, 0] = 2.0**12  # its square swallows a 1 that is added to it in float32
    x[1:, :16] = 1.0  # one for each lane
    sums = ops.tensor_stats([x], [x], dtype=F64, backend=backend)
    assert sums.tolist() == [[2.0**24 + 16 * (len(x) - 1)] * 3]


@pytest.mark.parametrize("grad_scale", [None, -1.0, "tensor"])
@pytest.mark.parametrize("start", ["zero states", "amsgrad"])
@PER_BACKEND
def test_update_of_every_dtype_and_size(backend, dtypes, start, grad_scale):
    lists = random_lists(SIZES, dtypes, amsgrad=start == "amsgrad")
    if start == "zero states":  # nothing hides an error of (1-beta2)*g*g
        lists = lists.replaced("exp_avgs", torch.zeros_like).replaced("exp_avg_sqs", torch.zeros_like)
    scale = torch.linspace(0.25, 2, len(SIZES), dtype=F64) if grad_scale == "tensor" else grad_scale
    h = Hyper(step=1 if start == "zero states" else 3, grad_scale=scale)
    assert_updated(lists.map(clone).update(h, backend), lists, h)


def test_update_reads_the_hyperparameters_of_each_tensor():
    lists = random_lists([(3,), (CHUNK + 1,), (), (BLOCK + 1,)], "fp32")
    of_tensors = [[0.1, 1, 3, 0, 0.5, 1e-8], [0, 0.5, 1, 0.9, 0.999, 1], [0.3, -1, 700, 0.4, 0, 0], [2, 0.99, 9, 0.99, 0.9, 1e-3]]
    h = Hyper(*torch.tensor(of_tensors, dtype=F64).t())
    assert_updated(lists.map(clone).update(h), lists, h)


@pytest.mark.parametrize("dtypes", ["fp32", "fp64", "bf16"])
@pytest.mark.parametrize("zero", ["beta1", "beta2", "eps", "step_size", "decay_factor", "grad_scale"])
def test_hyperparameters_of_zero(zero, dtypes):
    lists = random_lists([(5,), (BLOCK + 3,)], dtypes)
    h = Hyper()._replace(**{zero: 0.0})
    after = lists.map(clone).update(h)
    assert_updated(after, lists, h)
    if zero == "beta1" and dtypes != "bf16":
        assert all(map(same_bits, after.exp_avgs, lists.grads))  # exactly g


def test_eps_of_zero_divides_zero_by_zero_as_torch_does():
    lists = random_lists([(BLOCK + 3,)], "fp32")
    for name in ("grads", "exp_avgs", "exp_avg_sqs"):
        getattr(lists, name)[0][7] = 0.0
    after = lists.map(clone).update(Hyper(eps=0.0))
    assert_updated(after, lists, Hyper(eps=0.0))
    assert after.params[0].isnan().nonzero().tolist() == [[7]]


@pytest.mark.parametrize("step", [1, 2, 10, 999, 1_000_000, 16_000_000])
@pytest.mark.parametrize(("beta1", "beta2"), [(0.9, 0.999), (0.999, 0.9999999), (0.0, 0.5)])
def test_bias_corrections_equal_python_pow(step, beta1, beta2):
    p, g, m, v = ([torch.tensor([x], dtype=F64)] for x in (0.25, 0.5, 0.75, 2.0))
    ops.adamw_update_(p, g, m, v, 0.1, 0.99, step=step, betas=(beta1, beta2), eps=1e-8, backend="cpp")
    new_m, new_v = beta1 * 0.75 + (1 - beta1) * 0.5, beta2 * 2.0 + (1 - beta2) * 0.25
    update = 0.1 * (new_m / (1 - beta1**step)) / ((new_v / (1 - beta2**step)) ** 0.5 + 1e-8)
    relative = bias_correction_bound(beta1, step) + bias_correction_bound(beta2, step) / 2 + 41 * unit_roundoff(F64)
    assert abs(p[0].item() - (0.99 * 0.25 - update)) <= relative * update + 6 * unit_roundoff(F64) * 0.25


# ------------------------------------------------------------------------------------------------------------ memory layouts


OPERANDS = ("params", "grads", "exp_avgs", "exp_avg_sqs", "maxima", "all")
PLACES = [x for x in itertools.product(OPERANDS, LAYOUTS) if x[0] == "grads" or x[1] != "expanded"]  # what is written may not be


@pytest.mark.parametrize(("operands", "layout"), PLACES)
def test_every_operand_in_every_layout(operands, layout):
    names = ["params", "grads", "exp_avgs", "exp_avg_sqs", "maxima"] if operands == "all" else [operands]
    for dtypes in ("fp32", "bf16, fp32 states", "fp64, low states"):
        lists = random_lists(SHAPES, dtypes, amsgrad=True)
        whole = random_lists(SHAPES, dtypes, amsgrad=True, integers=True)
        for name in names:
            lists = lists.replaced(name, lambda x: place(x, **LAYOUTS[layout]))
            whole = whole.replaced(name, lambda x: place(x, **LAYOUTS[layout]))
        after = lists.map(clone).update(Hyper())
        assert_updated(after, lists, Hyper())
        dense = lists.map(lambda x: x.contiguous().clone()).update(Hyper())
        assert after.same_bits(dense), "a strided operand and its contiguous copy give different bits"
        assert torch.equal(whole.stats(), whole.map(torch.Tensor.contiguous).stats("reference")), "integers: sums are exact"
        assert_sums(lists.stats(dtype=F32), lists, F32)


def test_gradient_strides_differ_from_the_parameters():
    orders = list(itertools.permutations(range(3)))
    lists = random_lists([(5, 6, 7)] * len(orders) ** 2, "fp32")
    pairs = list(itertools.product(orders, repeat=2))
    lists = lists._replace(
        params=[place(x, order) for x, (order, _) in zip(lists.params, pairs, strict=True)],
        grads=[place(x, order) for x, (_, order) in zip(lists.grads, pairs, strict=True)],
    )
    assert_updated(lists.map(clone).update(Hyper()), lists, Hyper())


@pytest.mark.parametrize("seed", range(24))
def test_random_lists(seed):
    chosen = random.Random(seed)
    shapes = [[chosen.choice((0, 1, 2, 3, 5, 17, 40)) for _ in range(chosen.randrange(5))] for _ in range(chosen.randrange(1, 12))]
    dtypes, backend = chosen.choice(list(DTYPES)), chosen.choice(("cpp", "cpp", "reference"))
    lists = random_lists(shapes, dtypes, seed, amsgrad=True)
    for name in lists._fields:
        layouts = [LAYOUTS[x] for x in LAYOUTS if name == "grads" or x != "expanded"]
        lists = lists.replaced(name, lambda x, layouts=layouts: place(x, **chosen.choice(layouts)))
    lists = lists.replaced("maxima", lambda x: chosen.choice((x, torch.empty(0))))
    assert_sums(lists.stats(backend, dtype=F32), lists, F32)

    def each(low, high):
        return torch.tensor([chosen.uniform(low, high) for _ in shapes], dtype=F64)

    steps = torch.tensor([chosen.choice((1, 2, 50, 12345)) for _ in shapes], dtype=F64)
    scale = chosen.choice((None, -1.0, each(0.1, 3)))
    h = Hyper(each(0.01, 0.5), each(0.8, 1), steps, each(0, 0.99), each(0.5, 0.9999), chosen.choice((0.0, 1e-8, 1e-3)), scale)
    assert_updated(lists.map(clone).update(h, backend), lists, h)


# ------------------------------------------------------------------------------------------------------------ shape of the lists


@BACKENDS
@pytest.mark.parametrize(
    "sizes",
    [[0], [0, 0, 0], [0, 5, CHUNK + 1], [5, 0, CHUNK + 1], [CHUNK + 1, 5, 0], [0, CHUNK, 0, 0, CHUNK + 1, 0], [CHUNK], [1] * 3000],
)
def test_empty_tensors_anywhere_and_many_tiny_ones(sizes, backend):
    lists = random_lists([(n,) for n in sizes], "fp32")
    stats = lists.stats(backend)
    assert_sums(stats, lists, F64)
    assert not stats[torch.tensor(sizes) == 0].any()
    assert_updated(lists.map(clone).update(Hyper(), backend), lists, Hyper())


@BACKENDS
def test_no_tensors_at_all(backend):
    for second in (None, []):
        stats = ops.tensor_stats([], [], second, second, count_nonzero=True, dtype=F64, backend=backend)
        assert stats.shape == (0, 5 if second is None else 7)
        assert stats.dtype == F64
    ops.adamw_update_([], [], [], [], 0.1, 0.9, step=1, backend=backend)


@BACKENDS
def test_any_iterable_is_a_list(backend):
    lists = random_lists([(3,), (BLOCK + 1,)], "fp32", amsgrad=True)

    def generators(lists):
        return lists._replace(**{name: (x for x in tensors) for name, tensors in lists._asdict().items()})

    assert same_bits(generators(lists).stats(backend), lists.stats(backend))
    want, after = lists.map(clone).update(Hyper(), backend), lists.map(clone)
    generators(after).update(Hyper(), backend)
    assert after.same_bits(want)


@BACKENDS
def test_columns(backend):
    lists = random_lists([(3,), (0,), (BLOCK + 1,)], "fp32")
    lists.grads[0][1] = lists.exp_avgs[2][5] = 0.0
    everything = lists.stats(backend)
    p, g, m, v, _ = lists
    for params, squares, count, dtype in itertools.product((None, p), (None, v), (False, True), (F32, F64)):
        columns = [0, 1, 2] + [3] * (params is not None) + [4] * (squares is not None) + [5, 6] * count
        stats = ops.tensor_stats(g, m, params, squares, count_nonzero=count, dtype=dtype, backend=backend)
        assert same_bits(stats, everything[:, columns].to(dtype))
    assert everything[:, 5:].tolist() == [[2, 3], [0, 0], [BLOCK + 1, BLOCK]]


@pytest.mark.parametrize("name", ["params", "grads", "exp_avgs", "exp_avg_sqs", "maxima"])
def test_an_empty_operand_may_have_any_strides(name):
    lists = random_lists([(0, 4), (3, 4)], "fp32", amsgrad=True)
    lists._asdict()[name][0] = torch.empty(0, 1).expand(0, 4)
    assert_sums(lists.stats(), lists, F64)
    assert_updated(lists.map(clone).update(Hyper()), lists, Hyper())


@BACKENDS
def test_a_missing_gradient_counts_as_zeros(backend):
    lists = random_lists([(3,), (4, 5), (BLOCK + 1,)], "fp32")
    missing = lists._replace(grads=[lists.grads[0], torch.empty(0), torch.empty(0)])
    zeros = lists._replace(grads=[lists.grads[0], *(torch.zeros_like(x) for x in lists.grads[1:])])
    assert same_bits(missing.stats(backend), zeros.stats(backend))


@BACKENDS
def test_a_tensor_without_maximum_is_updated_as_without_amsgrad(backend):
    lists = random_lists([(5,), (BLOCK + 1,), (0,), (7,)], "fp32", amsgrad=True)
    some = lists._replace(maxima=[lists.maxima[0], torch.empty(0), lists.maxima[2], torch.empty(0)])
    after = some.map(clone).update(Hyper(), backend)
    assert_updated(after, some, Hyper())
    for maxima, chosen in ((None, [1, 3]), (lists.maxima, [0, 2])):
        alone = lists._replace(maxima=maxima).map(clone).update(Hyper(), backend)
        assert all(same_bits(after.params[t], alone.params[t]) for t in chosen)
    assert not same_bits(lists._replace(maxima=None).map(clone).update(Hyper(), backend).params[0], after.params[0])
