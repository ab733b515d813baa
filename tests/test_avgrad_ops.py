"""AVGrad's update on every backend, against MADA section 7 in plain float64.

test_triton_interpreter.py and test_cuda_emulated.py run this with their kernels.
"""

import pytest
import torch

from metaadamw_fast import ops

from .cases import BF16, BLOCK, CHUNK, DTYPES, F32, F64, Hyper, assert_within, clone, place, random_lists, same_bits
from .test_policy import EMULATED, INTERPRETED, PLACES
from .test_policy import place as of_place
from .tolerances import REDUCTION, avgrad_bounds, stored


@pytest.fixture(params=[of_place(*x) for x in ([] if EMULATED or INTERPRETED else [("reference", "cpu")]) + PLACES])
def there(request):
    return request.param


LONG = (CHUNK // 2 + 3,)  # longer than a chunk of any GPU backend
SIZES = [(), (0,), (5,), (3, BLOCK + 1), LONG, (7,) if EMULATED or INTERPRETED else (CHUNK + 1,)]
F64_ZERO = torch.zeros((), dtype=F64)
NARROW = [name for name, types in DTYPES.items() if any(x.itemsize == 2 for x in types)]


def lists_of(shapes, dtypes, seed=0):
    """Random operands; the means (in the field of the maxima) are float32, or float64 beside moments of it."""
    lists = random_lists(shapes, dtypes, seed, amsgrad=True)
    return lists.replaced("maxima", lambda x: x.to(F64 if x.dtype == F64 else F32))


def launched(lists, there, low=None):
    backend, device = there
    moved = lists.map(lambda x: None if x is None else clone(x).to(device))
    operands = (moved.grads, moved.exp_avgs, moved.params, moved.exp_avg_sqs, moved.maxima, low)
    launch = ops.resolve_backend(backend, torch.device(device)).launch
    return launch(*operands, written=True, rule="avgrad"), moved


def vectors(h, count, there):
    backend, device = there
    return h.vectors(count, backend, device)


def exactly(lists, h):
    """What the formula makes of the lists, in float64; a row is left alone that has no gradient or whose step is 0."""
    rows = []
    for t, (p, g, m, v, a) in enumerate(zip(*lists, strict=True)):
        lr, decay_factor, step, beta1, beta2, eps, scale = h.of_tensor(t, len(lists.params))
        p, m, v, a = (x.double() for x in (p, m, v, a))
        if g is not None and step != 0:
            g = scale * g.double()
            m = beta1 * m + (1 - beta1) * g
            v = beta2 * v + (1 - beta2) * g * g
            a = a + (v - a) / step
            p = decay_factor * p - lr * (m / (1 - beta1**step)) / ((a / (1 - beta2**step)).sqrt() + eps)
        rows.append((p, lists.grads[t], m, v, a))
    return lists._make([list(column) for column in zip(*rows, strict=True)])


def assert_updated(after, before, h):
    exact, count = exactly(before, h), len(before.params)
    for t in range(count):
        if before.grads[t] is None or h.of_tensor(t, count).step == 0:
            assert all(x[t] is None or same_bits(x[t], y[t]) for x, y in zip(after, before, strict=True))
            continue
        arithmetic = F64 if any(x[t].dtype == F64 for x in before) else F32
        start = [x[t].double() for x in before]
        bounds = avgrad_bounds(
            *start, new_v=exact.exp_avg_sqs[t], new_a=exact.maxima[t], h=h.of_tensor(t, count), arithmetic=arithmetic
        )
        for name, bound in zip(("params", "exp_avgs", "exp_avg_sqs", "maxima"), bounds, strict=True):
            got, want = getattr(after, name)[t], getattr(exact, name)[t]
            assert_within(got.cpu(), want, stored(bound, want, got.dtype, arithmetic), f"{name}[{t}]")


@pytest.mark.parametrize("grad_scale", [None, "tensor", -1.0])
@pytest.mark.parametrize("dtypes", DTYPES)
def test_the_formula(dtypes, grad_scale, there):
    """With decay; of every dtype, size and a step of each tensor's own."""
    lists = lists_of(SIZES, dtypes)
    scale = torch.linspace(0.25, 2, len(SIZES), dtype=F64) if grad_scale == "tensor" else grad_scale
    h = Hyper(step=torch.tensor([1.0, 2, 3, 50, 1000, 1e6], dtype=F64), grad_scale=scale)
    launch, moved = launched(lists, there)
    launch.update_(vectors(h, len(SIZES), there))
    assert_updated(moved, lists, h)


@pytest.mark.parametrize("layout", [{"offset": 1}, {"order": (1, 0)}, {"step": 3, "gap": 5}])
@pytest.mark.parametrize("name", ["params", "grads", "maxima"])
def test_operands_elsewhere_in_memory(name, layout, there):
    lists = lists_of([(37, 53), (2, BLOCK)], "fp32").replaced(name, lambda x: place(x, **layout))
    launch, moved = launched(lists, there)
    launch.update_(vectors(Hyper(), 2, there))
    assert_updated(moved, lists, Hyper())


def test_rows_without_a_gradient_or_a_step_are_left_alone(there):
    lists = lists_of([(5,), (BLOCK + 3,), (7,), (3,)], "fp32")
    lists.grads[1] = None
    lists.grads[3].fill_(float("inf"))
    h = Hyper(step=torch.tensor([4.0, 4, 4, 0], dtype=F64))
    launch, moved = launched(lists, there)
    launch.update_(vectors(h, 4, there))
    assert_updated(moved, lists, h)


@pytest.mark.parametrize("dtypes", ["fp32", "fp64", "bf16"])
def test_the_only_sum_is_that_of_clipping(dtypes, there):
    lists = lists_of(SIZES, dtypes)
    lists.grads[2] = None
    launch, _ = launched(lists, there)
    for dtype in (F32, F64):
        sums = launch.measure(1, dtype)
        exact = torch.stack([F64_ZERO if g is None else g.double().square().sum() for g in lists.grads])
        assert sums.shape == (len(SIZES), 1)
        assert sums.dtype == dtype
        assert ((sums[:, 0].cpu().double() - exact).abs() <= 1e-6 * exact).all()


@pytest.mark.parametrize("dtypes", NARROW)
def test_the_mean_is_never_rounded_by_chance(dtypes, there):
    lists = lists_of([(7,), (3, BLOCK)], dtypes).replaced("maxima", lambda x: x.to(BF16))  # float32 would not be rounded at all
    (nearest, plain), (launch, moved), (again, same) = (launched(lists, there) for _ in range(3))
    nearest.update_(vectors(Hyper(), 2, there))
    launch.update_(vectors(Hyper(), 2, there), None, 5)
    again.update_(vectors(Hyper(), 2, there), None, 5)
    assert all(map(same_bits, moved.maxima, plain.maxima))
    assert moved.same_bits(same)
    assert not moved.same_bits(plain)


def test_a_bfloat16_parameter_with_a_master(there):
    """The engine keeps it: the master is updated as any parameter is, and the model's parameter is its rounding."""
    lists = lists_of([(5,), (BLOCK + 3,)], "fp32")
    low = [x.to(BF16).to(there[1]) for x in lists.params]
    launch, moved = launched(lists, there, low)
    launch.update_(vectors(Hyper(), 2, there))
    assert_updated(moved, lists, Hyper())
    assert all(same_bits(x, p.to(BF16)) for x, p in zip(low, moved.params, strict=True))


def test_many_steps(there):
    """From zero states, as training goes."""
    lists = lists_of([(40,)], "fp64").replaced("exp_avgs", torch.zeros_like)
    lists = lists.replaced("exp_avg_sqs", torch.zeros_like).replaced("maxima", torch.zeros_like)
    launch, moved = launched(lists, there)
    want = lists
    for step in range(1, 31):
        grads = random_lists([(40,)], "fp64", seed=step).grads
        h = Hyper(step=step, beta2=0.99, eps=1e-6)
        moved = moved._replace(grads=[x.to(there[1]) for x in grads])
        launch.set_gradients(moved.grads)
        launch.update_(vectors(h, 1, there))
        want = exactly(want._replace(grads=grads), h)
    for x, y in zip(moved, want, strict=True):
        assert (x[0].cpu() - y[0]).norm() <= REDUCTION[F64] * y[0].norm()


@pytest.mark.parametrize("absent", ["all", "one"])
def test_the_mean_is_not_optional(absent, there):
    lists = lists_of([(3,), (4, 5)], "fp32")
    lists = lists._replace(maxima=None if absent == "all" else [lists.maxima[0], torch.empty(0)])
    message = "the update needs average_sqs" if absent == "all" else r"average_sqs\[1\] and params\[1\] differ in shape"
    with pytest.raises(RuntimeError, match=message):
        launched(lists, there)
