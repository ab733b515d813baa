"""The rule of AdamW with online learning on every backend: the update is AdamW's, bit for bit; its average and its sums are right.

test_triton_interpreter.py and test_cuda_emulated.py run this with their kernels.
"""

import pytest
import torch

from metaadamw_fast import ops
from metaadamw_fast.online_reference import FOUND, SUMS

from .cases import BF16, BLOCK, CHUNK, DTYPES, F32, F64, Hyper, assert_within, clone, place, random_lists, same_bits
from .test_policy import EMULATED, INTERPRETED, PLACES
from .test_policy import place as of_place
from .tolerances import sum_bound


@pytest.fixture(params=[of_place(*x) for x in ([] if EMULATED or INTERPRETED else [("reference", "cpu")]) + PLACES])
def there(request):
    return request.param


LONG = (CHUNK // 2 + 3,)  # longer than a chunk of any GPU backend
SIZES = [(), (0,), (5,), (3, BLOCK + 1), LONG, (7,) if EMULATED or INTERPRETED else (CHUNK + 1,)]
DECAY = 0.75
LAST = (1.25, 1.5, 1e-3)  # of the update before: 1 / (1 - beta1^k), 1 / sqrt(1 - beta2^k), eps
ALL = (1 << len(SUMS)) - 1


class Case:
    """Random operands of a launch, with an average and, if ``amsgrad``, maxima."""

    def __init__(self, shapes, dtypes, amsgrad=True, average=True, seed=0):
        self.lists = random_lists(shapes, dtypes, seed, amsgrad=True)
        if not amsgrad:
            self.lists = self.lists._replace(maxima=None)
        other = random_lists(shapes, dtypes, seed + 1).params
        self.averages = [x.to(F64 if x.dtype == F64 else F32) for x in other] if average else None
        self.count = len(shapes)

    def launch(self, there, low=None, rule="online_adamw"):
        """On copies of the operands; returns the copies, too."""
        backend, device = there
        moved = self.lists.map(lambda x: None if x is None else clone(x).to(device))
        averages = None if self.averages is None else [clone(x).to(device) for x in self.averages]
        mine = [] if rule == "adamw" else [averages]
        operands = (moved.grads, moved.exp_avgs, moved.params, moved.exp_avg_sqs, *mine, moved.maxima, low)
        kind = ops.resolve_backend(backend, torch.device(device)).launch
        return kind(*operands, written=True, rule=rule), moved, averages

    def vectors(self, there, h=None, unmoved=()):
        """Of AdamW, and behind them those of the rule. Tensors in ``unmoved`` did not move in the update before."""
        backend, device = there
        more = torch.tensor([DECAY, *LAST], dtype=F64, device=device)[:, None].repeat(1, self.count)
        for t in unmoved:
            more[1:, t] = torch.tensor([0, 0, 1.0])
        return torch.cat([(h or Hyper()).vectors(self.count, backend, device), more]), more[1:].contiguous()

    def exact_sums(self, unmoved=()):
        """[T, 13] in float64, and the sums of the terms' sizes, for the bounds."""
        rows, sizes = [], []
        for t, (p, g, m, v) in enumerate(zip(*self.lists[:4], strict=True)):
            p, m, v = (x.double() for x in (p, m, v))
            g = torch.zeros_like(m) if g is None else g.double()
            e = torch.zeros_like(p) if self.averages is None else self.averages[t].double()
            largest = v if self.lists.maxima is None else torch.maximum(self.lists.maxima[t].double(), v)
            u = torch.zeros_like(m) if t in unmoved else m * LAST[0] / (largest.sqrt() * LAST[1] + LAST[2])
            apart = p.abs() + e.abs()
            pairs = [(g, g), (g, m), (m, m), (p, p), (v, v), (g, u), (g, p), (u, u), (u, p), (g, p - e), (p - e, p - e)]
            pairs += [((x != 0).double(), torch.ones_like(x)) for x in (g, m)]
            rows.append(torch.stack([(x * y).sum() for x, y in pairs]))
            # A direction is wrong by a few roundings itself, a distance by one of its larger term.
            pairs[5:11] = [(g, 4 * u), (g, p), (4 * u, 2 * u), (4 * u, p), (g, apart), (apart, apart)]
            sizes.append(torch.stack([(x * y).abs().sum() for x, y in pairs]))
        return torch.stack(rows), torch.stack(sizes)


def assert_sums(found, case, unmoved=(), result=F64):
    exact, sizes = case.exact_sums(unmoved)
    for t, p in enumerate(case.lists.params):
        arithmetic = F64 if any(x[t] is not None and x[t].dtype == F64 for x in case.lists[:4]) else F32
        for column, name in enumerate(SUMS):
            bound = sum_bound(sizes[t, column], p.numel(), arithmetic, result)
            wrong = (found[t, column].cpu().double() - exact[t, column]).abs()
            assert wrong <= bound, f"{name} of tensor {t}: {wrong:.3g} > {bound:.3g}"


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("dtypes", DTYPES)
def test_the_update_is_adamw_s(dtypes, amsgrad, there):
    """Bit for bit, with a step of each tensor's own, rounded to nearest and by chance, with and without an average."""
    h = Hyper(step=torch.tensor([1.0, 2, 3, 50, 0, 1e6], dtype=F64), grad_scale=-0.5)
    for seed, average in ((None, amsgrad), (5, not amsgrad)):
        case = Case(SIZES, dtypes, amsgrad, average)
        case.lists.grads[2] = None
        plain, want, _ = case.launch(there, rule="adamw")
        plain.update_(h.vectors(case.count, *there), None, seed)
        launch, got, averages = case.launch(there)
        launch.update_(case.vectors(there, h)[0], None, seed)
        assert all(x is y is None or same_bits(x, y) for xs, ys in zip(got, want, strict=True) for x, y in _pairs(xs, ys))
        for t, e in enumerate(averages or []):
            before = case.averages[t]
            if t in (2, 4):
                assert same_bits(e.cpu(), before)
                continue
            assert_average(e, before, got.params[t])


def assert_average(e, before, param):
    """Four roundings, of which the weight's is one; and the parameter may have been rounded after the average took it up."""
    e, new, before = e.cpu(), param.cpu().double(), before.double()
    size = new.abs() + before.abs()
    bound = 4 * torch.finfo(e.dtype).eps / 2 * size + (1 - DECAY) * torch.finfo(param.dtype).eps * new.abs()
    assert_within(e, before + (1 - DECAY) * (new - before), bound, "average")


def _pairs(xs, ys):
    return [] if xs is None else zip(xs, ys, strict=True)


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("dtypes", ["fp32", "fp64", "bf16, fp32 states"])
def test_the_sums(dtypes, amsgrad, average, there):
    case = Case(SIZES, dtypes, amsgrad, average)
    case.lists.grads[2] = None
    case.lists.exp_avgs[3][0] = 0
    vectors, last = case.vectors(there, unmoved=(4,))
    launch, _moved, _ = case.launch(there)
    read = launch.measure(ALL, F64, None, last)
    assert_sums(read, case, unmoved=(4,))
    for width in (FOUND[0], FOUND[-1]) if INTERPRETED else FOUND:
        launch, _moved, _ = case.launch(there)
        found = torch.full((case.count, width), -1.0, dtype=F64, device=there[1])
        launch.update_(vectors, found)
        assert same_bits(found, read[:, :width].contiguous())


def test_columns_by_choice_and_carried(there):
    """What the update leaves is what the next pass would find, and takes the place of columns that this does not read."""
    case = Case(SIZES, "fp32")
    vectors, last = case.vectors(there)
    launch, _moved, _averages = case.launch(there)
    left = torch.full((case.count, 2), -1.0, dtype=F64, device=there[1])
    launch.update_(vectors, left)
    read = launch.measure(ALL, F64, None, last)
    assert same_bits(left, read[:, 3:5].contiguous())
    wanted = ALL & ~0b11000
    beside = launch.measure(wanted, F64, left, last)
    assert same_bits(beside, read)
    chosen = launch.measure(1 << 0 | 1 << 9 | 1 << 12, F32, None, last)
    assert same_bits(chosen, read[:, [0, 9, 12]].float())
    assert same_bits(launch.measure(0b11111, F64), read[:, :5].contiguous())


@pytest.mark.parametrize("layout", [{"offset": 1}, {"order": (1, 0)}, {"step": 3, "gap": 5}])
@pytest.mark.parametrize("name", ["grads", "averages", "maxima"])
def test_operands_elsewhere_in_memory(name, layout, there):
    case = Case([(37, 53), (2, BLOCK)], "fp32")
    vectors, last = case.vectors(there)
    launch, want, averages = case.launch(there)
    sums = launch.measure(ALL, F64, None, last)
    launch.update_(vectors)
    if name == "averages":
        case.averages = [place(x, **layout) for x in case.averages]
    else:
        case.lists = case.lists.replaced(name, lambda x: place(x, **layout))
    launch, got, others = case.launch(there)
    assert_sums(launch.measure(ALL, F64, None, last), case)
    assert (launch.measure(ALL, F64, None, last) - sums).abs().max() <= 1e-3
    launch.update_(vectors)
    assert all(map(same_bits, got.params, want.params))
    assert all(map(same_bits, others, averages))


@pytest.mark.parametrize("average", [False, True])
def test_a_bfloat16_parameter_with_a_master(average, there):
    """The average is of the master; the sums are of the master as it was before somebody wrote the parameter."""
    case = Case([(5,), (BLOCK + 3,)], "fp32", average, average)
    low = [x.to(BF16).to(there[1]) for x in case.lists.params]
    low[1][3] += 1
    vectors, last = case.vectors(there)
    launch, moved, averages = case.launch(there, low)
    read = launch.measure(ALL, F64, None, last)
    found = torch.empty(2, len(SUMS), dtype=F64, device=there[1])
    launch.update_(vectors, found)
    assert same_bits(found, read)
    assert_sums(found, case)
    assert all(same_bits(x, p.to(BF16)) for x, p in zip(low, moved.params, strict=True))
    for e, before, p in zip(averages or [], case.averages or [], moved.params, strict=average):
        assert_average(e, before, p)


def test_wrong_vectors(there):
    case = Case([(3,)], "fp32")
    launch, _moved, _ = case.launch(there)
    with pytest.raises(RuntimeError):
        launch.measure(ALL, F64)
    with pytest.raises((RuntimeError, ValueError, IndexError)):
        launch.update_(Hyper().vectors(1, *there))
