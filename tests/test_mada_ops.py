"""MADA's update, sums and policy on every backend, against docs/mada.md sections 3 to 5.

The formulas stand here once more, over numbers that carry a bound of their own rounding (:class:`Rounded`): what a backend computes
in float32 or float64 must lie within it. That they are derivatives is checked against autograd.

tests/test_mada_triton.py and test_cuda_emulated.py do the same with their kernels.
"""

import dataclasses
from typing import NamedTuple

import pytest
import torch

from metaadamw_fast import ops
from metaadamw_fast.mada_reference import Flags, Half, Lists

from .cases import BF16, BLOCK, CHUNK, F16, F32, F64, assert_within, clone, memory_of, same_bits, same_surroundings
from .cases import place as elsewhere
from .test_policy import EMULATED, PLACES
from .test_policy import place as of_place
from .tolerances import SECOND_ORDER, stored, sum_bound, unit_roundoff

SIZES = [(), (0,), (5,), (3, BLOCK + 1), (CHUNK // 2 + 3,), (CHUNK + 1,)]
STATES = Lists._fields[1:9]
DTYPES = {  # of the parameter, the gradient and its buffers, the states; A is of float32 at least
    "fp32": (F32, F32, F32),
    "fp64": (F64, F64, F64),
    "bf16": (BF16, BF16, BF16),
    "fp16, fp32 states": (F16, F16, F32),
    "fp32, low states": (F32, F32, BF16),
    "fp64, fp32 states": (F64, F32, F32),
}
TWO, ONE, NONE = ("last_grads", "previous_grads"), ("previous_grads",), ()
KEEPS, LOOKS_BACK, STARTS = Flags.KEEPS, Flags.LOOKS_BACK, Flags.V_STARTS | Flags.N_STARTS
ALL_STATES = ("average_sqs", "exp_avg_diffs", "lion_exp_avgs")


class Case(NamedTuple):
    """Flags, the lists there are beside m, p and V, and coefficients that must not be others where a list is missing."""

    flags: Flags
    lists: tuple[str, ...]
    fixed: dict[str, float] = {}  # noqa: RUF012


CASES = {
    "paper": Case(KEEPS | LOOKS_BACK | Flags.TWO, ALL_STATES + TWO),
    "paper, at the start": Case(KEEPS | LOOKS_BACK | Flags.TWO | Flags.FIRST, ALL_STATES + TWO),
    "paper, frozen": Case(KEEPS | LOOKS_BACK, ALL_STATES + ONE),
    "paper, maximum": Case(KEEPS | LOOKS_BACK | Flags.TWO | Flags.MAXIMUM, ALL_STATES + TWO),
    "released": Case(Flags(0), ALL_STATES + ONE),
    "released, at the start": Case(STARTS, ALL_STATES + ONE),
    "no average": Case(KEEPS | LOOKS_BACK | Flags.TWO | Flags.SIGN_IN_V, ("exp_avg_diffs", "lion_exp_avgs", *TWO), {"rho": 1.0}),
    "no differences": Case(KEEPS | LOOKS_BACK, ("average_sqs", "lion_exp_avgs", *ONE), {"beta3": 0.0}),
    "no lion": Case(Flags.SIGN_IN_V, ("average_sqs", "exp_avg_diffs", *ONE), {"gamma": 1.0}),
    "hyperadam": Case(KEEPS | LOOKS_BACK | Flags.SIGN_IN_V, ONE, {"beta3": 0.0, "rho": 1.0, "gamma": 1.0}),
    "adam": Case(Flags.SIGN_IN_V, NONE, {"beta3": 0.0, "rho": 1.0, "c": 1.0, "gamma": 1.0}),
}


@pytest.fixture(params=[of_place(*x) for x in ([] if EMULATED else [("reference", "cpu")]) + PLACES])
def there(request):
    return request.param


def backend_of(there):
    return ops.resolve_backend(there[0], torch.device(there[1]))


# --------------------------------------------------------------------------------------------------------- operands and vectors


def lists_of(shapes, dtypes="fp32", case="paper", seed=0):
    """Random operands. Sizes are in [0.5, 2), squares likewise, and half of the numbers that carry the bit are negative."""
    generator = torch.Generator().manual_seed(seed)
    param, grad, state = DTYPES[dtypes]
    flags, there_are, _ = CASES[case]
    in_v = bool(flags & Flags.SIGN_IN_V)

    def draw(shape, dtype, signed=True):
        size = 0.5 + 1.5 * torch.rand(shape, generator=generator, dtype=F64)
        sign = torch.randint(0, 2, shape, generator=generator) * 2 - 1
        return (size * sign if signed else size).to(dtype)

    dtype_of = {"grads": grad, "params": param, "last_grads": grad, "previous_grads": grad}
    dtype_of["average_sqs"] = F64 if state is F64 else F32
    unsigned = {"average_sqs"} if in_v else {"exp_avg_sqs"}
    made = {name: [draw(shape, dtype_of.get(name, state), name not in unsigned) for shape in shapes] for name in Lists._fields[:9]}
    always = ("grads", "exp_avgs", "params", "exp_avg_sqs")
    return Lists(**{name: made[name] if name in (*always, *there_are) else None for name in Lists._fields[:9]})


def mapped(lists, f):
    return Lists(*(None if xs is None else [None if x is None else f(x) for x in xs] for xs in lists))


def half_of(count, case, seed=0, **given):
    """Vectors [H, count] of an update: coefficients inside and at the ends of their ranges, other numbers of each tensor's own."""
    generator = torch.Generator().manual_seed(seed)
    flags, _, fixed = CASES[case]

    def between(low, high):
        return low + (high - low) * torch.rand(count, generator=generator, dtype=F64)

    def fraction():  # with both ends among them
        x = between(0.05, 0.95)
        x[0::4], x[2::4] = 0.0, 1.0
        return x[torch.randperm(count, generator=generator)]

    step = torch.tensor([1.0, 2, 3, 50, 1000, 7], dtype=F64).repeat(count)[:count]
    beta1, beta2 = between(0.05, 0.99), between(0.55, 0.99)
    values = {
        "step_size": between(0.05, 0.2), "decay_factor": between(0.9, 1), "step": step,
        "beta1": beta1, "beta2": beta2, "beta3": between(0, 0.95), "rho": fraction(), "c": fraction(), "gamma": fraction(),
        "eps": between(1e-8, 1e-3), "grad_scale": between(0.5, 2), "last_scale": between(0.5, 2), "lion1": 0.95, "lion2": 0.98,
        "turn": torch.arange(count), "flags": int(flags), "unclipped": 1.0,
    }  # fmt: skip
    values |= fixed | given
    values = {name: torch.as_tensor(x, dtype=F64).expand(count) for name, x in values.items()}
    steps, beta1, beta2 = values["step"], values["beta1"], values["beta2"]
    k1, k2 = 1 - beta1**steps, 1 - beta2**steps
    slopes = {"slope1": steps * beta1 ** (steps - 1) / k1**2, "slope2": steps * beta2 ** (steps - 1) / k2**2}
    return torch.stack(list(Half(**values, k1=k1, k2=k2, **slopes)))


def launched(lists, there, low=None, written=True):
    device = there[1]
    moved = mapped(lists, lambda x: clone(x).to(device) if device == "cpu" else x.to(device))
    launch = backend_of(there).launch(*moved[:9], low, written=written, rule="mada")
    return launch, moved


# ----------------------------------------------------------------------------------------------- numbers with a bound of rounding


@dataclasses.dataclass
class Rounded:
    """A float64 tensor and a bound of |what a backend computes - it|; ``u`` is what one operation adds, relative to its result.

    It is a running error analysis: each operation takes on the errors of its operands and adds one rounding.
    """

    x: torch.Tensor
    error: torch.Tensor
    u: float

    def _of(self, x, error):
        return Rounded(x, error + self.u * (x.abs() + error) + 1e-300, self.u)

    def _other(self, y):
        return y if isinstance(y, Rounded) else Rounded(torch.as_tensor(y, dtype=F64), torch.zeros((), dtype=F64), self.u)

    def __add__(self, y):
        y = self._other(y)
        return self._of(self.x + y.x, self.error + y.error)

    def __neg__(self):
        return Rounded(-self.x, self.error, self.u)

    def __sub__(self, y):
        return self + -self._other(y)

    def __rsub__(self, y):
        return self._other(y) - self

    def __mul__(self, y):
        y = self._other(y)
        return self._of(self.x * y.x, self.x.abs() * y.error + y.x.abs() * self.error + self.error * y.error)

    __rmul__, __radd__ = __mul__, __add__

    def __truediv__(self, y):
        y = self._other(y)
        quotient, least = self.x / y.x, y.x.abs() - y.error
        error = torch.where(least > 0, (self.error + quotient.abs() * y.error) / least, torch.inf)
        return self._of(quotient, error)

    def sqrt(self):
        root = self.x.sqrt()
        away = torch.maximum((self.x + self.error).sqrt() - root, root - (self.x - self.error).clamp(min=0).sqrt())
        return self._of(root, away)

    def abs(self):
        return Rounded(self.x.abs(), self.error, self.u)

    def sign(self):
        """Off by up to 2 where rounding decides it."""
        return Rounded(self.x.sign(), torch.where(self.x.abs() <= self.error, 2.0, 0.0) * (self.error > 0), self.u)

    def maximum(self, y):
        return Rounded(torch.maximum(self.x, y.x), torch.maximum(self.error, y.error), self.u)

    def negated_where(self, sign):
        """-self where ``sign``, of -1, 0 or 1, is negative."""
        x = torch.where(sign.x < 0, -self.x, self.x)
        return Rounded(x, self.error + torch.where(sign.error > 0, 2 * self.x.abs(), 0.0), self.u)


class Numbers(NamedTuple):
    """The states of one tensor as rounded numbers, missing ones as zeros; and the scalars of one half."""

    lists: Lists
    t: int
    u: float

    def operand(self, name):
        xs = getattr(self.lists, name)
        x = torch.zeros_like(self.lists.exp_avgs[self.t], dtype=F64) if xs is None else xs[self.t].double()
        return Rounded(x, torch.zeros_like(x), self.u)

    def scalar(self, x):
        """A coefficient, rounded once after at most 40 float64 operations that made it."""
        x = torch.as_tensor(x, dtype=F64)
        return Rounded(x, (self.u + 40 * 2.0**-53) * x.abs(), self.u)


def arithmetic_of(lists, t):
    return F64 if any(xs is not None and xs[t] is not None and xs[t].dtype == F64 for xs in lists) else F32


def numbers_of(lists, t):
    return Numbers(lists, t, unit_roundoff(arithmetic_of(lists, t)) + 2.0**-53)


def exchanged(lists, turn):
    """The lists as an update of this turn sees them: with two buffers, of which it reads the first and writes the second."""
    odd = int(turn) % 2 == 1 and lists.last_grads is not None and lists.previous_grads is not None
    return lists._replace(last_grads=lists.previous_grads, previous_grads=lists.last_grads) if odd else lists


def exactly_updated(lists, t, vectors):
    """Section 3 for tensor ``t``: what becomes of each list, as rounded numbers by name."""
    n = numbers_of(lists, t)
    h = Half(*vectors[: len(Half._fields), t].tolist())
    has, s = (lambda flag: bool(int(h.flags) & flag)), n.scalar
    seen = exchanged(lists, h.turn)
    grad, m, p, v, a, diff, lion = (n.operand(name) for name in Lists._fields[:7])
    last = Numbers(seen, t, n.u).operand("last_grads" if has(Flags.TWO) else "previous_grads")
    g = grad * s(h.grad_scale)
    d = g if not has(Flags.KEEPS) else 0 * g if has(Flags.FIRST) else g - last * s(h.last_scale)
    v, a = v.abs(), a.abs()
    if has(Flags.V_STARTS):
        v = 0 * v + s(1e-15)
    if has(Flags.N_STARTS):
        diff = g * g
    g_hat = g + s(h.beta3) * d
    squared = g_hat * g_hat
    sigma = Rounded(squared.x - v.x, squared.error + v.error, n.u).sign()
    kappa = s(h.c) + s(1 - h.c) * sigma
    v = s(h.beta2) * v + s(1 - h.beta2) * (kappa * squared + s(1 - h.c) * v)
    plain = s(h.beta1) * m + s(1 - h.beta1) * g  # as plain PyTorch has it; kernels interpolate from the heavier end
    m = g + s(h.beta1) * (m - g) if h.beta1 < 0.5 else m + s(1 - h.beta1) * (g - m)
    m = dataclasses.replace(m, error=torch.maximum(m.error, plain.error))
    diff = s(h.beta3) * diff + s(1 - h.beta3) * d
    a = a.maximum(v) if has(Flags.MAXIMUM) else a + (v - a) / s(h.step)
    new_lion = s(h.lion2) * lion + s(1 - h.lion2) * g
    u = s(h.lion1) * (lion if has(Flags.LOOKS_BACK) else new_lion) + s(1 - h.lion1) * g
    mixed = v if h.rho == 1 else s(h.rho) * v + s(1 - h.rho) * a
    denominator = mixed.sqrt() * s(h.k2**-0.5) + s(h.eps)
    r = (m * s(1 / h.k1) + s(h.beta3) * diff) / denominator
    direction = (s(h.gamma) * r if h.gamma else 0 * r) + s(1 - h.gamma) * u.sign()
    p = s(h.decay_factor) * p - s(h.step_size) * direction
    in_v = has(Flags.SIGN_IN_V)
    return {
        "exp_avgs": m, "params": p, "exp_avg_sqs": v.negated_where(sigma) if in_v else v,
        "average_sqs": a if in_v else a.negated_where(sigma), "exp_avg_diffs": diff, "lion_exp_avgs": new_lion,
    }  # fmt: skip


def assert_updated(after, before, vectors):
    """What the formula makes of ``before``, within its bounds; of gradients, the new one in the place of the oldest."""
    for t, grad in enumerate(before.grads):
        h = Half(*vectors[: len(Half._fields), t].tolist())
        if grad is None or h.step == 0:
            for name in STATES:
                xs, ys = getattr(after, name), getattr(before, name)
                assert xs is None or same_bits(xs[t].cpu(), ys[t]), f"{name}[{t}] was written"
            continue
        for name, want in exactly_updated(before, t, vectors).items():
            xs = getattr(after, name)
            if xs is not None:
                got, arithmetic = xs[t].cpu(), arithmetic_of(before, t)
                bound = stored(want.error * SECOND_ORDER, want.x, got.dtype, arithmetic)
                assert_within(got, want.x, bound, f"{name}[{t}]")
        new, old = exchanged(after, h.turn), exchanged(before, h.turn)
        if before.previous_grads is not None:
            stored_grad = new.previous_grads[t].cpu()
            assert same_bits(stored_grad.contiguous(), grad.to(stored_grad.dtype).contiguous()), f"gradient {t} is not kept"
        if before.last_grads is not None:
            assert same_bits(new.last_grads[t].cpu(), old.last_grads[t]), f"last gradient {t} was written"


# ------------------------------------------------------------------------------------------------------------------ the update


def both_halves(first, second=None):
    """[2H, T]; an update that makes no sums does not read the second."""
    return torch.cat([first, torch.full_like(first, torch.nan) if second is None else second])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtypes", DTYPES)
def test_the_formula(dtypes, case, there):
    """Of every dtype and size, with numbers of each tensor's own, in odd and even turns."""
    lists = lists_of(SIZES, dtypes, case)
    vectors = both_halves(half_of(len(SIZES), case))
    launch, moved = launched(lists, there)
    launch.update_(vectors.to(there[1]))
    assert_updated(moved, lists, vectors)


@pytest.mark.parametrize("case", [name for name in CASES if len(CASES[name].lists) < 5])
def test_an_absent_list_counts_as_zeros(case, there):
    lists = lists_of(SIZES, "fp32", case)
    zeros = {
        name: [torch.zeros_like(x) for x in lists.params]
        for name in STATES
        if getattr(lists, name) is None and (name != "last_grads" or lists.previous_grads is None)
    }
    vectors = both_halves(half_of(len(SIZES), case, turn=0.0))
    results = []
    for each in (lists, lists._replace(**zeros)):
        launch, moved = launched(each, there)
        launch.update_(vectors.to(there[1]))
        results.append(moved)
    for name in ("grads", *STATES):
        xs, ys = (getattr(each, name) for each in results)
        assert xs is None or all(map(same_bits, xs, ys)), name


@pytest.mark.parametrize("layout", [{"offset": 1}, {"order": (1, 0)}, {"step": 3, "gap": 5}])
@pytest.mark.parametrize("names", [("params",), ("grads",), ("last_grads", "previous_grads"), ("exp_avg_diffs", "average_sqs")])
def test_operands_elsewhere_in_memory(names, layout, there):
    shapes = [(37, 53), (2, BLOCK), (29, 31)]
    dense = lists_of(shapes)
    lists = dense._replace(**{name: [elsewhere(x, **layout) for x in getattr(dense, name)] for name in names})
    first, second = half_of(3, "paper"), half_of(3, "paper", seed=1, turn=torch.arange(3) - 1)
    results = []
    for each in (lists, dense):
        launch, moved = launched(each, there)
        new_sums = torch.zeros(3, 7, dtype=F64, device=there[1])
        launch.update_(both_halves(first, second).to(there[1]), new_sums)
        results.append(moved)
        assert_sums(new_sums, dense, second, F64)
    for name in ("grads", *STATES):
        pairs = zip(getattr(results[0], name), getattr(results[1], name), strict=True)
        assert all(same_bits(x.contiguous(), y) for x, y in pairs), name
    if there[1] == "cpu":
        for name in names:
            for x, before in zip(getattr(results[0], name), getattr(lists, name), strict=True):
                assert same_surroundings(x, before)


def test_rows_without_a_gradient_or_a_step_are_left_alone(there):
    lists = lists_of([(5,), (BLOCK + 3,), (7,), (3,)])
    lists.grads[1] = None
    lists.grads[3].fill_(float("inf"))
    vectors = both_halves(half_of(4, "paper", step=torch.tensor([4.0, 4, 4, 0], dtype=F64)))
    launch, moved = launched(lists, there)
    launch.update_(vectors.to(there[1]))
    assert_updated(moved, lists, vectors)


@pytest.mark.parametrize("dtypes", ["bf16", "fp32, low states"])
def test_neither_the_mean_nor_a_gradient_is_rounded_by_chance(dtypes, there):
    lists = lists_of([(7,), (3, BLOCK)], dtypes)
    lists = lists._replace(
        average_sqs=[x.to(BF16) for x in lists.average_sqs],  # float32 would not be rounded at all
        last_grads=[x.to(BF16) for x in lists.last_grads],
        previous_grads=[x.to(BF16) for x in lists.previous_grads],
    )
    vectors = both_halves(half_of(2, "paper", beta3=0.3)).to(there[1])
    nearest, by_chance, again = (launched(lists, there) for _ in range(3))
    nearest[0].update_(vectors)
    by_chance[0].update_(vectors, None, 5)
    again[0].update_(vectors, None, 5)
    for name in STATES:
        xs, ys, zs = (getattr(moved, name) for _, moved in (nearest, by_chance, again))
        assert all(map(same_bits, ys, zs))
        chance = xs[0].dtype == BF16 and name not in ("average_sqs", "last_grads", "previous_grads")
        assert same_bits(xs[1], ys[1]) == (not chance), name


@pytest.mark.parametrize("written", [False, True])
def test_a_bfloat16_parameter_with_a_master(written, there):
    """The update starts from what others wrote, if they did; the sums of what it finds need no parameter."""
    lists = lists_of([(5,), (BLOCK + 3,)])
    low = [x.to(BF16) for x in lists.params]
    if written:
        low[1][::3] += 1
        start = [torch.where(x.to(BF16) == q, x, q.float()) for x, q in zip(lists.params, low, strict=True)]
    low_there = [x.clone().to(there[1]) for x in low]
    second = half_of(2, "paper", seed=1, turn=torch.arange(2) - 1)
    vectors = both_halves(half_of(2, "paper"), second)
    launch, moved = launched(lists, there, low_there)
    sums = torch.zeros(2, 7, dtype=F64, device=there[1])
    launch.update_(vectors.to(there[1]), sums)
    assert_updated(moved, lists._replace(params=start) if written else lists, vectors)
    assert all(same_bits(x, p.to(BF16)) for x, p in zip(low_there, moved.params, strict=True))
    assert_sums(sums, lists, second, F64)


# -------------------------------------------------------------------------------------------------------------------- the sums


def derivatives(lists, t, half):
    """Section 4 for tensor ``t`` as rounded numbers, from what the update that ``half`` [H, T] describes left."""
    n = numbers_of(lists, t)
    h = Half(*half[:, t].tolist())
    has, s = (lambda flag: bool(int(h.flags) & flag)), n.scalar
    two = has(Flags.TWO)
    seen = Numbers(exchanged(lists, h.turn + 1), t, n.u)
    _, m, _, v, a, diff, lion = (n.operand(name) for name in Lists._fields[:7])
    sigma = torch.where((v if has(Flags.SIGN_IN_V) else a).x < 0, -1.0, 1.0).to(F64)
    v, a = v.abs(), a.abs()
    g = seen.operand("last_grads" if two else "previous_grads") * s(h.grad_scale)
    d = g
    if has(Flags.KEEPS):
        d = 0 * g if has(Flags.FIRST) or not two else g - seen.operand("previous_grads") * s(h.last_scale)
    b = 1 - h.beta2
    g_hat = g + s(h.beta3) * d
    squared = g_hat * g_hat
    kappa = s(h.c) + s(1 - h.c) * sigma
    v_before = (v - s(b) * (kappa * squared)) * s(1 / (1 - b * h.c))
    mixed = v if h.rho == 1 else s(h.rho) * v + s(1 - h.rho) * a
    root = mixed.sqrt() * s(h.k2**-0.5)
    r = (m * s(1 / h.k1) + s(h.beta3) * diff) / (root + s(h.eps))
    p = s(h.gamma) / (root + s(h.eps))
    q = -(p * r) / (2 * root)
    along_v = q * s(h.rho * b / h.k2)
    if has(Flags.LOOKS_BACK):
        lion = (lion - s(1 - h.lion2) * g) * s(1 / h.lion2)
    u = s(h.lion1) * lion + s(1 - h.lion1) * g
    return [
        p * ((m - g) * s(1 / (h.beta1 * h.k1)) + m * s(h.slope1)),
        q * (s(h.rho) * (s(h.c) * v_before - kappa * squared) * s(1 / h.k2) + mixed * s(h.slope2)),
        p * (2 * diff - d) + along_v * kappa * (2 * g_hat * d),
        q * (v - a) * s(1 / h.k2),
        along_v * (squared * (1 - sigma) - v_before),
        r - u.sign(),
    ]


def assert_sums(sums, lists, half, result):
    for t, grad in enumerate(lists.grads):
        if grad is None:
            assert not sums[t].any()
            continue
        arithmetic = arithmetic_of(lists, t)
        new = Rounded(grad.double(), torch.zeros_like(grad, dtype=F64), unit_roundoff(arithmetic) + 2.0**-53)
        for column, along in enumerate([new, *derivatives(lists, t, half)]):
            terms = new * along
            bound = terms.error.sum() + sum_bound(terms.x.abs().sum(), grad.numel(), arithmetic, result)
            assert_within(sums[t, column].cpu(), terms.x.sum(), bound * SECOND_ORDER, f"sum {column} of tensor {t}")


@pytest.mark.parametrize("result", [F32, F64])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtypes", DTYPES)
def test_the_sums(dtypes, case, result, there):
    lists = lists_of(SIZES, dtypes, case)
    lists.grads[2] = None
    half = half_of(len(SIZES), case)
    launch, _ = launched(lists, there, written=False)
    sums = launch.measure(0b1111111, result, None, half.to(there[1]))
    assert sums.dtype == result
    assert_sums(sums, lists, half, result)
    some = launch.measure(0b0100101, result, None, half.to(there[1]))
    assert same_bits(some, sums[:, [0, 2, 5]].contiguous())


def test_clipping_reads_nothing_but_the_gradient(there):
    lists = lists_of(SIZES)
    lists.grads[3] = None
    spoilt = mapped(lists, lambda x: torch.full_like(x, torch.nan))._replace(grads=lists.grads)
    for each in (lists, spoilt):
        launch, _ = launched(each, there)
        sums = launch.measure(1, F64).cpu()
        exact = torch.stack([torch.zeros((), dtype=F64) if g is None else g.double().square().sum() for g in lists.grads])
        assert sums.shape == (len(SIZES), 1)
        assert ((sums[:, 0] - exact).abs() <= 1e-6 * exact).all()


@pytest.mark.parametrize(
    "case", ["paper", "paper, at the start", "paper, maximum", "released", "no average", "no lion", "hyperadam"]
)
def test_the_sums_are_derivatives(case, there):
    """Of the direction that an update by the library takes, in float64, by its six coefficients: against autograd."""
    shapes = [(CHUNK + 3,), (3, 50), (7,), (4, BLOCK)]
    lists = lists_of(shapes, "fp64", case)
    numbers = {"turn": torch.arange(4), "step": torch.tensor([2, 3, 50, 1000]), "rho": 0.4, "c": 0.3, "gamma": 0.6}
    half = half_of(len(shapes), case, seed=3, **numbers | CASES[case].fixed)
    exact = [direction_by(lists, t, half) for t in range(len(shapes))]
    launch, moved = launched(lists, there)
    launch.update_(both_halves(half).to(there[1]))
    new = lists_of(shapes, "fp64", case, seed=9).grads
    launch.set_gradients([x.to(there[1]) for x in new])
    sums = launch.measure(0b1111111, F64, None, half.to(there[1])).cpu()
    assert moved.params[0].isfinite().all()
    for t, (theta, direction) in enumerate(exact):
        fixed = [list(Half._fields[3:9]).index(name) for name in CASES[case].fixed]
        for i in range(6):
            if i in fixed:
                continue
            # One column of the Jacobian by forward differentiation: D of each element.
            along = torch.autograd.functional.jvp(direction, theta, torch.eye(6, dtype=F64)[i])[1]
            terms = new[t] * along
            error = (sums[t, 1 + i] - terms.sum()).abs()
            assert error <= 1e-10 * terms.abs().sum(), f"{Half._fields[3 + i]} of tensor {t}: off by {error:.3g}"


def direction_by(lists, t, half):
    """The coefficients of tensor ``t`` and its direction U as a function of them; the average is a constant, signs are flat."""
    h = Half(*half[:, t].tolist())
    has = lambda flag: bool(int(h.flags) & flag)  # noqa: E731
    seen = exchanged(lists, h.turn)

    def state(name, of=lists):
        xs = getattr(of, name)
        return torch.zeros_like(lists.params[t]) if xs is None else xs[t]

    g = lists.grads[t] * h.grad_scale
    last = state("last_grads" if has(Flags.TWO) else "previous_grads", seen) * h.last_scale
    d = g if not has(Flags.KEEPS) else torch.zeros_like(g) if has(Flags.FIRST) else g - last
    m0, v0, a0, n0, l0 = (state(f"{x}s") for x in ("exp_avg", "exp_avg_sq", "average_sq", "exp_avg_diff", "lion_exp_avg"))
    v0, a0 = v0.abs(), a0.abs()

    def direction(theta):
        beta1, beta2, beta3, rho, c, gamma = theta
        squared = (g + beta3 * d) ** 2
        toward = torch.sign(squared.detach() - v0)
        v = v0 * beta2 + (1 - beta2) * (c * squared + (1 - c) * (toward * squared + v0))
        m, n = m0 * beta1 + g * (1 - beta1), n0 * beta3 + d * (1 - beta3)
        mean = (torch.maximum(a0, v) if has(Flags.MAXIMUM) else a0 + (v - a0) / h.step).detach()
        after = h.lion2 * l0 + (1 - h.lion2) * g
        u = h.lion1 * (l0 if has(Flags.LOOKS_BACK) else after) + (1 - h.lion1) * g
        root = ((rho * v + (1 - rho) * mean) / (1 - beta2**h.step)).sqrt()
        q = m / (1 - beta1**h.step) + beta3 * n
        return gamma * q / (root + h.eps) + (1 - gamma) * torch.sign(u)

    return torch.tensor([h.beta1, h.beta2, h.beta3, h.rho, h.c, h.gamma], dtype=F64), direction


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtypes", ["fp32", "fp64", "bf16"])
def test_an_update_also_sums_what_it_finds(dtypes, case, there):
    """Update after update, with the bits of a pass before it, of every row, and without a change of what it does."""
    lists = lists_of(SIZES, dtypes, case)
    (launch, moved), (plain, other) = launched(lists, there), launched(lists, there)
    count = len(SIZES)
    last = half_of(count, case, turn=-1.0)
    for turn in range(4):
        grads = lists_of(SIZES, dtypes, case, seed=turn + 1).grads
        grads[(turn + 3) % count] = None
        this = half_of(count, case, seed=turn, turn=float(turn))
        skipped = torch.arange(count) == (turn + 4) % count
        this[Half._fields.index("step")] = torch.where(skipped, 0.0, this[Half._fields.index("step")])
        there_grads = [None if x is None else x.to(there[1]) for x in grads]
        for each in (launch, plain):
            each.set_gradients(there_grads)
        before = launch.measure(0b1111111, F64, None, last.to(there[1]))
        sums = torch.full((count, 7), -1.0, dtype=F64, device=there[1])
        launch.update_(both_halves(this, last).to(there[1]), sums)
        plain.update_(both_halves(this).to(there[1]))
        assert same_bits(sums, before)
        for name in STATES:
            xs, ys = getattr(moved, name), getattr(other, name)
            assert xs is None or all(map(same_bits, xs, ys)), name
        last = half_of(count, case, seed=turn, turn=float(turn))


# ------------------------------------------------------------------------------------------------------------------ the policy

H = len(Half._fields)
CONSTANTS = torch.tensor(
    [[5e-4, 5e-4, 0.1, 0.1, 0.1, 0.1], [0.0, 0.5, 0.9, 0.0, 0.3, 0.1], [0.01, 0.501, 0, 0, 0, 0], [0.99, 0.99, 0.99, 1, 1, 1]],
    dtype=F64,
)
TENSORS = 400  # more than a block has threads


def policy_arguments(sets, seed=0, **replaced):
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape, low=0.0, high=1.0):
        return low + (high - low) * torch.rand(shape, generator=generator, dtype=F64)

    count = replaced.pop("tensors", TENSORS)
    middle = torch.tensor([0.9, 0.95, 0.3, 0.5, 0.6, 0.7], dtype=F64)
    last = torch.stack([half_of(max(count, 1), "paper", seed=seed + k)[:, :count] for k in range(2)])
    last[:, Half._fields.index("step"), 1::7] = 0.0
    last[:, Half._fields.index("step_size"), 2::7] = 0.0
    last[:, Half._fields.index("unclipped")] = rand(2, count, low=0.5)
    return {
        "sums": rand(count, 7, low=-1.0) / count, "coefficients": middle.repeat(sets, 1) + rand(sets, 6, low=-0.01, high=0.01),
        "momentum": rand(sets, 6, low=-0.1, high=0.1), "hyper_gradient": rand(sets, 6), "hyper_sums": rand(count, 6), "last": last,
        "set_of": torch.randint(sets, (count,), generator=generator), "lr": rand(count), "weight_decay": rand(count),
        "eps": rand(count), "grad_scale": rand(count), "unclipped": rand(count),
        "counts": torch.cat([torch.tensor([0.0, 0.0, 5, 70], dtype=F64).repeat(count)[:count], torch.tensor([51.0], dtype=F64)]),
        "present": (rand(count) > 0.3).double(), "turns": torch.arange(count, dtype=F64), "go": None, "constants": CONSTANTS,
        "hyper_clip": 10.0, "freeze_steps": 50, "lion1": 0.95, "lion2": 0.98,
        "flags": int(KEEPS | LOOKS_BACK | Flags.TWO | STARTS | Flags.STARTS_AT_REST), "lagged": False, "advance": True,
    } | replaced  # fmt: skip


def called(arguments, there):
    """What the op returns, and all that it was given, as it left it."""
    given = {name: x.clone().to(there[1]) if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}
    vectors = backend_of(there).mada_policy_(*given.values()).cpu()
    return vectors, {name: x.cpu() if isinstance(x, torch.Tensor) else x for name, x in given.items()}


def by_the_page(a):
    """Section 5 in loops over plain numbers: the arguments as they are to be left, and the vectors."""
    out = {name: x.clone() if isinstance(x, torch.Tensor) else x for name, x in a.items()}
    count, sets = len(a["set_of"]), len(a["coefficients"])
    go = a["go"] is None or bool(a["go"])
    column = Half._fields.index
    if a["sums"] is not None and go:
        half = a["last"][1 if a["lagged"] else 0]
        h = torch.zeros(sets, 6, dtype=F64)
        for t in range(count):
            ran, lr = half[column("step"), t].item(), half[column("step_size"), t].item()
            factor = a["last"][0, column("unclipped"), t] if a["lagged"] else 1.0 if a["unclipped"] is None else a["unclipped"][t]
            learned = a["sums"][t, 1:] * factor if ran and lr else torch.zeros(6, dtype=F64)
            out["hyper_sums"][t] = learned
            h[a["set_of"][t]] -= lr * learned
        out["hyper_gradient"] = h
        for k in range(sets):
            for i in range(6):
                if a["counts"][-1] - int(a["lagged"]) <= a["freeze_steps"]:
                    continue
                x = h[k, i].item() if h[k, i].isfinite() else 0.0
                x *= min(1.0, a["hyper_clip"] / (abs(x) + 1e-6)) if a["hyper_clip"] else 1.0
                rate, mu, lower, upper = a["constants"][:, i].tolist()
                out["momentum"][k, i] = mu * a["momentum"][k, i] + x
                moved = a["coefficients"][k, i] - rate * out["momentum"][k, i]
                out["coefficients"][k, i] = min(max(moved.item(), lower), upper)
    if not a["advance"]:
        return torch.empty(2 * H, 0, dtype=F64), out
    vectors = torch.empty(2, H, count, dtype=F64)
    vectors[1] = a["last"][0]
    for t in range(count):
        before = Half(*a["last"][0, :, t].tolist())
        step, theta = a["counts"][t].item() + 1, out["coefficients"][a["set_of"][t]].tolist()
        k1, k2 = 1 - theta[0] ** step, 1 - theta[1] ** step
        flags = Flags(a["flags"]) & ~(Flags.STARTS_AT_REST | Flags.FIRST | STARTS)
        if before.step == 0:
            flags |= Flags.FIRST if a["flags"] & Flags.STARTS_AT_REST else Flags(0)
            flags |= Flags(a["flags"]) & STARTS if step == 1 else Flags(0)
        new = Half(
            a["lr"][t], 1 - a["lr"][t] * a["weight_decay"][t], step, *theta, a["eps"][t],
            1.0 if a["grad_scale"] is None else a["grad_scale"][t], before.grad_scale, k1, k2,
            step * theta[0] ** (step - 1) / k1**2, step * theta[1] ** (step - 1) / k2**2, a["lion1"], a["lion2"], a["turns"][t],
            int(flags), 1.0 if a["unclipped"] is None else a["unclipped"][t],
        )  # fmt: skip
        vectors[0, :, t] = torch.tensor(new._replace(step=step if go else 0.0), dtype=F64)
        if go:
            here = a["present"] is None or bool(a["present"][t])
            kept = new if here else before._replace(step_size=0.0, unclipped=new.unclipped)
            out["last"][:, :, t] = torch.stack([torch.tensor(x, dtype=F64) for x in (kept, before)])
    return vectors.flatten(0, 1), out


def assert_policy(arguments, there):
    vectors, after = called(arguments, there)
    want_vectors, want = by_the_page(arguments)
    # Sums of some hundred terms in another order, and powers whose base is off by a rounding: 80 of them at most.
    close = {"rtol": 1e-12, "atol": 1e-14, "equal_nan": True}
    torch.testing.assert_close(vectors, want_vectors, **close)
    for name, x in want.items():
        if isinstance(x, torch.Tensor):
            torch.testing.assert_close(after[name], x, **close, msg=lambda text, name=name: f"{name}: {text}")
    return after


@pytest.mark.parametrize("sets", [1, 3])
@pytest.mark.parametrize("lagged", [False, True])
@pytest.mark.parametrize("advance", [False, True])
def test_the_policy(sets, lagged, advance, there):
    arguments = policy_arguments(sets, lagged=lagged, advance=advance)
    if lagged:
        arguments["counts"][-1] = 52
    after = assert_policy(arguments, there)
    assert not torch.equal(after["coefficients"], arguments["coefficients"])


@pytest.mark.parametrize("name", ["sums", "grad_scale", "unclipped", "present"])
def test_what_the_policy_can_do_without(name, there):
    arguments = policy_arguments(2, **{name: None})
    after = assert_policy(arguments, there)
    assert torch.equal(after["coefficients"], arguments["coefficients"]) == (name == "sums")


@pytest.mark.parametrize("go", [False, True])
def test_a_step_that_does_not_count_changes_nothing(go, there):
    arguments = policy_arguments(3, go=torch.tensor(go))
    after = assert_policy(arguments, there)
    changed = {
        name for name, x in arguments.items() if isinstance(x, torch.Tensor) and not torch.equal(after[name], x)
    }  # fmt: skip
    assert changed == ({"coefficients", "momentum", "hyper_gradient", "hyper_sums", "last"} if go else set())


@pytest.mark.parametrize(
    ("steps", "lagged", "learns"), [(50, False, False), (51, False, True), (51, True, False), (52, True, True)]
)
def test_the_first_steps_are_frozen(steps, lagged, learns, there):
    arguments = policy_arguments(1, lagged=lagged)
    arguments["counts"][-1] = steps
    after = assert_policy(arguments, there)
    assert torch.equal(after["coefficients"], arguments["coefficients"]) == (not learns)


@pytest.mark.parametrize("clip", [0.0, 1e-3, 10.0])
def test_each_hyper_gradient_is_clipped_by_itself(clip, there):
    arguments = policy_arguments(2, hyper_clip=clip)
    arguments["sums"][:, 3] *= 1e6
    assert_policy(arguments, there)


def test_coefficients_keep_to_their_bounds(there):
    arguments = policy_arguments(2, hyper_clip=0.0)
    arguments["sums"] *= torch.tensor([1.0, 1e9, -1e9, 1e9, -1e9, 1e9, -1e9])
    after = assert_policy(arguments, there)
    at_bounds = (after["coefficients"] == CONSTANTS[2]) | (after["coefficients"] == CONSTANTS[3])
    assert at_bounds.all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_teaches_nothing(bad, there):
    arguments = policy_arguments(2)
    arguments["set_of"][4] = 1
    arguments["sums"][4, 2] = bad
    arguments["sums"][1, 3] = bad  # of a tensor that had no update
    after = assert_policy(arguments, there)
    assert (~after["hyper_gradient"].isfinite()).nonzero().tolist() == [[1, 1]]
    assert after["coefficients"].isfinite().all()


def test_a_set_without_tensors_keeps_its_coefficients_but_for_their_momentum(there):
    arguments = policy_arguments(3)
    arguments["set_of"] %= 2
    after = assert_policy(arguments, there)
    assert not after["hyper_gradient"][2].any()
    assert_policy(policy_arguments(1, tensors=0), there)


# -------------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("replaced", "message"),
    [
        ({"exp_avg_sqs": None}, "the update needs exp_avg_sqs$"),
        ({"params": None, "exp_avg_sqs": None}, "the update needs params and exp_avg_sqs$"),
        ({"lion_exp_avgs": [torch.ones(3)]}, "lion_exp_avgs has 1 tensors, params has 2"),
        ({"exp_avg_diffs": [torch.ones(3), torch.ones(0)]}, r"exp_avg_diffs\[1\] and params\[1\] differ in shape"),
        (
            {"last_grads": [torch.ones(3), torch.ones(4, 5, dtype=F64)]},
            r"last_grads\[1\] and previous_grads\[1\] differ in dtype or strides: they take turns",
        ),
        (
            {"previous_grads": [torch.ones(3), torch.ones(5, 4).t()]},
            r"last_grads\[1\] and previous_grads\[1\] differ in dtype or strides: they take turns",
        ),
    ],
)
def test_lists_that_do_not_fit(replaced, message, there):
    lists = lists_of([(3,), (4, 5)])
    with pytest.raises(RuntimeError, match=f"^{message}"):
        launched(lists._replace(**replaced), there)


def test_vectors_that_do_not_fit(there):
    if there[0] == "reference":
        pytest.skip("plain PyTorch raises what torch raises")
    launch, moved = launched(lists_of([(3,), (4, 5)]), there)
    before = mapped(moved, torch.clone)
    half = half_of(2, "paper").to(there[1])
    with pytest.raises(RuntimeError, match="need the vectors of the last update"):
        launch.measure(0b11, F64)
    for vectors in (torch.cat([half, half]), half.float(), half[:, :1]):
        with pytest.raises(RuntimeError, match=r"vectors must be a contiguous float64 tensor of shape \[21, 2\]"):
            launch.measure(0b11, F64, None, vectors)
    with pytest.raises(RuntimeError, match=r"vectors must be a contiguous float64 tensor of shape \[42, 2\]"):
        launch.update_(half)
    with pytest.raises(RuntimeError, match=r"new_sums must be a contiguous float64 tensor of shape \[2, 0\] or \[2, 7\]"):
        launch.update_(torch.cat([half, half]), torch.zeros(2, 5, dtype=F64, device=there[1]))
    assert all(
        same_bits(memory_of(x), memory_of(y))
        for xs, ys in zip(moved, before, strict=True)
        for x, y in zip(xs or (), ys or (), strict=True)
    )
