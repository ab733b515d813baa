"""Stochastic rounding: where it lands, how often, and that all backends throw the same dice. Triton's part: test_gpu_ops.py."""

import pytest
import torch

from metaadamw_fast import MetaAdamW, ops, rounding

from .cases import F64, LAYOUTS, Hyper, place, random_lists, same_bits
from .models import noise, one_thread  # noqa: F401

HALVES = (torch.bfloat16, torch.float16)
STEP = torch.tensor(3.0, dtype=F64)


def same(x, y):
    """Element by element; NaN is NaN, and 0 is not -0."""
    return ((x == y) & (x.signbit() == y.signbit())) | (x.isnan() & y.isnan())


def neighbours(x, dtype):
    """The numbers of ``dtype`` on both sides of float32 ``x``, both ``x`` where it is one itself."""
    nearest = x.to(dtype)
    inward = nearest.view(torch.int16) - (nearest.float().abs() > x.abs()).to(torch.int16)
    sides = (inward.view(dtype).float(), (inward + 1).view(dtype).float())
    return [torch.where(x == nearest.float(), x, side) for side in sides]


def edges(dtype):
    """Ordinary numbers, subnormal ones of both types, the largest, and what must stay as it is."""
    info = torch.finfo(dtype)
    sizes = [1.0, info.max, info.tiny, info.smallest_normal, info.tiny * info.eps, 1e-30]
    spread = torch.cat([s * (1 + noise((300,), i) / 100) for i, s in enumerate(sizes)])
    return torch.cat([spread, -spread, torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan])])


@pytest.mark.parametrize("dtype", HALVES)
def test_to_a_neighbour_and_right_in_the_mean(dtype):
    x = edges(dtype)
    element = torch.arange(len(x))
    many = torch.stack(
        [rounding.round_stochastically(x, dtype, rounding.random_bits(7, STEP, t, rounding.PARAM, element)) for t in range(2000)]
    )
    stored = many.to(dtype).float()
    assert (same(stored, many) | stored.isinf()).all(), "rounding what was rounded changes it"
    many, finite = stored, x.isfinite()
    assert same(many[:, ~finite], x[~finite]).all()
    x, many = x[finite], many[:, finite]
    one, other = neighbours(x, dtype)
    assert ((many == one) | (many == other)).all()
    # A mean of 2000 draws of which each is one of two numbers: four and a half standard deviations, at most half the gap each.
    gap = (one.double() - other.double()).abs()
    inside = (one.isfinite() & other.isfinite()) & (gap > 0)
    assert inside.sum() > 1000
    error = (many.double().mean(0) - x.double()).abs()
    assert (error[inside] <= 4.5 * gap[inside] / 2 / 2000**0.5).all()
    assert same(many[:, gap == 0], x[gap == 0]).all()


def by_chance(lists, backend, seed, h=Hyper()):  # noqa: B008
    step_size, decay_factor, step, beta1, beta2, eps, grad_scale = h
    ops.adamw_update_(
        *(lists.params, lists.grads, lists.exp_avgs, lists.exp_avg_sqs, step_size, decay_factor),
        step=step,
        betas=(beta1, beta2),
        eps=eps,
        grad_scale=grad_scale,
        max_exp_avg_sqs=lists.maxima,
        rounding_seed=seed,
        backend=backend,
    )
    return lists


@pytest.mark.parametrize("dtypes", ["bf16", "fp16", "mixed halves"])
@pytest.mark.parametrize("seed", [0, -1, 2**40 + 5, 2**64 - 7])
def test_cpp_stores_the_unrounded_update_by_the_dice_of_the_reference(dtypes, seed):
    """The update itself differs from the reference's in its last bits, so the unrounded one comes from the C++ op on float32."""
    types = {
        "bf16": [torch.bfloat16] * 3,
        "fp16": [torch.float16] * 3,
        "mixed halves": [torch.float16, torch.float32, torch.bfloat16],
    }
    shapes = [(), (0,), (7,), (33, 40), (3, 40_000)]
    lists = random_lists(shapes, "fp32", amsgrad=True)
    names = ("params", "exp_avgs", "exp_avg_sqs")
    for name, dtype in zip(names, types[dtypes], strict=True):
        for x in getattr(lists, name):
            x.copy_(x.to(dtype))
    lists = lists.map(lambda x: x if x is None else (x.t().contiguous().t() if x.dim() == 2 and x.shape[0] == 33 else x))
    low = lists
    for name, dtype in zip(names, types[dtypes], strict=True):
        low = low.replaced(name, lambda x, dtype=dtype: x.to(dtype))
    wide = lists.map(lambda x: x if x is None else x.clone(memory_format=torch.preserve_format)).update(Hyper(), "cpp")
    by_chance(low, "cpp", seed)
    moved = 0
    operands = (rounding.PARAM, rounding.MOMENTUM, rounding.SECOND_MOMENT)
    for name, operand, dtype in zip(names, operands, types[dtypes], strict=True):
        for t, (actual, exact) in enumerate(zip(getattr(low, name), getattr(wide, name), strict=True)):
            random = rounding.random_bits(seed, STEP, t, operand, rounding.walked(lists.params[t]))
            expected = rounding.round_stochastically(exact, dtype, random)
            assert same_bits(actual, expected.to(dtype)), (name, t)
            moved += int((expected != exact.to(dtype).float()).sum())
    assert moved > 1000


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_another_seed_step_or_tensor_is_another_throw(backend):
    def draw(seed=0, step=3, count=1):
        x = torch.full((4096,), 1.0, dtype=torch.bfloat16)
        lists = [[x.clone() for _ in range(count)], [torch.zeros(4096) for _ in range(count)]]
        lists += [[torch.zeros(4096) for _ in range(count)] for _ in range(2)]
        ops.adamw_update_(*lists, 0.0, 1.003, step=step, rounding_seed=seed, backend=backend)
        return lists[0]

    first, second = draw(count=2)
    throws = [first, second, draw(seed=1)[0], draw(step=4)[0], draw(seed=2**32)[0]]
    assert same_bits(first, draw()[0])
    rate = 1 - 0.003 / 2**-7  # of landing on 1: the update is 0.003 of the 2^-7 to the next number
    for i, x in enumerate(throws):
        assert abs((x == 1).float().mean() - rate) < 0.04
        for y in throws[:i]:
            assert abs((x != y).float().mean() - 2 * rate * (1 - rate)) < 0.04


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "expanded"])
def test_strided_tensors_are_rounded_too(layout):
    lists = random_lists([(6, 5, 4, 3, 2)], "fp32").map(lambda x: x if x is None else x.bfloat16())
    wide = lists.map(lambda x: x if x is None else x.float()).update(Hyper(), "cpp")
    low = lists.map(lambda x: x if x is None else place(x, **LAYOUTS[layout]))
    by_chance(low, "cpp", 3)
    for actual, exact in zip(low.tensors(), wide.tensors(), strict=True):
        one, other = neighbours(exact, torch.bfloat16)
        assert ((actual.float() == one) | (actual.float() == other)).all()
    nearest = wide.params[0].bfloat16().float()
    assert (low.params[0].float() != nearest).any()


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_small_updates_of_a_bfloat16_model_are_not_lost(backend):
    """1000 steps of a 1000th of the last bit each: to the nearest nothing moves, by chance the mean moves by one bit."""
    p = torch.nn.Parameter(torch.full((2048,), 1.0, dtype=torch.bfloat16))
    moved = {}
    for chance in (False, True):
        q = torch.nn.Parameter(p.detach().clone())
        opt = MetaAdamW([q], lr=2**-8 / 300, weight_decay=0, stochastic_rounding=chance, state_dtype=torch.float32, backend=backend)
        q.grad = torch.ones_like(q)
        for _ in range(300):
            opt.step()
        moved[chance] = float((1 - q.detach().float()).mean())
    assert moved[False] == 0
    assert moved[True] == pytest.approx(2**-8, rel=0.1)


def test_the_same_run_again_and_after_a_checkpoint():
    def optimizer(seed=0):
        q = torch.nn.Parameter(noise((3000,), 0).bfloat16())
        return q, MetaAdamW([q], lr=1e-3, stochastic_rounding=True, state_dtype=torch.bfloat16, seed=seed)

    def steps(q, opt, first, last):
        for step in range(first, last):
            q.grad = noise(q.shape, step, q.dtype)
            opt.step()
        return [q.detach(), *(opt.state[q][name] for name in ("exp_avg", "exp_avg_sq"))]

    whole = steps(*optimizer(), 0, 20)
    assert all(x.dtype == torch.bfloat16 for x in whole)
    q, opt = optimizer()
    steps(q, opt, 0, 10)
    r, resumed = optimizer()
    r.data.copy_(q.data)
    resumed.load_state_dict(opt.state_dict())
    assert all(same_bits(x, y) for x, y in zip(whole, steps(r, resumed, 10, 20), strict=True))
    assert not same_bits(whole[0], steps(*optimizer(seed=1), 0, 20)[0])
