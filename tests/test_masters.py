"""low_precision_params: bfloat16 and float16 parameters beside their float32 masters, which an update reads and writes in one go.

test_triton_interpreter.py and test_cuda_emulated.py run this with their kernels.
"""

import pytest
import torch

from metaadamw_fast import ops

from .cases import (
    BF16,
    BLOCK,
    CHUNK,
    CHUNK_ON_GPU,
    CHUNK_ON_TRITON,
    F16,
    F32,
    F64,
    LAYOUTS,
    Hyper,
    clone,
    memory_of,
    random_lists,
    same_bits,
    same_surroundings,
)
from .cases import place as placed
from .test_policy import EMULATED, INTERPRETED, PLACES, place

LOW = [BF16, F16]
WRITTEN = ("params", "exp_avgs", "exp_avg_sqs", "maxima")


@pytest.fixture(params=[place(*x) for x in ([] if EMULATED or INTERPRETED else [("reference", "cpu")]) + PLACES])
def there(request):
    return request.param


def moved(x, device):
    """A copy with the same strides, offset and surroundings."""
    return None if x is None else memory_of(x).to(device, copy=True).as_strided(x.shape, x.stride(), x.storage_offset())


def updated(lists, low, there, h=Hyper(), *, sums=None, seed=None):  # noqa: B008
    """Copies of the lists and of ``low`` after an update of a launch on the device, and the sums of it."""
    backend, device = there
    lists, low = lists.map(lambda x: moved(x, device)), [moved(x, device) for x in low]
    count = len(low)
    new_sums = None if sums is None else torch.full((count, sums), -7.0, dtype=F64, device=device)
    kind = ops.resolve_backend(backend, torch.device(device)).launch
    launch = kind(lists.grads, lists.exp_avgs, lists.params, lists.exp_avg_sqs, lists.maxima, low, written=True)
    launch.update_(h.vectors(count, backend, device), new_sums, seed)
    back = None if new_sums is None else new_sums.cpu()
    return lists.map(lambda x: moved(x, "cpu")), [moved(x, "cpu") for x in low], back


def expected(lists, low, there, h=Hyper(), *, sums=None, seed=None):  # noqa: B008
    """The same of an update without low-precision parameters, whose masters are what it is to start from."""
    started = [master if q is None else start(master, q) for master, q in zip(lists.params, low, strict=True)]
    after, _, new_sums = updated(lists._replace(params=started), [None] * len(low), there, h, sums=sums, seed=seed)
    rounded = [None if q is None else clone(q).copy_(master) for master, q in zip(after.params, low, strict=True)]
    return after, rounded, new_sums


def start(master, q):
    """Element by element as the words of the library say it, not by a formula that kernels may share."""
    begin = clone(master)
    for index in torch.cartesian_prod(*map(torch.arange, q.shape)).reshape(-1, q.dim()).tolist() if q.numel() < 5000 else []:
        x, y = master[tuple(index)], q[tuple(index)]
        if x.to(q.dtype).item() != y.item() and not (x.isnan() and y.isnan()):
            begin[tuple(index)] = y.float()
    if q.numel() >= 5000:
        begin[master.to(q.dtype) != q] = q[master.to(q.dtype) != q].float()
    return begin


def same_numbers(x, y):
    """Equal bits, but for those of a NaN."""
    return same_bits(x[~y.isnan()], y[~y.isnan()]) and bool(x[y.isnan()].isnan().all())


def assert_as_expected(lists, low, there, h=Hyper(), **options):  # noqa: B008
    """Every bit is that of an update of the masters alone; nothing is written beside the low-precision parameters."""
    found, want = updated(lists, low, there, h, **options), expected(lists, low, there, h, **options)
    for name in WRITTEN:
        for t, (x, y) in enumerate(zip(getattr(found[0], name) or [], getattr(want[0], name) or [], strict=True)):
            assert same_numbers(x, y), f"{name}[{t}] of shape {tuple(x.shape)}"
    for t, (x, y) in enumerate(zip(found[1], want[1], strict=True)):
        assert (x is None) == (y is None)
        if x is not None:
            assert same_numbers(x, y), f"low_precision_params[{t}] of shape {tuple(x.shape)}"
            assert same_surroundings(x, low[t])
    if options.get("sums") == 2:  # of what it leaves
        assert same_bits(found[2], want[2])
    elif options.get("sums") == 5:  # of what it finds: of the master, also where the parameter was written since
        assert same_bits(found[2], squares_before(lists, low, there))
    return found


def squares_before(lists, low, there):
    """The statistics of a launch of the masters, float64 [T, 5], before any update."""
    backend, device = there
    lists, low = lists.map(lambda x: moved(x, device)), [moved(x, device) for x in low]
    launch = ops.resolve_backend(backend, torch.device(device)).launch
    there_now = launch(lists.grads, lists.exp_avgs, lists.params, lists.exp_avg_sqs, lists.maxima, low, written=True)
    return there_now.tensor_stats(True, True, False, F64).cpu()


def low_of(lists, dtype, *, written=()):
    """The rounding of each master; in the rows ``written`` every third element is another number."""
    low = [x.to(dtype) for x in lists.params]
    for t in written:
        q = low[t].view(-1)
        q[::3] = q[::3] * 1.5
    return low


# ----------------------------------------------------------------------------------------------------------- what it starts from


@pytest.mark.parametrize("dtype", LOW)
def test_a_master_goes_on_and_what_was_written_counts(there, dtype):
    lists = random_lists([(7,), (3, 40), (BLOCK + 5,)], "fp32")
    low = low_of(lists, dtype, written=(1, 2))
    found, after, _ = assert_as_expected(lists, low, there)
    kept, _, _ = updated(lists, [None] * 3, there)
    assert same_bits(found.params[0], kept.params[0])
    assert not same_bits(found.params[0], found.params[0].to(dtype).float()), "the master has lost its precision"
    for q, before, x, y in zip(after[1:], low[1:], found.params[1:], kept.params[1:], strict=True):
        written = torch.arange(q.numel()) % 3 == 0
        assert (x.view(-1) == y.view(-1))[~written].all()
        assert (x.view(-1) != y.view(-1))[written].all()
        assert ((q - before).abs().float() <= 0.5).all()  # near what was written: a step of .1, a decay of .99 of at most 3


@pytest.mark.parametrize("dtype", LOW)
def test_special_numbers(there, dtype):
    """Infinities, NaN, zeros of both signs, what overflows, subnormal numbers, and ties between two numbers of the dtype."""
    nan, inf, info, half = torch.nan, torch.inf, torch.finfo(dtype), dtype == F16
    tie, above = 1 + info.eps / 2, 1 + info.eps * 1.5  # half way from 1 to the next number, and from there to the one after it
    cases = [  # master, parameter, whether that is the master's rounding
        (nan, nan, True), (inf, inf, True), (-inf, -inf, True), (0.0, -0.0, True), (-0.0, 0.0, True), (-1e-30, -0.0, half),
        (nan, 2.0, False), (2.0, nan, False), (inf, 1.0, False), (1.0, inf, False), (inf, -inf, False), (nan, inf, False),
        (inf, nan, False), (tie, 1.0, True), (tie, 1 + info.eps, False), (above, 1 + 2 * info.eps, True),
        (above, 1 + info.eps, False), (info.max * 1.0001, info.max, True), (3e38, inf, half), (info.tiny, info.tiny, True),
        (info.tiny / 3, 0.0, False), (info.tiny * 1.25, info.tiny, False), (info.tiny * 1.25, info.tiny * 1.25, True),
    ]  # fmt: skip
    for n in (1, 3, 50):  # also in whole groups of a GPU
        masters, low, kept = (torch.tensor(x, dtype=F64).repeat(n) for x in zip(*cases, strict=True))
        masters, low, kept = masters.float(), low.to(dtype), kept.bool()
        lists = random_lists([masters.shape], "fp32")._replace(params=[masters])
        found, _, _ = assert_as_expected(lists, [low], there)
        for source, chosen in ((masters, kept), (low.float(), ~kept)):
            want, _, _ = updated(lists._replace(params=[source]), [None], there)
            assert same_numbers(found.params[0][chosen], want.params[0][chosen])


# -------------------------------------------------------------------------------------------------------------- where it lies


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("amsgrad", [False, True])
def test_sizes_around_blocks_and_chunks(there, dtype, amsgrad):
    sizes = [0, 1, 2, 15, 16, 17, BLOCK - 1, BLOCK, BLOCK + 3]
    chunks = (CHUNK_ON_GPU, CHUNK_ON_TRITON) if EMULATED or INTERPRETED else (CHUNK_ON_GPU, CHUNK)
    sizes += [n + more for n in chunks for more in (-1, 0, 3)]
    lists = random_lists([(n,) for n in sizes], "fp32", amsgrad=amsgrad)
    assert_as_expected(lists, low_of(lists, dtype, written=range(1, len(sizes), 2)), there, sums=2)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "expanded"])
@pytest.mark.parametrize("which", ["low", "params", "all"])
def test_strides(there, layout, which):
    """The low-precision parameter lies otherwise than its master, the master otherwise than the rest, or all lie alike."""
    lists = random_lists([(6, 5, 4, 3, 2), (2, 3, 4, 1, 5)], "fp32", amsgrad=True)
    low = low_of(lists, BF16, written=(1,))
    moves = LAYOUTS[layout]
    if which in ("low", "all"):
        low = [placed(x, **moves) for x in low]
    if which == "params":
        lists = lists.replaced("params", lambda x: placed(x, **moves))
    if which == "all":
        lists = lists.map(lambda x: placed(x, **moves))
    assert_as_expected(lists, low, there, sums=2)


def test_many_dimensions_that_merge(there):
    """17 dimensions are one run of memory for all operands, also for the low-precision parameter."""
    lists = random_lists([(2,) * 10 + (1,) * 7], "fp32")
    assert_as_expected(lists, low_of(lists, F16, written=(0,)), there)
    lists = lists.map(lambda x: placed(x, tuple(reversed(range(17)))))
    assert_as_expected(lists, [placed(x, tuple(reversed(range(17)))) for x in low_of(lists, F16)], there)


# ------------------------------------------------------------------------------------------------------ what else is in a list


@pytest.mark.parametrize("gradients", ["fp32", "low", "fp64"])
@pytest.mark.parametrize("states", [F32, BF16, F64])
def test_dtypes_of_gradients_and_states(there, gradients, states):
    lists = random_lists([(7,), (BLOCK + 5,)], "fp32", amsgrad=True)
    low = low_of(lists, BF16, written=(1,))
    lists = lists.replaced("grads", lambda x: x.to({"fp32": F32, "low": BF16, "fp64": F64}[gradients]))
    for name in ("exp_avgs", "exp_avg_sqs", "maxima"):
        lists = lists.replaced(name, lambda x: x.to(states))
    assert_as_expected(lists, low, there, sums=5)


def test_plain_rows_beside_those_with_a_master(there):
    lists = random_lists([(5,), (33,), (BLOCK,), (4,)], "fp32")
    low = low_of(lists, BF16, written=(1,))
    low[0] = low[3] = None
    plain = lists.params[3].bfloat16()
    lists = lists._replace(params=[*lists.params[:3], plain])
    assert_as_expected(lists, low, there, sums=2)


@pytest.mark.parametrize("sums", [None, 2, 5])
def test_rows_that_are_left_alone(there, sums):
    """Without a gradient, or with step 0, neither the parameter nor its master is touched, whatever stands there."""
    lists = random_lists([(40,), (BLOCK + 9,), (50,)], "fp32", amsgrad=True)
    low = low_of(lists, BF16, written=(0, 1, 2))
    lists = lists._replace(grads=[torch.zeros(0), *lists.grads[1:]])
    for t in (0, 1):
        lists.params[t][3] = low[t][3] = torch.nan
        low[t].view(torch.int16)[4] = 0x7FA1  # a NaN with bits of its own
    h = Hyper(step=torch.tensor([3.0, 0.0, 3.0], dtype=F64))
    found, after, new_sums = updated(lists, low, there, h, sums=sums)
    for t in (0, 1):
        assert same_bits(after[t], low[t])
        assert all(same_bits(getattr(found, name)[t], getattr(lists, name)[t]) for name in WRITTEN)
        assert sums != 2 or (new_sums[t] == -7.0).all()
    if sums == 5:  # read, not touched
        want = squares_before(lists, low, there)
        assert same_numbers(new_sums, want)
        assert not want[0, 0]
        assert want[:2, 3].isnan().all()
    assert not same_bits(after[2], low[2])


@pytest.mark.parametrize("dtype", LOW)
def test_sums_are_of_the_master(there, dtype):
    """Both those that the update makes and the statistics of a launch, which read no low-precision parameter."""
    backend, device = there
    lists = random_lists([(7,), (3 * CHUNK_ON_GPU + 5,)], "fp32")
    low = low_of(lists, dtype, written=(0, 1))
    there_lists = lists.map(lambda x: moved(x, device))
    launch = ops.resolve_backend(backend, torch.device(device)).launch(
        there_lists.grads, there_lists.exp_avgs, there_lists.params, there_lists.exp_avg_sqs, None,
        [moved(x, device) for x in low], written=True,
    )  # fmt: skip

    def squares():
        return launch.tensor_stats(True, True, False, F64)[:, 3:].cpu()

    def exact():
        return torch.stack([x.cpu().double().square().sum() for x in there_lists.params])

    torch.testing.assert_close(squares()[:, 0], exact(), rtol=1e-6, atol=0)
    new_sums = torch.zeros(2, 2, dtype=F64, device=device)
    launch.update_(Hyper().vectors(2, backend, device), new_sums)
    assert same_bits(new_sums.cpu(), squares())
    torch.testing.assert_close(squares()[:, 0], exact(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("states", [F32, BF16])
def test_the_rounding_of_a_master_is_never_by_chance(there, states):
    """Else the next update would take it for what somebody has written."""
    lists = random_lists([(BLOCK + 7,)], "fp32")
    for name in ("exp_avgs", "exp_avg_sqs"):
        lists = lists.replaced(name, lambda x: x.to(states))
    found, after, _ = assert_as_expected(lists, low_of(lists, BF16), there, seed=5)
    assert same_bits(after[0], found.params[0].bfloat16())


def test_many_steps_are_those_of_the_masters_alone(there):
    """And the parameter is the rounding of its master after each of them."""
    backend, device = there
    lists = random_lists([(300,)], "fp32").map(lambda x: moved(x, device))
    alone, low = lists.map(clone), low_of(lists, BF16)
    for step in range(1, 6):
        for each, masters in ((lists, low), (alone, None)):
            ops.adamw_update_(*each[:4], 1e-3, 0.99, step=step, low_precision_params=masters, backend=backend)
        assert same_bits(lists.params[0], alone.params[0])
        assert same_bits(low[0], lists.params[0].bfloat16())


# ------------------------------------------------------------------------------------------------------------- the op, and checks


def test_the_op_marks_what_it_wrote(there):
    backend, device = there
    lists = random_lists([(4,), (5,), (6,)], "fp32").map(lambda x: moved(x, device))
    low = [*low_of(lists, F16)[:2], None]
    lists.grads[1] = torch.zeros(0, device=device)
    before = [x._version for x in low[:2]]
    ops.adamw_update_(*lists[:4], 0.1, 0.9, step=1, low_precision_params=low, backend=backend)
    assert low[0]._version > before[0]
    assert low[1]._version == before[1]


def launch_of(lists, low, there):
    backend, device = there
    kind = ops.resolve_backend(backend, torch.device(device)).launch
    lists, low = lists.map(lambda x: moved(x, device)), [moved(x, device) for x in low]
    return kind(*lists[1:3], lists.params, lists.exp_avg_sqs, lists.maxima, low, written=True)


def test_what_cannot_be_a_master_or_have_one_is_refused(there):
    lists = random_lists([(4,), (5,)], "fp32")
    low = low_of(lists, BF16)
    wide = lists._replace(params=[lists.params[0], lists.params[1].double()])
    both = torch.zeros(9, dtype=BF16)
    for masters, chosen, message in (
        (lists, [low[0], low[1].float()], r"low_precision_params\[1\] has dtype .*: only bfloat16, float16 have a master"),
        (wide, low, r"params\[1\] has dtype .*: the master of low_precision_params\[1\] must be float32"),
        (lists, [low[0], low[0]], r"low_precision_params\[1\] and params\[1\] differ in shape"),
        (lists, low[:1], r"low_precision_params has 1 tensors, params has 2"),
        (lists, [low[0], low[0][:1].expand(5)], r"low_precision_params\[1\] is expanded"),
    ):
        with pytest.raises(RuntimeError, match=message):
            launch_of(masters, chosen, there)
    backend, device = there
    kind = ops.resolve_backend(backend, torch.device(device)).launch
    lists, both = lists.map(lambda x: moved(x, device)), both.to(device)
    for chosen in ([both[:4], both[3:8]], [both[:4], lists.params[0].view(BF16)[:5]]):
        with pytest.raises(RuntimeError, match=r"share memory"):
            kind(*lists[1:3], lists.params, lists.exp_avg_sqs, None, chosen, written=True)
    with pytest.raises(RuntimeError, match=r"low_precision_params need params"):
        kind(*lists[1:3], None, lists.exp_avg_sqs, None, [both[:4], both[4:]], written=False)
