"""The kernels of the device that is there, on all cases: with a GPU the Triton and the C++ ones on it.

Without one, in a process with TRITON_INTERPRET=1 (test_triton_interpreter.py starts it), the Triton kernels interpreted on the CPU;
with CUDA_ON_CPU (test_cuda_emulated.py) the CUDA kernels there; else the C++ ones of the CPU, which shows that what is asked of the
others here is right. The update is compared in every bit with the C++ backend on the CPU, the sums with the float64 reference
within derived bounds. One file, because one process interprets it.
"""

import itertools
import os
import random

import pytest
import torch

from metaadamw_fast import ops

from . import emulated
from .cases import (
    BLOCK,
    CHUNK,
    DTYPES,
    F32,
    F64,
    LAYOUTS,
    SHAPES,
    SIZES,
    SIZES_OF_A_GPU,
    Hyper,
    assert_sums,
    assert_updated,
    clone,
    memory_of,
    place,
    random_lists,
    same_bits,
)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
EMULATED = emulated.use()
if INTERPRETED or EMULATED:
    SIZES = SIZES_OF_A_GPU
DEVICE = torch.device("cuda" if torch.cuda.is_available() and not INTERPRETED and not EMULATED else "cpu")
BACKENDS = ["triton"] if INTERPRETED else ["emulated"] if EMULATED else ["triton", "cpp"] if DEVICE.type == "cuda" else ["cpp"]
pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True, scope="module", params=BACKENDS)
def backend(request):
    """Under test; the functions below take it from here."""
    reason = ops._unavailable(request.param, DEVICE)
    if reason is not None:
        pytest.skip(reason)
    global backend_name, launch_class
    backend_name = request.param
    launch_class = ops.resolve_backend(request.param, DEVICE).launch
    return request.param


@pytest.fixture(autouse=True, scope="module")
def _patch_the_language_once_per_kernel():
    """Triton's interpreter patches triton.language in every nested call of a jitted function: most of the time of these tests.

    Here a kernel does it once for each set of modules that its functions see, and undoes it at its end as before.
    """
    if not INTERPRETED:
        yield
        return
    import triton.language as tl
    from triton.runtime import interpreter

    original, patched = interpreter._patch_lang, set()

    def patch_once(fn):
        seen = frozenset(value.__name__ for value in fn.__globals__.values() if value is tl or value is tl.core)
        if seen in patched:
            return None
        outermost = not patched
        patched.add(seen)
        scope = original(fn)
        if outermost:
            restore = scope.restore

            def restore_and_forget():
                patched.clear()
                restore()

            scope.restore = restore_and_forget
        return scope

    interpreter._patch_lang = patch_once
    yield
    interpreter._patch_lang = original


def to(device, x):
    """A copy with the same strides, offset and surroundings on another device."""
    return None if x is None else memory_of(x).to(device, copy=True).as_strided(x.shape, x.stride(), x.storage_offset())


def launched(lists, written=True):
    """A launch of copies on the device, and these."""
    there = lists.map(lambda x: to(DEVICE, x))
    launch = launch_class(there.grads, there.exp_avgs, there.params, there.exp_avg_sqs, there.maxima, written=written)
    return launch, there


def hyper_vectors(h, count):
    return h.vectors(count, backend_name, DEVICE)


def back(lists):
    return lists.map(lambda x: to("cpu", x))


def sums_of(launch, dtype=F64):
    return launch.tensor_stats(True, True, True, dtype).cpu()


def assert_same_update(lists, h):
    """Updates a copy; it is what the C++ backend makes of it, bit for bit, and within the bounds; so are the new sums."""
    launch, there = launched(lists)
    new_sums = torch.full((len(lists.params), 2), -1.0, dtype=F64, device=DEVICE)
    launch.update_(hyper_vectors(h, len(lists.params)), new_sums)
    after = back(there)
    assert_updated(after, lists, h)
    assert after.same_bits(lists.map(clone).update(h, "cpp")), "other bits than the C++ backend on the CPU"
    assert same_bits(new_sums.cpu(), sums_of(launch)[:, 3:5])
    return after


# ------------------------------------------------------------------------------------------------------------ dtypes and sizes


@pytest.mark.parametrize("dtypes", DTYPES)
def test_sums_of_every_dtype_and_size(dtypes):
    lists = random_lists(SIZES, dtypes)
    launch, _ = launched(lists, written=False)
    stats = sums_of(launch)
    assert_sums(stats, lists, F64)
    low = sums_of(launch, F32)
    assert same_bits(low, stats.to(F32))
    assert_sums(low, lists, F32)


@pytest.mark.parametrize("dtypes", DTYPES)
def test_sums_and_counts_of_small_integers_are_exact(dtypes):
    lists = random_lists([(), (0,), (3,), (BLOCK,), (CHUNK + 1,)], dtypes, integers=True)
    launch, _ = launched(lists, written=False)
    assert torch.equal(sums_of(launch), lists.stats("cpp"))


@pytest.mark.parametrize(("start", "grad_scale"), [("zero states", None), ("amsgrad", "tensor"), ("any", -1.0)])
@pytest.mark.parametrize("dtypes", DTYPES)
def test_update_of_every_dtype_and_size(dtypes, start, grad_scale):
    lists = random_lists(SIZES, dtypes, amsgrad=start == "amsgrad")
    if start == "zero states":
        lists = lists.replaced("exp_avgs", torch.zeros_like).replaced("exp_avg_sqs", torch.zeros_like)
    scale = torch.linspace(0.25, 2, len(SIZES), dtype=F64) if grad_scale == "tensor" else grad_scale
    assert_same_update(lists, Hyper(step=1 if start == "zero states" else 3, grad_scale=scale))


def test_several_dtypes_and_layouts_in_one_list():
    parts = [random_lists([(5,), (3, BLOCK)], dtypes, seed, amsgrad=True) for seed, dtypes in enumerate(DTYPES)]
    lists = parts[0]._replace(**{name: [x for part in parts for x in getattr(part, name)] for name in parts[0]._fields})
    moved = [place(x, order=(1, 0)) if t % 4 == 1 else x for t, x in enumerate(lists.grads)]
    maxima = [torch.empty(0) if t % 3 == 0 else x for t, x in enumerate(lists.maxima)]
    lists = lists._replace(grads=moved, maxima=maxima)
    launch, _ = launched(lists, written=False)
    assert_sums(sums_of(launch), lists, F64)
    assert_same_update(lists, Hyper(grad_scale=0.5))


def test_update_reads_the_hyperparameters_of_each_tensor():
    lists = random_lists([(3,), (CHUNK + 1,), (), (BLOCK + 1,)], "fp32")
    of_tensors = [[0.1, 1, 3, 0, 0.5, 1e-8], [0, 0.5, 1, 0.9, 0.999, 1], [0.3, -1, 700, 0.4, 0, 0], [2, 0.99, 9, 0.99, 0.9, 1e-3]]
    assert_same_update(lists, Hyper(*torch.tensor(of_tensors, dtype=F64).t()))


@pytest.mark.parametrize("dtypes", ["fp32", "fp64", "bf16"])
@pytest.mark.parametrize("zero", ["beta1", "beta2", "eps", "step_size", "decay_factor", "grad_scale"])
def test_hyperparameters_of_zero(zero, dtypes):
    assert_same_update(random_lists([(5,), (BLOCK + 3,)], dtypes), Hyper()._replace(**{zero: 0.0}))


@pytest.mark.parametrize("step", [1, 2, 10, 999, 1_000_000, 16_000_000])
@pytest.mark.parametrize(("beta1", "beta2"), [(0.9, 0.999), (0.999, 0.9999999), (0.0, 0.5)])
def test_bias_corrections(step, beta1, beta2):
    assert_same_update(random_lists([(3,)], "fp64"), Hyper(step=step, beta1=beta1, beta2=beta2))


@pytest.mark.parametrize("dtypes", DTYPES)
def test_the_update_also_sums_what_it_finds(dtypes):
    """With the bits of a pass before it; of every row, also where it has no gradient or its step is 0."""
    lists = random_lists([(3,), (CHUNK + 5,), (0,), (2, BLOCK), (BLOCK + 2,), (5,)], dtypes)
    lists = lists._replace(grads=[*lists.grads[:4], torch.empty(0, dtype=lists.grads[4].dtype), lists.grads[5]])
    h = Hyper(step=torch.tensor([3.0, 3, 3, 3, 3, 0], dtype=F64))
    launch, there = launched(lists)
    before = sums_of(launch)
    new_sums = torch.full((6, 5), -1.0, dtype=F64, device=DEVICE)
    launch.update_(hyper_vectors(h, 6), new_sums)
    expected = lists.map(clone)
    expected.launch("cpp").update_(h.vectors(6))
    assert back(there).same_bits(expected)
    assert same_bits(new_sums.cpu(), before[:, :5])


def test_a_row_whose_step_is_zero_is_left_alone():
    lists = random_lists([(3,), (CHUNK + 5,), (0,), (7,)], "fp32", amsgrad=True)
    lists.grads[1].fill_(float("inf"))
    launch, there = launched(lists)
    new_sums = torch.full((4, 2), -1.0, dtype=F64, device=DEVICE)
    step = torch.tensor([2.0, 0.0, 2.0, 0.0], dtype=F64)
    launch.update_(hyper_vectors(Hyper(step=step), 4), new_sums)
    after = back(there)
    assert after.rows([1, 3]).same_bits(lists.rows([1, 3]))
    assert new_sums[[1, 3]].tolist() == [[-1, -1]] * 2
    assert after.rows([0, 2]).same_bits(lists.rows([0, 2]).map(clone).update(Hyper(step=2.0), "cpp"))
    assert same_bits(new_sums[[0, 2]].cpu(), sums_of(launch)[[0, 2], 3:5])


@pytest.mark.parametrize("step", [-3.0, float("nan")])
def test_a_step_that_is_none_ends_all_the_same(step):
    launch, there = launched(random_lists([(3,)], "fp32"))
    launch.update_(hyper_vectors(Hyper(step=step), 1))
    assert not back(there).params[0].isfinite().any()


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("arithmetic", [F32, F64])
def test_rounding_of_what_is_stored(storage, arithmetic):
    """Ties, subnormal numbers, overflow and non-finite values, on the way into a first moment."""
    info = torch.finfo(storage)
    powers = torch.tensor([2.0**-140, info.smallest_normal / 8, info.smallest_normal, 1.0, info.max / 2], dtype=F64)
    steps = 1 + info.eps * torch.arange(0, 3, 0.125, dtype=F64)
    values = torch.cat([(powers[:, None] * steps).flatten(), torch.tensor([info.max * 1.0001, info.max * 2, 1e300]).double()])
    values = torch.cat([values, -values, torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0], dtype=F64)])
    grads = values.to(arithmetic)
    zeros = torch.zeros_like(grads)
    # With beta1 = 0 the first moment becomes the gradient itself, where that is finite.
    lists = random_lists([(len(values),)], "fp32")._replace(grads=[grads], exp_avgs=[zeros.to(storage)], exp_avg_sqs=[zeros + 1])
    lists = lists._replace(params=[zeros.clone()])
    launch, there = launched(lists)
    launch.update_(hyper_vectors(Hyper(beta1=0.0), 1))
    got, finite = back(there).exp_avgs[0], grads.isfinite()
    assert torch.equal(got[finite], grads.to(F32).to(storage)[finite])
    want = lists.map(clone).update(Hyper(beta1=0.0), "cpp").exp_avgs[0]
    assert torch.equal(got.isnan(), want.isnan())
    assert same_bits(got.nan_to_num(0.5), want.nan_to_num(0.5))


# ------------------------------------------------------------------------------------------------------------ memory layouts

OPERANDS = ("params", "grads", "exp_avgs", "exp_avg_sqs", "maxima", "all")
PLACES = [x for x in itertools.product(OPERANDS, LAYOUTS) if x[0] == "grads" or x[1] != "expanded"]


@pytest.mark.parametrize("dtypes", ["fp32", "bf16, fp32 states", "fp64, low states"])
@pytest.mark.parametrize(("operands", "layout"), PLACES)
def test_every_operand_in_every_layout(operands, layout, dtypes):
    names = ["params", "grads", "exp_avgs", "exp_avg_sqs", "maxima"] if operands == "all" else [operands]
    lists = random_lists(SHAPES[:-1], dtypes, amsgrad=True)
    whole = random_lists(SHAPES[:-1], dtypes, amsgrad=True, integers=True)
    for name in names:
        lists = lists.replaced(name, lambda x: place(x, **LAYOUTS[layout]))
        whole = whole.replaced(name, lambda x: place(x, **LAYOUTS[layout]))
    assert_same_update(lists, Hyper())
    launch, _ = launched(whole, written=False)
    assert torch.equal(sums_of(launch), whole.stats("cpp")), "integers: sums are exact"


def test_strided_chunks():
    shapes = [(181, 183), (3, 5, 2200), (2, CHUNK)]
    lists = random_lists(shapes, "fp32").replaced("grads", lambda x: place(x, order=(1, 0, 2)))
    lists = lists.replaced("exp_avgs", lambda x: place(x, order=(2, 0, 1), gap=3))
    launch, _ = launched(lists, written=False)
    assert_sums(sums_of(launch), lists, F64)
    assert_same_update(lists, Hyper())


def test_gradient_strides_differ_from_the_parameters():
    orders = list(itertools.permutations(range(3)))
    pairs = list(itertools.product(orders, repeat=2))
    lists = random_lists([(5, 6, 7)] * len(pairs), "fp32")
    lists = lists._replace(
        params=[place(x, order) for x, (order, _) in zip(lists.params, pairs, strict=True)],
        grads=[place(x, order) for x, (_, order) in zip(lists.grads, pairs, strict=True)],
    )
    assert_same_update(lists, Hyper())


@pytest.mark.parametrize("seed", range(12))
def test_random_lists(seed):
    chosen = random.Random(seed)
    shapes = [[chosen.choice((0, 1, 2, 3, 5, 17, 40)) for _ in range(chosen.randrange(4))] for _ in range(chosen.randrange(1, 9))]
    lists = random_lists(shapes, chosen.choice(list(DTYPES)), seed, amsgrad=True)
    for name in lists._fields:
        layouts = [LAYOUTS[x] for x in LAYOUTS if name == "grads" or x != "expanded"]
        lists = lists.replaced(name, lambda x, layouts=layouts: place(x, **chosen.choice(layouts)))
    lists = lists.replaced("maxima", lambda x: chosen.choice((x, torch.empty(0))))

    def each(low, high):
        return torch.tensor([chosen.uniform(low, high) for _ in shapes], dtype=F64)

    steps = torch.tensor([chosen.choice((1, 2, 50, 12345)) for _ in shapes], dtype=F64)
    scale = chosen.choice((None, -1.0, each(0.1, 3)))
    h = Hyper(each(0.01, 0.5), each(0.8, 1), steps, each(0, 0.99), each(0.5, 0.9999), chosen.choice((0.0, 1e-8, 1e-3)), scale)
    assert_same_update(lists, h)


# ------------------------------------------------------------------------------------------------------------ shape of the lists


@pytest.mark.parametrize(
    "sizes",
    [[0], [0, 0, 0], [0, 5, CHUNK + 1], [5, 0, CHUNK + 1], [CHUNK + 1, 5, 0], [0, CHUNK, 0, 0, CHUNK + 1, 0], [CHUNK], [1] * 300],
)
def test_empty_tensors_anywhere_and_many_tiny_ones(sizes):
    lists = random_lists([(n,) for n in sizes], "fp32")
    launch, _ = launched(lists, written=False)
    stats = sums_of(launch)
    assert_sums(stats, lists, F64)
    assert not stats[torch.tensor(sizes) == 0].any()
    assert_same_update(lists, Hyper())


def test_no_tensors_at_all():
    launch, _ = launched(random_lists([], "fp32"))
    launch.set_gradients([])
    assert sums_of(launch).shape == (0, 7)
    launch.update_(hyper_vectors(Hyper(), 0).cpu())  # without a tensor nothing tells of another device


def test_columns():
    lists = random_lists([(3,), (0,), (BLOCK + 1,)], "fp32")
    lists.grads[0][1] = lists.exp_avgs[2][5] = 0.0
    launch, _ = launched(lists)
    everything = sums_of(launch)
    for params, squares, count, dtype in itertools.product((False, True), (False, True), (False, True), (F32, F64)):
        columns = [0, 1, 2] + [3] * params + [4] * squares + [5, 6] * count
        assert same_bits(launch.tensor_stats(params, squares, count, dtype).cpu(), everything[:, columns].to(dtype))
    assert everything[:, 5:].tolist() == [[2, 3], [0, 0], [BLOCK + 1, BLOCK]]


def test_equal_bits_again_and_in_any_list():
    lists = random_lists([(n,) for n in (3, CHUNK + 5, 0, 3 * CHUNK + 17, 1)], "fp32")
    launch, _ = launched(lists)
    stats = sums_of(launch)
    assert same_bits(sums_of(launch), stats)
    for chosen in ([1], [3, 2], [4, 3, 0]):
        launch, _ = launched(lists.rows(chosen))
        assert same_bits(sums_of(launch), stats[chosen])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_non_finite_values_stay_where_they_are(bad):
    lists = random_lists([(40,), (BLOCK + 40,), (40,)], "fp32", amsgrad=True)
    spoiled = lists.replaced("grads", torch.clone)
    spoiled.grads[1][BLOCK + 3] = bad
    results = []
    for each in (lists, spoiled):
        launch, there = launched(each)
        stats = sums_of(launch, F32)
        launch.update_(hyper_vectors(Hyper(), 3))
        results.append((stats, back(there)))
    (stats, after), (spoiled_stats, spoiled_after) = results
    assert same_bits(spoiled_stats[[0, 2]], stats[[0, 2]])
    assert not spoiled_stats[1, 0].isfinite()
    elsewhere = torch.arange(BLOCK + 40) != BLOCK + 3
    for name in ("params", "exp_avgs", "exp_avg_sqs", "maxima"):
        for t, (x, y) in enumerate(zip(getattr(spoiled_after, name), getattr(after, name), strict=True)):
            kept = elsewhere if t == 1 else slice(None)
            assert same_bits(x[kept], y[kept])


def test_amsgrad_takes_the_maximum_as_torch_does():
    values = torch.tensor(list(itertools.product([0.0, 1.0, float("inf"), float("nan")], repeat=2)))
    lists = random_lists([(len(values),)], "fp32", amsgrad=True)
    lists = lists._replace(grads=[torch.zeros(len(values))], exp_avg_sqs=[values[:, 0].clone()], maxima=[values[:, 1].clone()])
    launch, there = launched(lists)
    launch.update_(hyper_vectors(Hyper(beta2=0.5), 1))
    want = torch.maximum(values[:, 1], 0.5 * values[:, 0])
    torch.testing.assert_close(back(there).maxima[0], want, rtol=0, atol=0, equal_nan=True)


# ------------------------------------------------------------------------------------------------------- gradients that change

MANY = [(7,), (3, 5), (BLOCK + 1,), (), (0,), (4, 6)]


@pytest.mark.parametrize("kind", ["None", "empty"])
def test_an_absent_gradient_counts_as_zeros_and_leaves_its_row_alone(kind):
    lists = random_lists(MANY, "fp32", amsgrad=True)
    absent = None if kind == "None" else torch.empty(0, device=DEVICE)
    launch, there = launched(lists)
    for missing in ({0}, {1, 2}, set(range(len(MANY))), set(), {5}):
        before = back(there)
        zeros = before._replace(grads=[torch.zeros_like(x) if t in missing else x for t, x in enumerate(before.grads)])
        grads = [absent if t in missing else x for t, x in enumerate(there.grads)]
        launch.set_gradients(grads)
        fresh, _ = launched(zeros)
        assert same_bits(sums_of(launch), sums_of(fresh))
        sums = torch.full((len(MANY), 2), -1.0, dtype=F64, device=DEVICE)
        launch.update_(hyper_vectors(Hyper(), len(MANY)), sums)
        after, new = back(there), sums_of(launch)[:, 3:5]
        for t, shape in enumerate(MANY):
            if t in missing and shape != (0,):
                assert all(same_bits(x[t], y[t]) for x, y in zip(after, before, strict=True))
                assert sums[t].tolist() == [-1, -1]
            else:
                assert same_bits(sums[t].cpu(), new[t])
        present = [t for t in range(len(MANY)) if t not in missing]
        want = before.rows(present).map(clone).update(Hyper(), "cpp")
        assert after.rows(present).same_bits(want)


def test_gradients_of_other_addresses_dtypes_and_layouts():
    lists = random_lists(MANY, "fp32")
    launch, there = launched(lists)
    others = random_lists(MANY, "fp32", seed=1).grads
    changes = [
        others,
        [clone(x) for x in others],
        [x.double() for x in others],
        [x.bfloat16() for x in others],
        [place(x, order=(1, 0), step=2) for x in others],
        [place(x, offset=1) for x in others],
        lists.grads,
    ]
    for grads in changes:
        before = back(there)._replace(grads=grads)
        present = [to(DEVICE, x) for x in grads]  # a launch does not keep gradients alive
        launch.set_gradients(present)
        assert_sums(sums_of(launch), before, F64)
        launch.update_(hyper_vectors(Hyper(), len(MANY)))
        want = before.map(clone).update(Hyper(), "cpp")
        assert back(there)._replace(grads=grads).same_bits(want)


def test_the_same_address_with_another_shape_is_noticed():
    memory = torch.arange(12.0).to(DEVICE)
    lists = random_lists([(3, 4)], "fp32")
    launch, there = launched(lists._replace(grads=[memory.cpu().view(3, 4)]))
    launch.set_gradients([memory.view(3, 4)])
    first = sums_of(launch)
    launch.set_gradients([memory.view(4, 3).t()])
    assert_sums(sums_of(launch), back(there)._replace(grads=[memory.view(4, 3).t().cpu()]), F64)
    assert first[0, 1] != sums_of(launch)[0, 1]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda x: x.new_ones(4, 3), r"grads\[1\] and params\[1\] differ in shape"),
        (lambda x: x.to(torch.complex64), r"grads\[1\] has dtype"),
        (lambda x: x.to_sparse(), r"grads\[1\] is sparse"),
        (lambda x: x.to("meta"), r"grads\[1\] is on (meta|neither the CPU nor a CUDA device), another device"),
        (None, "grads has 2 tensors, params has 3"),
    ],
)
@pytest.mark.filterwarnings("ignore:Casting complex values")
def test_gradients_that_do_not_fit_change_nothing(spoil, message):
    shapes = [(3,), (4, 5), (2, 2)]
    launch, _ = launched(random_lists(shapes, "fp32"))
    stats = sums_of(launch)
    other = [x.to(DEVICE) for x in random_lists(shapes, "fp32", seed=1).grads]
    with pytest.raises(RuntimeError, match=f"^{message}"):
        launch.set_gradients(other[:2] if spoil is None else [other[0], spoil(other[1]), other[2]])
    assert same_bits(sums_of(launch), stats)


# --------------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("name", ["params", "exp_avgs", "exp_avg_sqs", "maxima"])
def test_what_may_not_be_written_is_refused(name):
    lists = random_lists([(3,), (4, 5)], "fp32", amsgrad=True)
    for spoil, message in (
        (lambda x: x.new_ones(4, 1).expand(4, 5), "expanded"),
        (lambda x: x.long(), "has dtype"),
        (lambda x: x.new_ones(4, 3), "differ in shape"),
        (lambda _: lists.exp_avgs[0] if name != "exp_avgs" else lists.params[0], "differ in shape|share memory"),
    ):
        tensors = [getattr(lists, name)[0], spoil(getattr(lists, name)[1])]
        with pytest.raises(RuntimeError, match=message):
            launched(lists._replace(**{name: tensors}))


def test_written_tensors_that_share_memory_are_refused():
    there = random_lists([(3,), (4, 5)], "fp32").map(lambda x: to(DEVICE, x))
    with pytest.raises(RuntimeError, match="share memory"):
        launch_class(there.grads, there.exp_avgs, there.params, there.exp_avgs, written=True)


def test_what_a_launch_was_not_made_for():
    lists = random_lists([(3,), (4, 5)], "fp32")
    with pytest.raises(RuntimeError, match="written=False"):
        launched(lists, written=False)[0].update_(hyper_vectors(Hyper(), 2))
    without = lists._replace(params=None, exp_avg_sqs=None)
    with pytest.raises(RuntimeError, match="needs params and exp_avg_sqs"):
        launched(without)
    launch, _ = launched(without, written=False)
    for columns in ((True, False), (False, True)):
        with pytest.raises(RuntimeError, match="without the lists of these columns"):
            launch.tensor_stats(*columns, False, F32)
    with pytest.raises(RuntimeError, match="float32 or float64"):
        launch.tensor_stats(False, False, False, torch.bfloat16)


@pytest.mark.parametrize("position", range(8))
@pytest.mark.parametrize("bad", [torch.ones(3), torch.ones(2).double(), torch.ones(3, 3).double(), torch.ones(6).double()[::2]])
def test_hyperparameters_that_do_not_fit_change_nothing(bad, position):
    lists = random_lists([(3,), (4, 5), (2, 2)], "fp32")
    there = lists.map(lambda x: to(DEVICE, x))
    arguments = [*Hyper(grad_scale=1.0).of_tensors(3, DEVICE), None]
    arguments[position] = to(DEVICE, bad)  # with its strides
    operands = there.params, there.grads, there.exp_avgs, there.exp_avg_sqs, None
    with pytest.raises(RuntimeError, match="must be a contiguous float64 tensor of shape"):
        ops.resolve_backend(backend_name, DEVICE).adamw_update_(*operands, *arguments)
    assert back(there).same_bits(lists)


def test_vectors_that_do_not_fit_change_nothing():
    lists = random_lists([(3,), (4, 5), (2, 2)], "fp32")
    launch, there = launched(lists)
    vectors = hyper_vectors(Hyper(), 3)
    for bad in (vectors.float(), vectors[1:], vectors[:, :2].contiguous(), vectors[0], vectors.t().contiguous().t()):
        with pytest.raises(RuntimeError, match="must be a contiguous float64 tensor of shape"):
            launch.update_(bad)
    assert back(there).same_bits(lists)


# ------------------------------------------------------------------------------------------------------------ the public ops


def test_the_public_ops(backend):
    lists = random_lists(MANY, "fp32", amsgrad=True)
    there = lists.map(lambda x: to(DEVICE, x))
    assert_sums(there.stats(backend).cpu(), lists, F64)
    dots = ops.tensor_dots(there.grads, there.exp_avgs, dtype=F64, backend=backend)
    assert same_bits(dots.cpu(), there.stats(backend)[:, 1].cpu().clone())
    versions = [x._version for x in there.params]
    there.update(Hyper(), backend)
    assert all(x._version > version for x, version in zip(there.params, versions, strict=True))
    assert back(there).same_bits(lists.map(clone).update(Hyper(), "cpp"))


@pytest.mark.skipif(DEVICE.type == "cpu", reason="CUDA graphs need a GPU")
def test_a_captured_step_replays_with_its_own_gradients():
    lists = random_lists(MANY, "fp32")
    launch, there = launched(lists)
    vectors = hyper_vectors(Hyper(), len(MANY))
    captured, others = ([to(DEVICE, x) for x in random_lists(MANY, "fp32", seed).grads] for seed in (1, 2))
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):  # compiles both kernels
        launch.tensor_stats(True, True, False, F32)
        launch.update_(vectors)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch.set_gradients(captured)
        stats = launch.tensor_stats(True, True, False, F32)
        launch.update_(vectors)
    launch.set_gradients(others)
    for grads in (captured, captured):
        before = back(there)._replace(grads=[x.cpu() for x in grads])
        graph.replay()
        torch.cuda.synchronize()
        assert_sums(stats.cpu(), before, F32)
        assert back(there)._replace(grads=before.grads).same_bits(before.map(clone).update(Hyper(), "cpp"))
        launch.set_gradients(others)  # the same tensors as before the replay, which has put others into the table
        assert_sums(sums_of(launch), back(there)._replace(grads=[x.cpu() for x in others]), F64)


# ------------------------------------------------------------------------------------------------------- stochastic rounding


@pytest.mark.parametrize("dtypes", [name for name, types in DTYPES.items() if any(x.itemsize == 2 for x in types)])
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_rounding_by_chance_has_the_bits_of_cpp(dtypes, order):
    """Also of a transposed parameter, and of sums of what was stored."""
    lists = random_lists([(), (7,), (65, 40), (3, BLOCK)], dtypes)
    lists = lists.map(lambda x: x.t().contiguous().t() if x is not None and x.dim() == 2 and order == (1, 0) else x)
    launch, there = launched(lists)
    h = Hyper(step=5, grad_scale=0.5)
    new_sums = torch.zeros(4, 2, dtype=F64, device=DEVICE)
    launch.update_(hyper_vectors(h, 4), new_sums, 2**33 + 7)
    expected = lists.map(clone)
    expected.launch("cpp").update_(h.vectors(4), None, 2**33 + 7)
    assert back(there).same_bits(expected)
    assert same_bits(new_sums.cpu(), sums_of(launch)[:, 3:5])
    assert not expected.same_bits(lists.map(clone).update(h, "cpp"))
