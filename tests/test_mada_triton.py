"""MADA's ops in Triton, bit by bit against numpy, operation by operation as docs/mada.md sections 3 and 4 have them.

test_triton_interpreter.py runs this with TRITON_INTERPRET=1. Without a GPU and without the interpreter nothing here can run.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from metaadamw_fast import mada_reference, ops
from metaadamw_fast.mada_reference import Flags, H, Half

from .cases import BF16, BLOCK, F32, F64, clone, place, same_bits, same_surroundings
from .test_gpu_ops import DEVICE, INTERPRETED, _patch_the_language_once_per_kernel  # noqa: F401

if DEVICE.type == "cpu" and not INTERPRETED:
    pytest.skip("Triton needs a GPU or its interpreter", allow_module_level=True)
pytest.importorskip("triton", reason="Triton is built for Linux only")

BACKEND = ops.resolve_backend("triton", DEVICE)
CPP = ops.resolve_backend("cpp", torch.device("cpu"))
CHUNK = 16 * BLOCK  # kernels/elements.py
NAMES = (
    "grads", "exp_avgs", "params", "exp_avg_sqs", "average_sqs", "exp_avg_diffs", "lion_exp_avgs", "last_grads", "previous_grads"
)  # fmt: skip
WRITTEN = (1, 2, 3, 4, 5, 6, 8)
SHAPES = [(7,), (3, 5), (BLOCK + 6,), (0,), (4,), (2, 3), (2,)]
WITHOUT_GRADIENT, WITHOUT_STEP = 4, 5  # rows
PAPER = Flags.KEEPS | Flags.LOOKS_BACK | Flags.TWO


# ----------------------------------------------------------------------------------------------------- the formulas, in numpy


def magnitude(x):
    return np.where(x < 0, -x, x)


def has(h, flag):
    return bool(int(h["flags"]) & flag)


def updated(x, h):
    """Section 3, for arrays of the nine operands and a column of the vectors."""
    dtype = x[0].dtype.type
    s = {name: dtype(value) for name, value in h.items()}
    less = {name: dtype(1 - value) for name, value in h.items()}
    grad, m, p, v, a, n, lion, last, other = x
    g = grad * s["grad_scale"]
    last = last if has(h, Flags.TWO) else other
    d = g if not has(h, Flags.KEEPS) else 0 * g if has(h, Flags.FIRST) else g - last * s["last_scale"]
    ahead = g + s["beta3"] * d
    squared = ahead * ahead
    v = np.full_like(v, 1e-15) if has(h, Flags.V_STARTS) else magnitude(v)
    n = g * g if has(h, Flags.N_STARTS) else n
    a = magnitude(a)
    sigma = np.where(squared > v, 1, np.where(squared < v, -1, 0)).astype(dtype)
    kappa = s["c"] + less["c"] * sigma
    v = s["beta2"] * v + less["beta2"] * (kappa * squared + less["c"] * v)
    m = g + s["beta1"] * (m - g) if h["beta1"] < 0.5 else m + less["beta1"] * (g - m)
    n = s["beta3"] * n + less["beta3"] * d
    a = np.where((a >= v) | (a != a), a, v) if has(h, Flags.MAXIMUM) else a + (v - a) / s["step"]
    new_lion = s["lion2"] * lion + less["lion2"] * g
    u = s["lion1"] * (lion if has(h, Flags.LOOKS_BACK) else new_lion) + less["lion1"] * g
    mixed = v if less["rho"] == 0 else s["rho"] * v + less["rho"] * a
    root = np.sqrt(mixed) * dtype(1 / np.sqrt(h["k2"]))
    r = (m * dtype(1 / h["k1"]) + s["beta3"] * n) / (root + s["eps"])
    sign = np.where(u > 0, 1, np.where(u < 0, -1, 0)).astype(dtype)
    direction = (0 * r if s["gamma"] == 0 else s["gamma"] * r) + less["gamma"] * sign
    p = s["decay_factor"] * p - s["step_size"] * direction
    if has(h, Flags.SIGN_IN_V):
        v = np.where(sigma < 0, -v, v)
    else:
        a = np.where(sigma < 0, -a, a)
    return [grad, m, p, v, a, n, new_lion, last, grad]


def terms(x, h):
    """Section 4: of each element its terms of the seven sums."""
    dtype = x[0].dtype.type
    s = {name: dtype(value) for name, value in h.items()}
    less = {name: dtype(1 - value) for name, value in h.items()}
    grad, m, _, stored_v, stored_a, n, lion, last, other = x
    b = 1 - h["beta2"]
    two = has(h, Flags.TWO)
    g = (last if two else other) * s["grad_scale"]
    first = has(h, Flags.FIRST) or not two
    d = g if not has(h, Flags.KEEPS) else 0 * g if first else g - other * s["last_scale"]
    v, a = magnitude(stored_v), magnitude(stored_a)
    sigma = np.where((stored_v if has(h, Flags.SIGN_IN_V) else stored_a) < 0, -1, 1).astype(dtype)
    ahead = g + s["beta3"] * d
    squared = ahead * ahead
    kappa = s["c"] + less["c"] * sigma
    v_before = (v - dtype(b) * (kappa * squared)) * dtype(1 / (1 - b * h["c"]))
    mixed = v if less["rho"] == 0 else s["rho"] * v + less["rho"] * a
    root = np.sqrt(mixed) * dtype(1 / np.sqrt(h["k2"]))
    r = (m * dtype(1 / h["k1"]) + s["beta3"] * n) / (root + s["eps"])
    p_factor = s["gamma"] / (root + s["eps"])
    with np.errstate(all="ignore"):
        q_factor = np.where(root > 0, -(p_factor * r) / (2 * root), dtype(0))
    of_v = q_factor * dtype(h["rho"] * b / h["k2"])
    lion = (lion - less["lion2"] * g) * dtype(1 / h["lion2"]) if has(h, Flags.LOOKS_BACK) else lion
    u = s["lion1"] * lion + less["lion1"] * g
    inverse_k2 = dtype(1 / h["k2"])
    along = [
        p_factor * ((m - g) * dtype(1 / (h["beta1"] * h["k1"])) + m * s["slope1"]),
        q_factor * ((s["rho"] * (s["c"] * v_before - kappa * squared)) * inverse_k2 + mixed * s["slope2"]),
        p_factor * (2 * n - d) + (of_v * kappa) * (2 * ahead * d),
        (q_factor * (v - a)) * inverse_k2,
        of_v * (squared * (1 - sigma) - v_before),
        r - np.where(u > 0, 1, np.where(u < 0, -1, 0)).astype(dtype),
    ]
    return [grad * grad, *(grad * x for x in along)]


# --------------------------------------------------------------------------------------------------------- operands and vectors


def lists_of(shapes, dtypes, lacks=(), flags=PAPER, seed=0):
    """The nine lists; ``dtypes`` of the parameter, of the states, of the gradients. V and A have signs where they carry the bit."""
    generator = torch.Generator().manual_seed(seed)
    param, state, grad = dtypes
    lists = []
    for k, name in enumerate(NAMES):
        dtype = param if k == 2 else grad if k in (0, 7, 8) else F32 if k == 4 and state == BF16 else state
        xs = [torch.randn(shape, generator=generator, dtype=F64) for shape in shapes]
        if k in (3, 4):
            signs = k == (3 if flags & Flags.SIGN_IN_V else 4)
            xs = [0.8 * x.square() * (x.sign() if signs else 1) for x in xs]
        lists.append(None if name in lacks else [x.to(dtype) for x in xs])
    return lists


def half(count, flags=PAPER, seed=0, turn=0, **fixed):
    """Half of the vectors, float64 [H, T], of numbers that differ from tensor to tensor."""
    drawn = np.random.default_rng(seed)
    columns = []
    for _ in range(count):
        names = ("beta1", "beta2", "beta3", "rho", "c", "gamma")
        h = dict(zip(names, drawn.uniform((0.3, 0.6, 0, 0.1, 0.1, 0.1), (0.95, 0.99, 0.9, 0.9, 0.9, 0.9)), strict=True))
        h |= {"step_size": drawn.uniform(0.01, 0.2), "decay_factor": 0.99, "step": float(drawn.integers(2, 40)), "eps": 1e-6}
        h |= {"grad_scale": drawn.uniform(0.5, 2), "last_scale": drawn.uniform(0.5, 2), "lion1": 0.95, "lion2": 0.98}
        h |= {"turn": float(turn), "flags": float(flags), "unclipped": 1.0} | fixed
        for i in (1, 2):
            h[f"k{i}"] = 1 - h[f"beta{i}"] ** h["step"]
            h[f"slope{i}"] = h["step"] * h[f"beta{i}"] ** (h["step"] - 1) / h[f"k{i}"] ** 2
        columns.append([h[name] for name in Half._fields])
    return torch.tensor(columns, dtype=F64).t().contiguous()


def column(vectors, t):
    return dict(zip(Half._fields, vectors[:H, t].tolist(), strict=True))


def launched(lists, low=None, written=True):
    """A launch of copies on the device, and these."""
    there = [None if xs is None else [None if x is None else clone(x).to(DEVICE) for x in xs] for xs in (*lists, low)]
    return BACKEND.launch(*there, written=written, rule="mada"), there


def arrays(lists, t, exchanged):
    """The operands of a row in the type of its arithmetic, and that dtype; the buffers as an update of this parity finds them."""
    row = [None if xs is None or xs[t] is None else xs[t].cpu() for xs in lists[:9]]
    dtype = F64 if any(x is not None and x.dtype == F64 for x in row) else F32
    if exchanged and row[7] is not None and row[8] is not None:
        row[7], row[8] = row[8], row[7]
    leader = next(x for x in (row[2], row[1]) if x is not None)
    return [(torch.zeros_like(leader) if x is None else x).to(dtype).contiguous().numpy() for x in row]


def odd(number):
    return int(number) % 2 == 1


def assert_updated(after, before, vectors):
    """Every row of ``after`` has the bits that numpy makes of ``before``; what is not to be written is as it was."""
    for t in range(len(before[1])):
        h = column(vectors, t)
        exchanged = odd(h["turn"]) and before[7] is not None and before[8] is not None
        new = [None] * 9
        if before[0][t] is not None and h["step"] != 0:
            new = updated(arrays(before, t, exchanged), h)
        for k, (xs, ys) in enumerate(zip(after[:9], before, strict=True)):
            if ys is None or ys[t] is None:
                continue
            source = 15 - k if exchanged and k in (7, 8) else k
            if new[source] is None or source not in WRITTEN:
                assert same_bits(xs[t].cpu(), ys[t]), (NAMES[k], t)
                continue
            want = torch.from_numpy(np.ascontiguousarray(new[source])).reshape(ys[t].shape)
            want = want.float().to(ys[t].dtype) if ys[t].dtype.itemsize == 2 else want.to(ys[t].dtype)
            assert same_bits(xs[t].cpu(), want), (NAMES[k], t)
            assert same_surroundings(xs[t].cpu(), ys[t]) if DEVICE.type == "cpu" else True


FP32, FP64, LOW, MIXED = (F32, F32, F32), (F64, F64, F64), (BF16, BF16, BF16), (F32, BF16, BF16)
NO_A, NO_N, NO_L, NO_TWO, NO_BUFFERS = (
    "average_sqs",
    "exp_avg_diffs",
    "lion_exp_avgs",
    "last_grads",
    ("last_grads", "previous_grads"),
)
RELEASED = Flags(0)
CASES = {
    "paper, fp32": (FP32, PAPER, (), 0),
    "paper, fp32, odd": (FP32, PAPER, (), 1),
    "paper, fp64, odd": (FP64, PAPER, (), 3),
    "paper, all bf16": (LOW, PAPER, (), 1),
    "fp32 parameters, bf16 states": (MIXED, PAPER, (), 0),
    "first": (FP32, PAPER | Flags.FIRST, (), 0),
    "maximum": (FP32, PAPER | Flags.MAXIMUM, (), 0),
    "no average": (FP32, PAPER | Flags.SIGN_IN_V, (NO_A,), 1),
    "released": (FP32, RELEASED, (NO_TWO,), 1),
    "released, at the start": (FP32, RELEASED | Flags.V_STARTS | Flags.N_STARTS, (NO_TWO,), 0),
    "one buffer": (FP32, Flags.KEEPS | Flags.LOOKS_BACK | Flags.SIGN_IN_V, (NO_A, NO_N, NO_TWO), 0),
    "HyperAdam, nothing kept": (FP32, Flags.KEEPS | Flags.SIGN_IN_V, (NO_A, NO_N, NO_L, *NO_BUFFERS), 1),
}
EVERY = pytest.mark.parametrize("case", CASES)


def prepared(case, seed=0):
    """Lists, with a row without a gradient and one whose step is 0, and the vectors [2H, T] of an update of them."""
    dtypes, flags, lacks, turn = CASES[case]
    lists = lists_of(SHAPES, dtypes, lacks, flags, seed)
    fixed = {} if NO_A not in lacks else {"rho": 1.0}
    this, last = (half(len(SHAPES), flags, seed + i, turn - i, **fixed) for i in (0, 1))
    this[2, WITHOUT_STEP] = 0
    lists[0][WITHOUT_GRADIENT] = None
    lists[0][WITHOUT_STEP].mul_(2)
    return lists, torch.cat([this, last]).to(DEVICE)


# ------------------------------------------------------------------------------------------------------------------- the update


@EVERY
def test_update_and_what_it_finds(case):
    """The bits of the formula; with the sums of what it finds, those of `measure` before it, and the update is the same."""
    lists, vectors = prepared(case)
    launch, there = launched(lists)
    before = launch.measure(127, F64, None, vectors[H:].contiguous())
    launch.update_(vectors)
    assert_updated(there, lists, vectors.cpu())
    other, twin = launched(lists)
    sums = torch.full((len(SHAPES), 7), -1.0, dtype=F64, device=DEVICE)
    other.update_(vectors, sums)
    assert all(
        same_bits(x, y)
        for xs, ys in zip(twin, there, strict=True)
        for x, y in zip(xs or [], ys or [], strict=True)
        if x is not None
    )
    assert same_bits(sums, before)
    assert not sums[WITHOUT_GRADIENT].any()
    assert not sums[3].any()  # without elements
    assert sums[WITHOUT_STEP].all() or NO_A in CASES[case][2]


@pytest.mark.parametrize("zero", ["beta3", "rho", "c", "gamma", "grad_scale", "eps"])
def test_numbers_of_zero_and_one(zero):
    lists = lists_of([(9,)], FP32)
    for value in (0.0, 1.0):
        vectors = torch.cat([half(1, **{zero: value})] * 2).to(DEVICE)
        launch, there = launched(lists)
        launch.update_(vectors)
        assert_updated(there, lists, vectors.cpu())


def test_operands_elsewhere_in_memory():
    """The two buffers alike, all else in an order of its own; not on 16 bytes."""
    layouts = [{"order": (1, 0)}, {"offset": 1}, {}, {"step": 2}, {"gap": 3}, {"order": (1, 0)}, {}, {"offset": 3}, {"offset": 3}]
    lists = [[place(x, **layout) for x in xs] for xs, layout in zip(lists_of([(5, 7), (2, 600)], FP32), layouts, strict=True)]
    vectors = torch.cat([half(2, turn=1), half(2, turn=0)]).to(DEVICE)
    launch, there = launched(lists)
    sums = torch.empty(2, 7, dtype=F64, device=DEVICE)
    launch.update_(vectors, sums)
    assert_updated(there, lists, vectors.cpu())
    dense, _ = launched([[x.contiguous() for x in xs] for xs in lists])
    assert same_bits(sums, dense.measure(127, F64, None, vectors[H:].contiguous()))


def test_masters():
    """The update starts from the master, or from what somebody wrote into the parameter."""
    shapes = [(5,), (BLOCK + 3,)]
    lists = lists_of(shapes, (F32, F32, BF16))
    low = [x.to(BF16) for x in lists[2]]
    low[0][2] = 3.0
    vectors = torch.cat([half(2)] * 2).to(DEVICE)
    launch, there = launched(lists, low)
    sums = torch.empty(2, 7, dtype=F64, device=DEVICE)
    launch.update_(vectors, sums)
    started = [clone(x) for x in lists[2]]
    started[0][2] = 3.0
    assert_updated(there, [*lists[:2], started, *lists[3:]], vectors.cpu())
    assert all(same_bits(x, p.to(BF16)) for x, p in zip(there[9], there[2], strict=True))


def test_stochastic_rounding():
    """Of m, p, V, n and l; the same for the same seed, as likely up as down, at most the distance of two numbers away."""
    lists = lists_of([(4000,)], LOW)
    lists[4] = [x.to(BF16) for x in lists[4]]
    vectors = torch.cat([half(1)] * 2).to(DEVICE)
    (launch, there), (again, same), (nearest, plain) = (launched(lists) for _ in range(3))
    launch.update_(vectors, None, 5)
    again.update_(vectors, None, 5)
    nearest.update_(vectors)
    exact = updated(arrays(lists, 0, False), column(vectors.cpu(), 0))
    for k in (1, 2, 3, 4, 5, 6, 8):
        assert same_bits(there[k][0], same[k][0])
        if k in (4, 8):
            assert same_bits(there[k][0], plain[k][0])
            continue
        difference = there[k][0].cpu().double() - torch.from_numpy(exact[k]).double()
        assert (difference.abs() <= 2.0**-7 * torch.from_numpy(np.abs(exact[k])).double()).all()
        assert 0.4 < (difference > 0).double().mean() < 0.6
        assert not same_bits(there[k][0], plain[k][0])


def test_the_buffers_take_turns():
    """Step after step on one table: operand 7 and 8 hold this gradient and the last one, whichever is which."""
    lists = lists_of([(6,)], FP32)
    launch, there = launched(lists)
    for turn in range(4):
        before = [None if xs is None else [clone(x.cpu()) for x in xs] for xs in there[:9]]
        vectors = torch.cat([half(1, turn=turn, seed=turn), half(1, turn=turn - 1)]).to(DEVICE)
        grad = torch.randn(6, generator=torch.Generator().manual_seed(turn)).to(DEVICE)
        launch.set_gradients([grad])
        there[0], before[0] = [grad], [grad.cpu()]
        launch.update_(vectors)
        assert_updated(there, before, vectors.cpu())
        assert same_bits(there[8 - turn % 2][0], grad)


@EVERY
def test_the_bits_of_the_cpp_backend(case):
    """On the CPU, also of stochastic rounding; sums of one element are its terms, which both add in another order."""
    lists, vectors = prepared(case)
    shapes = [(), (1, 1), *SHAPES]
    more = lists_of(shapes[:2], *CASES[case][:1], CASES[case][2], CASES[case][1], seed=7)
    lists = [None if xs is None else [*ys, *xs] for xs, ys in zip(lists, more, strict=True)]
    vectors = torch.cat([vectors[:, :2], vectors], dim=1)
    last = vectors[H:].contiguous()
    launch, there = launched(lists)
    plain = [None if xs is None else [None if x is None else clone(x) for x in xs] for xs in lists]
    on_cpu = CPP.launch(*plain, written=True, rule="mada")
    sums = launch.measure(127, F64, None, last)[:2]
    assert same_bits(on_cpu.measure(127, F64, None, last.cpu())[:2], sums.cpu())
    launch.update_(vectors, None, 7)
    on_cpu.update_(vectors.cpu(), None, 7)
    for xs, ys in zip(there, plain, strict=False):
        assert all(x is None or same_bits(x.cpu(), y) for x, y in zip(xs or [], ys or [], strict=True))


def test_against_float64_eager():
    """The reference in plain PyTorch rounds in another order."""
    lists = lists_of(SHAPES, FP64)
    vectors = torch.cat([half(len(SHAPES), turn=2), half(len(SHAPES), turn=1, seed=1)])
    plain = [[clone(x) for x in xs] for xs in lists]
    want = torch.empty(len(SHAPES), 7, dtype=F64)
    mada_reference.mada_update_((*plain, None), vectors, want)
    launch, there = launched(lists)
    sums = torch.empty(len(SHAPES), 7, dtype=F64, device=DEVICE)
    launch.update_(vectors.to(DEVICE), sums)
    for xs, ys in zip(there[:9], plain, strict=True):
        for x, y in zip(xs, ys, strict=True):
            assert torch.allclose(x.cpu(), y, rtol=1e-12, atol=1e-14)
    assert torch.allclose(sums.cpu(), want, rtol=1e-10, atol=1e-10)


# --------------------------------------------------------------------------------------------------------------------- the sums


@EVERY
def test_sums(case):
    lists, vectors = prepared(case)
    last = vectors[H:].contiguous()
    launch, _ = launched(lists, written=False)
    sums = launch.measure(127, F64, None, last).cpu()
    for t in range(len(SHAPES)):
        if lists[0][t] is None:
            assert not sums[t].any()
            continue
        h = column(last.cpu(), t)
        of_row = [torch.from_numpy(x).double() for x in terms(arrays(lists, t, odd(h["turn"] + 1)), h)]
        exact = torch.stack([x.sum() for x in of_row])
        size = torch.stack([x.abs().sum() for x in of_row])
        # The two blocks of a row share lanes, which add up in the type of the arithmetic.
        assert (
            (sums[t] - exact).abs() <= (1e-15 if CASES[case][0] == FP64 or len(of_row[0]) < BLOCK else 2.0**-23) * size
        ).all(), t


def test_columns_and_chunks():
    """Each column alone has the bits that it has among all; a row of two chunks is summed over both."""
    lists = lists_of([(CHUNK + 5,), (3,)], FP32)
    last = half(2, turn=0).to(DEVICE)
    launch, _ = launched(lists)
    every = launch.measure(127, F64, None, last)
    for columns in (1, 0b1000110, 0b0111000):
        chosen = [i for i in range(7) if columns >> i & 1]
        assert same_bits(launch.measure(columns, F64, None, last), every[:, chosen])
    assert same_bits(launch.measure(1, F32), every[:, :1].float())
    h = column(last.cpu(), 0)
    of_row = [torch.from_numpy(x).double() for x in terms(arrays(lists, 0, True), h)]
    exact, size = (torch.stack([f(x).sum() for x in of_row]) for f in (torch.clone, torch.abs))
    assert ((every[0].cpu() - exact).abs() <= 2.0**-20 * size).all()
    without, _ = launched([*lists[:2], None, *lists[3:]], written=False)  # the parameter is not read
    assert same_bits(without.measure(127, F64, None, last), every)


def test_no_lane_behind_the_end_counts():
    """Of zeros and eps 0 a term is not a number."""
    lists = lists_of([(5,)], FP32)
    last = half(1, eps=0.0).to(DEVICE)
    launch, _ = launched(lists)
    assert launch.measure(127, F64, None, last).isfinite().all()


# ---------------------------------------------------------------------------------------------------------------------- errors


def test_errors():
    lists = lists_of([(4, 5)], FP32)
    launch, _ = launched(lists)
    with pytest.raises(RuntimeError, match="need the vectors of the last update"):
        launch.measure(0b10, F64)
    with pytest.raises(RuntimeError, match=rf"vectors must be .* of shape \[{H}, 1\]"):
        launch.measure(0b10, F64, None, half(2).to(DEVICE))
    with pytest.raises(RuntimeError, match=rf"vectors must be .* of shape \[{2 * H}, 1\]"):
        launch.update_(half(1).to(DEVICE))
    with pytest.raises(RuntimeError, match=r"new_sums must be .* of shape \[1, 7\]"):
        launch.update_(torch.cat([half(1)] * 2).to(DEVICE), torch.zeros(1, 2, dtype=F64, device=DEVICE))
    with pytest.raises(RuntimeError, match="without the lists of these columns"):
        launched([*lists[:3], *[None] * 6], written=False)[0].measure(0b10, F64, None, half(1).to(DEVICE))
    for spoilt in ([lists[7][0].double()], [lists[7][0].t().contiguous().t()]):
        with pytest.raises(RuntimeError, match=r"last_grads\[0\] and previous_grads\[0\] differ"):
            launched([*lists[:7], spoilt, lists[8]])


# ------------------------------------------------------------------------------------------------------------------- the policy


def arguments(tensors, sets, seed=0, **changed):
    """Of `mada_policy_`, by name, as a run in its middle has them."""
    drawn = torch.Generator().manual_seed(seed)

    def draw(*shape, low=0.0, high=1.0):
        return low + (high - low) * torch.rand(shape, generator=drawn, dtype=F64)

    last = torch.stack([half(tensors, seed=seed), half(tensors, seed=seed + 1)])
    last[:, 20] = draw(2, tensors)
    given = {
        "sums": draw(tensors, 7, low=-1.0),
        "coefficients": draw(sets, 6, low=0.4, high=0.8),
        "momentum": draw(sets, 6, low=-0.1, high=0.1),
        "hyper_gradient": torch.zeros(sets, 6, dtype=F64),
        "hyper_sums": torch.zeros(tensors, 6, dtype=F64),
        "last": last,
        "set_of": torch.arange(tensors) % sets,
        "lr": draw(tensors),
        "weight_decay": draw(tensors),
        "eps": draw(tensors),
        "grad_scale": draw(tensors),
        "unclipped": draw(tensors),
        "counts": torch.cat([torch.randint(0, 60, (tensors,), generator=drawn).double(), torch.tensor([60.0])]),
        "present": (draw(tensors) < 0.8).double(),
        "turns": torch.randint(0, 9, (tensors,), generator=drawn).double(),
        "go": torch.tensor(True),
        "constants": torch.tensor([[0.05] * 6, [0.5] * 6, [0.1] * 6, [0.9] * 6], dtype=F64),
        "hyper_clip": 0.3,
        "freeze_steps": 50,
        "lion1": 0.95,
        "lion2": 0.98,
        "flags": int(PAPER | Flags.STARTS_AT_REST | Flags.V_STARTS | Flags.N_STARTS),
        "lagged": False,
        "advance": True,
    }
    assert not changed.keys() - given.keys()
    return given | changed


INPLACE = ("coefficients", "momentum", "hyper_gradient", "hyper_sums", "last")


def decided(policy, given, device="cpu"):
    there = [x.clone().to(device) if isinstance(x, torch.Tensor) else x for x in given.values()]
    vectors = policy(*there)
    return {"vectors": vectors} | {name: there[list(given).index(name)] for name in INPLACE}


def spoilt(x, places, value):
    x = x.clone()
    x[places] = value
    return x


SOME = arguments(5, 2)
POLICY = {
    "exact": {},
    "lagged": {"lagged": True},
    "frozen": {"freeze_steps": 60},
    "lagged, the first to learn": {"lagged": True, "freeze_steps": 58},
    "lagged, not yet": {"lagged": True, "freeze_steps": 59},
    "nothing is learned": {"sums": None},
    "no factors": {"grad_scale": None, "unclipped": None, "present": None, "go": None, "hyper_clip": 0.0},
    "skipped": {"go": torch.tensor(False)},
    "learning alone": {"advance": False},
    "infinite": {"sums": spoilt(SOME["sums"], (1, 3), float("inf"))},
    "not a number": {"sums": spoilt(SOME["sums"], (0, 6), float("nan"))},
    "no last update": {"last": spoilt(SOME["last"], (slice(None), 2, slice(0, 2)), 0.0), "counts": spoilt(SOME["counts"], 0, 0.0)},
    "no last update, not at rest": {"last": spoilt(SOME["last"], (slice(None), 2), 0.0), "flags": int(PAPER)},
    "not moved": {"last": spoilt(SOME["last"], (slice(None), 0, 1), 0.0), "sums": spoilt(SOME["sums"], 1, float("nan"))},
}


def assert_decided(given):
    """As in C++, and as eager PyTorch has it with another library's powers; with one tensor in each set the bits are C++'s."""
    got, want = decided(BACKEND.mada_policy_, given, DEVICE), decided(mada_reference.mada_policy_, given)
    for name, x in want.items():
        assert got[name].shape == x.shape
        assert torch.allclose(got[name].cpu(), x, rtol=1e-12, atol=1e-14, equal_nan=True), name
    on_cpu = decided(CPP.mada_policy_, given)
    for name, x in on_cpu.items():
        if len(given["set_of"]) <= len(given["coefficients"]) or given["sums"] is None:
            assert same_bits(got[name].cpu(), x), name
        assert torch.allclose(got[name].cpu(), x, rtol=1e-14, atol=1e-16, equal_nan=True), name


@pytest.mark.parametrize("case", POLICY)
def test_policy(case):
    assert_decided(arguments(5, 2, **POLICY[case]))


@pytest.mark.parametrize(("tensors", "sets"), [(1, 1), (3, 3), (259, 3)])
def test_policy_of_many_tensors(tensors, sets):
    assert_decided(arguments(tensors, sets))


def test_the_policy_checks_its_arguments():
    for name, bad in (("sums", SOME["sums"][:, :6]), ("present", SOME["present"].bool()), ("last", SOME["last"][0])):
        with pytest.raises(RuntimeError, match=f"^{name} must be a contiguous float64 tensor"):
            decided(BACKEND.mada_policy_, SOME | {name: bad}, DEVICE)
