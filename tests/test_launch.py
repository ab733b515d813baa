"""Launches: the ops on fixed lists, of which only the gradients change."""

import gc
import weakref

import pytest
import torch

from metaadamw_fast.launch import CppLaunch

from .cases import (
    BLOCK,
    CHUNK,
    CHUNK_ON_GPU,
    DTYPES,
    F32,
    F64,
    LAYOUTS,
    SHAPES,
    Hyper,
    assert_sums,
    clone,
    place,
    random_lists,
    same_bits,
)

BACKENDS = pytest.mark.parametrize("backend", ["cpp", "reference"])
SHAPES = [*SHAPES, (0,), (), (BLOCK + 1,), (CHUNK + 3,)]
H = Hyper(step_size=torch.linspace(0.1, 0.3, len(SHAPES), dtype=F64), grad_scale=0.5)


def sums_of(launch, dtype=F64):
    return launch.tensor_stats(True, True, True, dtype)


def placed(dtypes, seed=0):
    """Lists in which the layouts go round."""
    lists = random_lists(SHAPES, dtypes, seed, amsgrad=True)
    layouts = [layout for name, layout in LAYOUTS.items() if name != "expanded"]
    moved = [None if x is None else [place(y, **layouts[t % len(layouts)]) for t, y in enumerate(x)] for x in lists]
    return lists._replace(params=moved[0], grads=moved[1], exp_avgs=random_lists(SHAPES, dtypes, seed).exp_avgs)


@BACKENDS
@pytest.mark.parametrize("dtypes", DTYPES)
def test_a_launch_does_what_the_ops_do(dtypes, backend):
    lists, others = placed(dtypes), placed(dtypes, seed=1)
    ours, theirs = lists.map(clone), lists.map(clone)
    launch = ours.launch(backend)
    for grads in (ours.grads, [clone(x) for x in ours.grads], others.grads, others.grads):
        launch.set_gradients(x for x in grads)
        theirs = theirs._replace(grads=grads)
        assert same_bits(sums_of(launch), theirs.stats(backend))
        launch.update_(H.vectors(len(SHAPES), backend))
        theirs.update(H, backend)
        assert ours._replace(grads=grads).same_bits(theirs)


@BACKENDS
def test_columns_of_a_launch(backend):
    lists = random_lists(SHAPES, "fp32")
    launch, everything = lists.launch(backend), lists.stats(backend)
    for params in (False, True):
        for squares in (False, True):
            for count in (False, True):
                columns = [0, 1, 2] + [3] * params + [4] * squares + [5, 6] * count
                for dtype in (F32, F64):
                    assert same_bits(launch.tensor_stats(params, squares, count, dtype), everything[:, columns].to(dtype))


@BACKENDS
def test_the_order_of_the_elements_is_that_of_the_parameters(backend):
    lists = random_lists([(37, 53)], "fp32").replaced("params", lambda x: place(x, order=(1, 0)))
    launch = lists.launch(backend)
    flat = lists.map(lambda x: x.t().contiguous())
    assert same_bits(launch.tensor_stats(False, False, False, F64), flat.launch(backend).tensor_stats(False, False, False, F64))


@pytest.mark.parametrize("dtypes", DTYPES)
def test_new_sums_have_the_bits_of_a_later_pass(dtypes):
    lists = placed(dtypes)
    launch = lists.launch()
    sums = torch.full((len(SHAPES), 2), -1.0, dtype=F64)
    launch.update_(H.vectors(len(SHAPES)), sums)
    assert same_bits(sums, launch.tensor_stats(True, True, False, F64)[:, 3:])


@BACKENDS
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("dtypes", DTYPES)
def test_the_update_also_sums_what_it_finds(dtypes, amsgrad, backend):
    """Of every row, also of those that it leaves alone; with the bits of a pass before it, and without a change of what it does."""
    lists = placed(dtypes)
    lists = lists if amsgrad else lists._replace(maxima=None)
    ours, plain = lists.map(clone), lists.map(clone)
    alone = torch.arange(len(SHAPES)) % 3  # 1: without a gradient, 2: its step is 0
    grads = [[None if alone[t] == 1 else g for t, g in enumerate(each.grads)] for each in (ours, plain)]
    launch, other = (x._replace(grads=gs).launch(backend) for x, gs in zip((ours, plain), grads, strict=True))
    before = launch.tensor_stats(True, True, False, F64)
    sums = torch.full((len(SHAPES), 5), -1.0, dtype=F64)
    hyper = H._replace(step=torch.where(alone == 2, 0.0, 3.0))
    launch.update_(hyper.vectors(len(SHAPES), backend), sums)
    other.update_(hyper.vectors(len(SHAPES), backend))
    assert ours.same_bits(plain)
    assert same_bits(sums, before)
    chosen = alone.nonzero().flatten().tolist()
    assert ours.rows(chosen).same_bits(lists.rows(chosen))


# --------------------------------------------------------------------------------------------------------------- absent operands


def absent(kind):
    return None if kind == "None" else torch.empty(0)


@BACKENDS
@pytest.mark.parametrize("kind", ["None", "empty"])
def test_an_absent_gradient_counts_as_zeros_and_leaves_its_row_alone(kind, backend):
    lists = random_lists(SHAPES, "fp32", amsgrad=True)
    before = lists.map(clone)
    launch = lists.launch(backend)
    for missing in ({0}, {1, 4, 9}, set(range(len(SHAPES))), set(), {2}):
        grads = [absent(kind) if t in missing else x for t, x in enumerate(before.grads)]
        twin = lists.map(clone)
        zeros = twin._replace(grads=[torch.zeros_like(x) if t in missing else x for t, x in enumerate(before.grads)])
        for each in (launch, lists._replace(grads=grads).launch(backend)):
            each.set_gradients(grads)
            assert same_bits(sums_of(each), zeros.stats(backend))
        sums = torch.full((len(SHAPES), 2), -1.0, dtype=F64)
        launch.update_(H.vectors(len(SHAPES), backend), sums)
        present = [t for t in range(len(SHAPES)) if t not in missing]
        of_present = Hyper(*(x[present] if isinstance(x, torch.Tensor) else x for x in H))
        twin._replace(grads=before.grads).rows(present).update(of_present, backend)
        assert lists._replace(grads=before.grads).same_bits(twin._replace(grads=before.grads))
        after = lists.stats(backend)[:, 3:5]
        for t in range(len(SHAPES)):
            assert torch.equal(
                sums[t], after[t] if t in present or not lists.params[t].numel() else torch.full((2,), -1.0).double()
            )


@BACKENDS
@pytest.mark.parametrize("kind", ["None", "empty"])
def test_an_absent_maximum_leaves_its_tensor_plain(kind, backend):
    lists = random_lists([(5,), (BLOCK + 1,), (0,), (7,)], "fp32", amsgrad=True)
    some = lists._replace(maxima=[lists.maxima[0], absent(kind), lists.maxima[2], absent(kind)])
    twin = some._replace(maxima=[x if x is not None else torch.empty(0) for x in some.maxima]).map(clone)
    some.launch(backend).update_(Hyper().vectors(4, backend))
    twin.update(Hyper(), backend)
    assert all(map(same_bits, some.params + some.exp_avg_sqs, twin.params + twin.exp_avg_sqs))
    assert same_bits(some.maxima[0], twin.maxima[0])


@BACKENDS
@pytest.mark.parametrize("dtypes", DTYPES)
def test_a_row_whose_step_is_zero_is_left_alone(dtypes, backend):
    """Whatever its gradient and its other hyper-parameters are."""
    lists = placed(dtypes)
    skipped = torch.arange(len(SHAPES)) % 3 == 1
    for t in skipped.nonzero().flatten().tolist():
        lists.grads[t].fill_(float("inf"))
    rest = [t for t in range(len(SHAPES)) if not skipped[t]]
    ours, before = lists.map(clone), lists.map(clone)
    hyper = H._replace(step=torch.where(skipped, 0.0, 3.0), step_size=torch.where(skipped, float("nan"), H.step_size))
    sums = torch.full((len(SHAPES), 2), -1.0, dtype=F64)
    launch = ours.launch(backend)
    launch.update_(hyper.vectors(len(SHAPES), backend), sums)
    assert ours.rows(skipped.nonzero().flatten().tolist()).same_bits(before.rows(skipped.nonzero().flatten().tolist()))
    assert (sums[skipped] == -1).all()
    assert same_bits(sums[~skipped], launch.tensor_stats(True, True, False, F64)[~skipped, 3:])
    others = before.rows(rest)
    others.update(Hyper(*(x if not isinstance(x, torch.Tensor) else x[~skipped] for x in hyper)), backend)
    assert ours.rows(rest).same_bits(others)


def test_the_list_op_leaves_the_row_of_an_absent_gradient_alone_too():
    for backend in ("cpp", "reference"):
        lists = random_lists([(5,), (3, 4), (0,)], "fp32")
        missing = lists._replace(grads=[lists.grads[0], torch.empty(0), lists.grads[2]])
        after = missing.map(clone).update(Hyper(), backend)
        assert all(same_bits(x[1], y[1]) for x, y in zip(after[:4], missing[:4], strict=True))
        assert not same_bits(after.params[0], lists.params[0])


# ---------------------------------------------------------------------------------------------------------------- lives and errors


def test_a_launch_keeps_its_tensors_alive_but_not_the_gradients():
    """Gradients that it kept would outlive `zero_grad`, and be in memory twice during the next backward pass."""
    lists = random_lists([(3,), (4, 5)], "fp32", amsgrad=True)
    launch = lists.launch()
    others = random_lists([(3,), (4, 5)], "fp32", seed=1).grads
    alive = [weakref.ref(x) for x in lists.params + lists.exp_avgs]
    gone = [weakref.ref(x) for x in lists.grads]
    want = lists._replace(grads=others).stats()
    assert same_bits(sums_of(launch), lists.stats())
    launch.set_gradients(others)
    del lists
    gc.collect()
    assert all(x() is not None for x in alive)
    assert all(x() is None for x in gone)
    assert same_bits(sums_of(launch), want)


@BACKENDS
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda x: x.new_ones(4, 3), r"grads\[1\] and params\[1\] differ in shape: \[4, 3\], \[4, 5\]"),
        (lambda x: x.to(torch.complex64), r"grads\[1\] has dtype"),
        (lambda x: x.to_sparse(), r"grads\[1\] is sparse"),
        (lambda x: x.to("meta"), r"grads\[1\] is on .*, another device than params\[0\] on cpu"),
        (None, "grads has 2 tensors, params has 3"),
    ],
)
@pytest.mark.filterwarnings("ignore:Casting complex values")
def test_gradients_that_do_not_fit_change_nothing(spoil, message, backend):
    lists = random_lists([(3,), (4, 5), (2, 2)], "fp32")
    launch, stats = lists.launch(backend), lists.stats(backend)
    other = random_lists([(3,), (4, 5), (2, 2)], "fp32", seed=1).grads
    bad = other[:2] if spoil is None else [other[0], spoil(other[1]), other[2]]
    with pytest.raises(RuntimeError, match=f"^{message}"):
        launch.set_gradients(bad)
    assert same_bits(sums_of(launch), stats)


@BACKENDS
def test_what_a_launch_was_not_made_for(backend):
    lists = random_lists([(3,), (4, 5)], "fp32")
    vectors = Hyper().vectors(2, backend)
    with pytest.raises(RuntimeError, match="written=False"):
        lists.launch(backend, written=False).update_(vectors)
    without = lists._replace(params=None, exp_avg_sqs=None)
    with pytest.raises(RuntimeError, match="needs params and exp_avg_sqs"):
        without.launch(backend)
    launch = without.launch(backend, written=False)
    for columns in ((True, False), (False, True)):
        with pytest.raises(RuntimeError, match="without the lists of these columns"):
            launch.tensor_stats(*columns, False, F32)
    assert same_bits(launch.tensor_stats(False, False, True, F64), lists.stats(backend)[:, [0, 1, 2, 5, 6]])


@BACKENDS
def test_a_launch_of_nothing(backend):
    launch = random_lists([], "fp32").launch(backend)
    launch.set_gradients([])
    assert sums_of(launch).shape == (0, 7)
    launch.update_(Hyper().vectors(0, backend))


# ------------------------------------------------------------------------------------------------------------------- chunk size


@pytest.mark.parametrize("dtypes", ["fp32", "bf16", "fp64"])
@pytest.mark.parametrize("seed", [None, 7])
def test_no_bit_of_an_update_depends_on_the_chunk_size(dtypes, seed):
    """Random bits of stochastic rounding neither: they belong to elements, not to chunks."""
    lists = random_lists([(2 * CHUNK + 5,), (CHUNK_ON_GPU - 1,), (3, CHUNK_ON_GPU), ()], dtypes)
    lists = lists._replace(grads=[x if x.dim() < 2 else place(x, order=(1, 0)) for x in lists.grads])
    updated, sums = [], []
    for size in (0, CHUNK_ON_GPU, 2 * CHUNK_ON_GPU):
        mine = lists.map(clone)
        launch = type("Launch", (CppLaunch,), {"chunk_size": size})(*mine[1:3], mine.params, mine.exp_avg_sqs, written=True)
        launch.update_(Hyper(grad_scale=0.5).vectors(4), None, seed)
        updated.append(mine)
        sums.append(launch.tensor_stats(True, True, False, F64))
    assert all(x.same_bits(updated[0]) for x in updated)
    assert not updated[0].same_bits(lists)
    for x in sums:
        assert_sums(x, updated[0], F64)


@pytest.mark.parametrize("size", [-CHUNK_ON_GPU, 1, CHUNK_ON_GPU + 1024, 2 * CHUNK])
def test_a_chunk_size_that_is_none_is_refused(size):
    lists = random_lists([(3,)], "fp32")
    with pytest.raises(RuntimeError, match="a chunk has a multiple of 8192 elements, at most 32768"):
        type("Launch", (CppLaunch,), {"chunk_size": size})(lists.grads, lists.exp_avgs, written=False)


# ------------------------------------------------------------------------------------------------------------- many dimensions


@BACKENDS
def test_more_dimensions_than_a_table_describes(backend):
    """17 of them in memory order need none; a gradient in another order is copied, at the first call and at later ones."""
    n = 17
    shape = (2,) * n
    flat = random_lists([(2**n,), (5,)], "fp32")
    lists = flat.map(lambda x: clone(x).view(shape).permute(*reversed(range(n))) if x.numel() > 5 else clone(x))
    other_order = (*range(n // 2, n), *range(n // 2))
    expected = flat.map(clone)
    launch = None
    for seed in (1, 2, 3):
        values = random_lists([(2**n,), (5,)], "fp32", seed).grads
        # The same numbers at the same indices: as one run of memory for `expected`, in another order for `lists`.
        inverse = [other_order.index(d) for d in range(n)]
        grad = values[0].view(shape).permute(*reversed(range(n))).permute(other_order).contiguous().permute(inverse)
        assert grad.stride() != lists.params[0].stride()
        assert torch.equal(grad.permute(*reversed(range(n))).flatten(), values[0])
        mine, theirs = lists._replace(grads=[grad, values[1]]), expected._replace(grads=values)
        if launch is None:
            launch = mine.launch(backend)
        else:
            launch.set_gradients(mine.grads)
        twin = theirs.launch(backend)
        assert_sums(sums_of(launch), theirs, F64)
        for each in (launch, twin):
            each.update_(Hyper().vectors(2, backend))
        for x, y in zip(mine.params + mine.exp_avgs, theirs.params + theirs.exp_avgs, strict=True):
            assert same_bits(x.permute(*reversed(range(x.dim()))).flatten().clone(), y.flatten().clone())
    moved = lists._replace(exp_avgs=[x if x.dim() < n else place(x, order=other_order) for x in lists.exp_avgs])
    if backend == "cpp":
        with pytest.raises(RuntimeError, match="more than 16 separate dimensions"):
            moved.launch(backend)


# --------------------------------------------------------------------------------------------------------------- overlapping memory


@BACKENDS
@pytest.mark.parametrize("name", ["params", "exp_avgs", "exp_avg_sqs", "maxima"])
@pytest.mark.parametrize("strides", [(1, 1), (0, 1), (4, 1), (2, 2)])
def test_a_written_tensor_that_overlaps_itself_is_refused(strides, name, backend):
    lists = random_lists([(3,), (4, 5)], "fp32", amsgrad=True)
    lists = lists._replace(**{name: [getattr(lists, name)[0], torch.ones(40).as_strided((4, 5), strides)]})
    written = "max_exp_avg_sqs" if name == "maxima" else name
    for call in (lambda: lists.launch(backend), lambda: lists.update(Hyper(), backend)):
        with pytest.raises(RuntimeError, match=rf"^{written}\[1\] is expanded or overlaps itself: .* share one place in memory"):
            call()
    lists.launch(backend, written=False)


@BACKENDS
def test_written_tensors_that_share_memory_are_refused(backend):
    lists = random_lists([(6,), (2, 3)], "fp32")
    memory = torch.ones(40)
    shared = {
        "the same tensor twice": {"params": [lists.params[0], lists.params[0].view(2, 3)]},
        "two states in one place": {"exp_avg_sqs": lists.exp_avgs},
        "one ends in the other": {"params": [memory[:6], memory[5:11].view(2, 3)]},
        "one inside the other": {"exp_avgs": [memory[:6], memory[2:8].view(2, 3)]},
        "strided from one place": {"params": [memory[::3][:6], memory[:24].view(2, 12)[:, ::4]]},
    }
    before = lists.map(clone)
    for which, replaced in shared.items():
        with pytest.raises(RuntimeError, match=r"^\w+\[\d\] and \w+\[\d\] share memory, so they cannot be updated$"):
            lists._replace(**replaced).update(Hyper(), backend)
        assert lists.same_bits(before), which
        lists._replace(**replaced).stats(backend)


@BACKENDS
def test_interleaved_tensors_are_updated(backend):
    lists = random_lists([(6,), (6,), (2, 3), (2, 3)], "fp32")
    memory, columns = torch.zeros(12), torch.zeros(2, 6)
    with torch.no_grad():
        views = [memory[::2], memory[1::2], columns[:, :3], columns[:, 3:]]
        for view, x in zip(views, lists.params, strict=True):
            view.copy_(x)
    apart = lists.map(clone).update(Hyper(), backend)
    together = lists._replace(params=views).update(Hyper(), backend)
    assert all(map(same_bits, together.params, apart.params))


def test_both_backends_say_the_same():
    lists = random_lists([(3,), (4, 5)], "fp32")
    spoilt = [
        {"grads": [lists.grads[0], lists.grads[1][:3]]},
        {"exp_avgs": lists.exp_avgs[:1]},
        {"params": [lists.params[0], torch.ones(4, 1).expand(4, 5)]},
        {"exp_avg_sqs": lists.exp_avgs},
    ]
    for replaced in spoilt:
        messages = []
        for backend in ("cpp", "reference"):
            with pytest.raises(RuntimeError) as error:
                lists._replace(**replaced).update(Hyper(), backend)
            messages.append(str(error.value))
        assert messages[0] == messages[1]
