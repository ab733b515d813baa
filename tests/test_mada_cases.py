"""MADA through its public API: against the optimizers that it contains, and against MADA by autograd (mada_oracle.py)."""

import itertools
from copy import deepcopy

import pytest
import torch
from torch import nn

from metaadamw_fast import MADA
from metaadamw_fast.mada import VARIANTS, Semantics

from .mada_oracle import COEFFICIENTS, RATES, Oracle, updated

F64 = torch.float64
SHAPES = [(7,), (33, 5), (2, 3, 4), (), (0, 3), (1100,)]
BACKENDS = ["cpp", "reference"]
SLOW = {name: rate / 100 for name, rate in RATES.items()}  # with which coefficients stay inside for a while
INTERIOR = {"beta1": 0.85, "beta2": 0.9, "beta3": 0.4, "rho": 0.5, "c": 0.6, "gamma": 0.7}
backends = pytest.mark.parametrize("backend", BACKENDS)
variants = pytest.mark.parametrize("variant", VARIANTS)


def parameters(seed=3, shapes=SHAPES):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=F64)) for shape in shapes]


def gradients(steps, seed=5, shapes=SHAPES, missing=()):
    """Of no loss, but related from step to step, as they are in training; None at the pairs (step, tensor) of ``missing``."""
    generator = torch.Generator().manual_seed(seed)
    batches, mean = [], [torch.randn(shape, generator=generator, dtype=F64) for shape in shapes]
    for step in range(steps):
        mean = [0.9 * x + 0.4 * torch.randn(x.shape, generator=generator, dtype=F64) for x in mean]
        noisy = [x + 0.5 * torch.randn(x.shape, generator=generator, dtype=F64) for x in mean]
        batches.append([None if (step, t) in missing else x for t, x in enumerate(noisy)])
    return batches


def give(params, batch):
    for p, g in zip(params, batch, strict=True):
        p.grad = None if g is None else g.clone()


def train(opt, params, batches):
    for batch in batches:
        give(params, batch)
        opt.step()


def start_of(coefficients):
    """A dict of coefficients as arguments of the constructor."""
    others = {name: x for name, x in coefficients.items() if not name.startswith("beta") or name == "beta3"}
    return {"betas": (coefficients["beta1"], coefficients["beta2"]), **others}


def shown(opt):
    return opt.coefficients, opt.hyper_gradient, opt.hyper_sums


def assert_same(xs, ys):
    for x, y in zip(xs, ys, strict=True):
        assert torch.equal(x, y)


# ---------------------------------------------------------------------------------------------------- what it reduces to, section 6
#
# Each is (parameters after the gradients) = f(params, batches, lr, weight_decay), a tensor without a gradient left alone.


def by_the_lines(update):
    """Runs ``update(state, g, t) -> U`` over all steps, with decoupled decay."""

    def run(params, batches, lr, weight_decay):
        out, states = [p.detach().clone() for p in params], [{} for _ in params]
        for batch in batches:
            for p, g, state in zip(out, batch, states, strict=True):
                if g is not None:
                    state["t"] = state.get("t", 0) + 1
                    p.mul_(1 - lr * weight_decay).sub_(lr * update(state, g, state["t"]))
        return out

    return run


def by_torch(kind, **options):
    def run(params, batches, lr, weight_decay):
        theirs = [nn.Parameter(p.detach().clone()) for p in params]
        decay = {"weight_decay": weight_decay} if kind is torch.optim.AdamW else {}
        train(kind(theirs, lr=lr, foreach=False, **decay, **options), theirs, batches)
        return theirs

    return run


def ema(state, name, x, beta):
    state[name] = beta * state.get(name, 0.0) + (1 - beta) * x
    return state[name]


def avgrad(state, g, t):
    m, v = ema(state, "m", g, 0.9), ema(state, "v", g * g, 0.95)
    state["mean"] = state.get("mean", 0.0) + (v - state.get("mean", 0.0)) / t
    return (m / (1 - 0.9**t)) / ((state["mean"] / (1 - 0.95**t)).sqrt() + 1e-6)


def yogi(state, g, t):
    m, v = ema(state, "m", g, 0.9), state.get("v", torch.zeros_like(g))
    v = state["v"] = v - 0.05 * torch.sign(v - g * g) * g * g
    return (m / (1 - 0.9**t)) / ((v / (1 - 0.95**t)).sqrt() + 1e-6)


def adan(state, g, t):
    d = g - state.get("g", g)
    state["g"] = g
    m, n, v = ema(state, "m", g, 0.9), ema(state, "n", d, 0.92), ema(state, "v", (g + 0.92 * d) ** 2, 0.95)
    return (m / (1 - 0.9**t) + 0.92 * n) / ((v / (1 - 0.95**t)).sqrt() + 1e-6)


def lion(beta1):
    def update(state, g, _):
        u = beta1 * state.get("l", 0.0) + (1 - beta1) * g
        ema(state, "l", g, 0.98)
        return torch.sign(u)

    return update


ADAM = {"beta1": 0.9, "beta2": 0.95, "beta3": 0.0, "rho": 1.0, "c": 1.0, "gamma": 1.0}
OF_ADAM = {"betas": (0.9, 0.95), "eps": 1e-6}
TWIN = {**ADAM, "beta1": 0.3, "beta2": 0.6}
CASES = {  # the optimizer, its coefficients, options, weight decay
    "Adam": (by_torch(torch.optim.Adam, **OF_ADAM), ADAM, {}, 0.0),
    "AdamW": (by_torch(torch.optim.AdamW, **OF_ADAM), ADAM, {}, 0.1),
    "AdamW with other betas and eps": (by_torch(torch.optim.AdamW, betas=(0.3, 0.6), eps=1e-2), TWIN, {"eps": 1e-2}, 0.3),
    "amsgrad": (by_torch(torch.optim.Adam, amsgrad=True, **OF_ADAM), {**ADAM, "rho": 0.0}, {"second_moment": "maximum"}, 0.0),
    "AVGrad": (by_the_lines(avgrad), {**ADAM, "rho": 0.0}, {}, 0.1),
    "Yogi": (by_the_lines(yogi), {**ADAM, "c": 0.0}, {}, 0.1),
    "Adan": (by_the_lines(adan), {**ADAM, "beta3": 0.92}, {}, 0.1),
    "Lion": (by_the_lines(lion(0.95)), {**ADAM, "gamma": 0.0}, {}, 0.1),
    "Lion, released": (by_the_lines(lion(0.95 * 0.98)), {**ADAM, "gamma": 0.0}, {"variant": "released"}, 0.1),
}


def held(coefficients, names):
    """Options that learn the coefficients of these names, with bounds that keep them where they are."""
    rates = {name: 0.1 if name in names else 0.0 for name in COEFFICIENTS}
    return {"hyper_lr": rates, "bounds": {name: (coefficients[name],) * 2 for name in names}, "freeze_steps": 0}


LIVE = [(), COEFFICIENTS, *((name,) for name in COEFFICIENTS)]


@pytest.mark.parametrize(
    ("live", "backend"),
    # The plain formulas do not depend on which of the coefficients are live; in C++ it says which loops run.
    [(live, backend) for backend in BACKENDS for live in (LIVE if backend == "cpp" else LIVE[:2])],
    ids=lambda x: x if isinstance(x, str) else "+".join(x) or "fixed",
)
@pytest.mark.parametrize("case", CASES)
def test_120_steps_are_those_of_the_optimizer_that_it_contains(case, live, backend):
    """Also where coefficients are live: the learning runs, the states that a fixed one saves are kept, and all must be the same."""
    optimizer, coefficients, options, weight_decay = CASES[case]
    params = parameters()
    batches = gradients(120, missing={(step, 1) for step in range(0, 120, 7)} | {(9, 3), (50, 0)})
    expected = optimizer(params, batches, 1e-2, weight_decay)
    options = {**start_of(coefficients), **held(coefficients, live), "weight_decay": weight_decay, "backend": backend, **options}
    opt = MADA(params, lr=1e-2, **options)
    train(opt, params, batches)
    for p, x in zip(params, expected, strict=True):
        torch.testing.assert_close(p.detach(), x.detach(), rtol=1e-12, atol=1e-12)
    assert opt.coefficients.tolist() == [[coefficients[name] for name in COEFFICIENTS]]
    assert opt.hyper_gradient.any() == bool(live)
    assert opt.state[params[1]]["step"] == 120 - len(range(0, 120, 7))


@backends
def test_hyperadam_learns_two_betas_of_adam(backend):
    rates = {name: RATES[name] if name in ("beta1", "beta2") else 0.0 for name in COEFFICIENTS}
    options = {"hyper_lr": rates, "freeze_steps": 0, "backend": backend}
    params, oracle, opt = pair(ADAM, VARIANTS["paper"], options, {"rates": rates, "freeze_steps": 0})
    follow(params, oracle, opt, gradients(60))
    assert (opt.coefficients != torch.tensor([list(ADAM.values())], dtype=F64)).tolist() == [[True, True, *[False] * 4]]
    assert "average_sq" not in opt.state[params[0]]


# --------------------------------------------------------------------------------------------------------------- against autograd
#
# Both get the same gradients. hyper_sums and hyper_gradient of every step are compared, relative to the largest of their column.


def pair(coefficients, semantics, options, of_oracle, shapes=SHAPES, groups=None, weight_decay=0.1):
    """Parameters, and an oracle and a MADA for them."""
    params = parameters(shapes=shapes)
    groups = (
        [{"weight_decay": weight_decay, "lr": 1e-2, **x} for x in groups]
        if groups
        else [{"weight_decay": weight_decay, "lr": 1e-2}]
    )
    cuts = [len(params) * k // len(groups) for k in range(len(groups) + 1)]
    for group, begin, end in zip(groups, cuts, cuts[1:], strict=False):
        group["params"] = params[begin:end]
    oracle = Oracle(groups, coefficients, semantics, **of_oracle)
    return params, oracle, MADA(groups, **start_of(coefficients), variant=semantics, **options)


def follow(params, oracle, opt, batches, each=None):
    """Trains both and compares them after every step. ``each(step)`` comes before a step, and may call ``hyper_update`` of both."""
    names = {"exp_avg": "m", "exp_avg_sq": "V", "average_sq": "A", "exp_avg_diff": "n", "lion_exp_avg": "l"}
    differences = []
    for step, batch in enumerate(batches):
        if each is not None:
            each(step)
        give(params, batch)
        opt.step()
        oracle.step(batch)
        differences.append((opt.hyper_gradient, oracle.hyper_gradient.clone(), opt.hyper_sums, oracle.hyper_sums.clone()))
        torch.testing.assert_close(opt.coefficients, oracle.theta, rtol=0.0, atol=1e-11)
        for p, x, state in zip(params, oracle.params, oracle.states, strict=True):
            torch.testing.assert_close(p.detach(), x, rtol=1e-10, atol=1e-11)
            assert opt.state[p]["step"] == state.get("t", 0)
            for name, letter in names.items():
                if state and name in opt.state[p]:
                    got = opt.state[p][name].abs() if letter in "AV" else opt.state[p][name]
                    torch.testing.assert_close(got, state[letter], rtol=1e-10, atol=1e-11)
    learned = [i for i, rate in enumerate(oracle.rates) if rate]  # the states of others may be missing
    got, want, of_tensors, expected = (torch.stack(x)[..., learned] for x in zip(*differences, strict=True))
    assert want.any((0, 1)).all()
    for x, y in ((got, want), (of_tensors, expected)):
        assert ((x - y).abs() <= 1e-10 * y.abs().amax((0, 1))).all()


EVERY_SEMANTICS = [Semantics(*x) for x in itertools.product((True, False), (True, False), (0.0, 1e-15), (True, False))]


@backends
@pytest.mark.parametrize("semantics", EVERY_SEMANTICS, ids=lambda x: "".join(str(int(bool(switch))) for switch in x))
def test_interior_coefficients_of_every_semantics(semantics, backend):
    options = {"hyper_lr": SLOW, "freeze_steps": 0, "backend": backend}
    params, oracle, opt = pair(INTERIOR, semantics, options, {"rates": SLOW})
    follow(params, oracle, opt, gradients(50))
    low, high = torch.tensor(oracle.bounds, dtype=F64).t()
    moved = (opt.coefficients - torch.tensor([[INTERIOR[name] for name in COEFFICIENTS]], dtype=F64)).abs()
    assert ((opt.coefficients > low) & (opt.coefficients < high)).all()
    assert (moved > 1e-6).all()


MOMENTA = {"beta1": 0.5, "beta3": 0.9, "rho": 0.8, "gamma": 0.7}
OPTIONS = {  # of MADA, of the oracle
    "default start": ({}, {}),
    "frozen": ({"freeze_steps": 20}, {"freeze_steps": 20}),
    "slow": ({"hyper_lr": SLOW}, {"rates": SLOW}),
    "momentum": ({"hyper_lr": SLOW, "hyper_momentum": MOMENTA}, {"rates": SLOW, "momenta": MOMENTA}),
    "tight clip": ({"hyper_clip": 1e-2}, {"clip": 1e-2}),
    "no clip": ({"hyper_lr": SLOW, "hyper_clip": 0.0}, {"rates": SLOW, "clip": 0.0}),
    "bounds": (
        {"bounds": {"rho": (0.49, 0.505), "gamma": (0.69, 0.701)}},
        {"bounds": {"rho": (0.49, 0.505), "gamma": (0.69, 0.701)}},
    ),
    "clipped gradients": ({"hyper_lr": SLOW, "max_grad_norm": 1.0}, {"rates": SLOW, "max_grad_norm": 1.0}),
    "maximum": ({"hyper_lr": SLOW, "second_moment": "maximum"}, {"rates": SLOW, "maximum": True}),
    "maximize": ({"hyper_lr": SLOW, "maximize": True}, {"rates": SLOW, "sign": -1.0}),
    "maximize and clip": ({"maximize": True, "max_grad_norm": 1.0}, {"sign": -1.0, "max_grad_norm": 1.0}),
    "lion betas": ({"lion_betas": (0.8, 0.7)}, {"lions": (0.8, 0.7)}),
}


@backends
@variants
@pytest.mark.parametrize("statistics", ["exact", "lagged"])
@pytest.mark.parametrize("case", OPTIONS)
def test_options(case, statistics, variant, backend):
    """With gradients that are missing now and then, an update of lr 0, and fewer gradients in the first step than later."""
    options, of_oracle = OPTIONS[case]
    coefficients = ADAM if case == "default start" else INTERIOR
    lagged = statistics == "lagged"
    params, oracle, opt = pair(
        coefficients,
        VARIANTS[variant],
        {"freeze_steps": 0, "statistics": statistics, "backend": backend, **options},
        {"freeze_steps": 0, "lagged": lagged, **of_oracle},
    )

    def schedule(step):
        lr = 0.0 if step in (0, 11, 12) else 1e-2 / (1 + 0.1 * step)
        for group in (*opt.param_groups, *oracle.groups):
            group["lr"] = lr

    batches = gradients(40, missing={(0, 2), (1, 2), (0, 3), (6, 1), (7, 1), (7, 0), (9, 1), (20, 5), (22, 5)})
    batches[30] = [None] * len(params)
    follow(params, oracle, opt, batches, schedule)
    assert (opt.coefficients != torch.tensor([[coefficients[name] for name in COEFFICIENTS]], dtype=F64)).any()


@backends
@variants
@pytest.mark.parametrize("scope", ["global", "per_group"])
@pytest.mark.parametrize("statistics", ["exact", "lagged"])
def test_groups_with_an_lr_decay_and_eps_of_their_own(statistics, scope, variant, backend):
    """One lr is a tensor that is changed in place."""
    lr = torch.tensor(2e-2, dtype=F64)
    groups = [{"lr": lr, "weight_decay": 0.2}, {"lr": 3e-3, "eps": 1e-3}, {"weight_decay": 0.0}]
    params, oracle, opt = pair(
        INTERIOR,
        VARIANTS[variant],
        {"freeze_steps": 0, "scope": scope, "statistics": statistics, "backend": backend},
        {"freeze_steps": 0, "per_group": scope == "per_group", "lagged": statistics == "lagged"},
        groups=groups,
    )
    assert opt.param_groups[0]["lr"] is oracle.groups[0]["lr"]
    follow(params, oracle, opt, gradients(30, missing={(4, 0), (5, 0), (5, 1)}), lambda _: lr.mul_(0.95))
    sets = opt.coefficients
    assert len(sets) == (3 if scope == "per_group" else 1)
    assert len(set(sets[:, 0].tolist())) == len(sets)


@backends
@variants
def test_micro_batches_learn_from_the_first(variant, backend):
    """``hyper_update`` with the first micro-batch's gradient, ``step`` with the whole; in some steps none of it is called."""
    params, oracle, opt = pair(INTERIOR, VARIANTS[variant], {"freeze_steps": 3, "backend": backend, "max_grad_norm": 1.0},
                               {"freeze_steps": 3, "max_grad_norm": 1.0})  # fmt: skip
    firsts = gradients(30, seed=8, missing={(3, 1), (9, 0)})

    def each(step):
        if step % 4 != 3:
            give(params, firsts[step])
            opt.hyper_update()
            oracle.hyper_update(firsts[step])

    follow(params, oracle, opt, gradients(30, missing={(5, 1), (9, 0)}), each)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 9, dtype=F64), nn.Linear(9, 2, dtype=F64)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


@backends
@variants
@pytest.mark.parametrize("maximize", [False, True])
def test_the_hyper_gradient_is_the_derivative_of_the_new_loss(maximize, variant, backend):
    """Autograd goes from the loss of the next batch through the model, whose parameters are functions of the coefficients.

    What is learned from is the derivative of what is minimized, so of the negated loss where it is maximized.
    """
    model, sign = Net(), -1.0 if maximize else 1.0
    params = list(model.parameters())
    opt = MADA(params, lr=1e-2, weight_decay=0.1, **start_of(INTERIOR), freeze_steps=0, max_grad_norm=0.1, maximize=maximize,
               variant=variant, backend=backend)  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(40, 16, n, generator=generator, dtype=F64) for n in (6, 2))

    def loss(values, step):
        out = torch.func.functional_call(model, dict(zip(dict(model.named_parameters()), values, strict=True)), x[step])
        return (out - y[step]).square().mean()

    before, states, used, made_of = [p.detach().clone() for p in params], [{} for _ in params], None, []
    worst, size = torch.zeros(6, dtype=F64), torch.zeros(6, dtype=F64)
    for step in range(20):
        opt.zero_grad()
        loss(params, step).backward()
        if used is not None:
            theta = used.clone().requires_grad_()
            after = [(1 - 1e-3) * p - 1e-2 * updated(state, g, theta, 1e-6, VARIANTS[variant])[1] for p, state, g in made_of]
            for p, q in zip(params, after, strict=True):
                torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-12, atol=1e-12)
            (want,) = torch.autograd.grad(sign * loss(after, step), theta)
        opt.step()
        if used is not None:
            worst = torch.maximum(worst, (opt.hyper_gradient[0] - want).abs())
            size = torch.maximum(size, want.abs())
        used = opt.coefficients[0]
        norm = torch.stack([p.grad.norm() for p in params]).norm()
        assert norm > 0.1
        made_of = [(p, s, sign * (0.1 / (norm + 1e-6)) * q.grad) for p, s, q in zip(before, states, params, strict=True)]
        states = [updated(state, g, used, 1e-6, VARIANTS[variant])[0] for _, state, g in made_of]
        before = [p.detach().clone() for p in params]
    assert (worst <= 1e-11 * size).all()


# ------------------------------------------------------------------------------------------------------------- one way and another


def learning(params, backend, **options):
    return MADA(params, **{"lr": 1e-2, "weight_decay": 0.1, **start_of(INTERIOR), "freeze_steps": 0, "backend": backend, **options})


@backends
@variants
@pytest.mark.parametrize("statistics", ["exact", "lagged"])
def test_a_set_for_the_only_group_is_the_set_for_all(statistics, variant, backend):
    batches, runs = gradients(25), []
    for scope in ("global", "per_group"):
        params = parameters()
        opt = learning(params, backend, scope=scope, variant=variant, statistics=statistics)
        train(opt, params, batches)
        runs.append([*params, *shown(opt)])
    assert_same(*runs)


@backends
@variants
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0}, {"maximize": True}, {"scope": "per_group"}], ids=str)
def test_hyper_update_and_a_step_are_a_step(options, variant, backend):
    """Bit for bit; also with lagged statistics, since who calls ``hyper_update`` learns at once."""
    batches = gradients(25, missing={(4, 1), (5, 1)})
    runs = []
    for statistics, apart in (("exact", False), ("exact", True), ("lagged", True)):
        params = parameters()
        groups = [{"params": params[:2]}, {"params": params[2:], "lr": 3e-3}]
        opt = learning(groups, backend, variant=variant, statistics=statistics, **options)
        seen = []
        for batch in batches:
            give(params, batch)
            if apart:
                opt.hyper_update()
                learned = opt.coefficients
            opt.step()
            assert not apart or torch.equal(opt.coefficients, learned)
            seen += shown(opt)
        runs.append([*params, *seen])
    assert_same(runs[0], runs[1])
    assert_same(runs[0], runs[2])


@backends
@variants
@pytest.mark.parametrize("freeze_steps", [0, 4])
def test_lagged_is_exact_one_update_later_at_the_first_move(freeze_steps, variant, backend):
    """Bit for bit: the update that moves first with lagged statistics has the coefficients of the exact one before it."""
    first = freeze_steps + 1  # updates are counted from 0
    batches, runs = gradients(first + 2), {}
    for name, options in (("exact", {}), ("lagged", {"statistics": "lagged"}), ("still", held(INTERIOR, COEFFICIENTS))):
        params = parameters()
        opt = learning(params, backend, variant=variant, **{**options, "freeze_steps": freeze_steps})
        runs[name] = []
        for batch in batches:
            train(opt, params, [batch])
            runs[name].append(([p.detach().clone() for p in params], *(x[None] for x in shown(opt))))
    exact, lagged, still = runs["exact"], runs["lagged"], runs["still"]
    for update in range(first):
        for run in (exact, lagged):
            assert_same(run[update][0], still[update][0])
            assert torch.equal(run[update][1], still[update][1])
    assert not torch.equal(exact[first][0][0], still[first][0][0])
    assert_same(lagged[first][0], still[first][0])
    assert not torch.equal(exact[first][1], still[first][1])
    for x, y in zip(lagged[first][1:], exact[first][1:], strict=True):
        assert torch.equal(x, y)
    assert not torch.equal(lagged[first + 1][0][0], still[first + 1][0][0])


@backends
def test_50_updates_are_frozen_by_default(backend):
    params = parameters()
    opt = MADA(params, backend=backend)
    start, moved = opt.coefficients, []
    for update, batch in enumerate(gradients(53), 1):
        train(opt, params, [batch])
        if not torch.equal(opt.coefficients, start):
            moved.append(update)
        if update > 1:
            assert opt.hyper_gradient.any()
    assert moved[0] == 52


@backends
@variants
@pytest.mark.parametrize("statistics", ["exact", "lagged"])
def test_to_maximize_is_to_minimize_the_negative(statistics, variant, backend):
    batches, runs = gradients(20, missing={(4, 1)}), []
    for sign in (1.0, -1.0):
        params = parameters()
        opt = learning(params, backend, variant=variant, statistics=statistics, maximize=sign < 0, max_grad_norm=2.0)
        train(opt, params, [[None if g is None else sign * g for g in batch] for batch in batches])
        runs.append([*params, *shown(opt)])
    assert_same(*runs)


@backends
@variants
@pytest.mark.parametrize("statistics", ["exact", "lagged"])
def test_a_step_that_is_called_off_moves_nothing(statistics, variant, backend):
    """GradScaler says so; the update before it is learned from later. The scale is a power of 2, so that the bits stay."""
    batches, runs = gradients(16, missing={(4, 1), (9, 0)}), []
    overflown = [None if g is None else g.clone() * float("inf") for g in batches[3]]
    for scaled in (False, True):
        params = parameters()
        opt = learning(params, backend, variant=variant, statistics=statistics, max_grad_norm=1.0)
        for step, batch in enumerate(batches):
            if scaled:
                opt.grad_scale = torch.tensor(1024.0 if step < 8 else 64.0)
                batch = [None if g is None else g * float(opt.grad_scale) for g in batch]
                if step in (0, 1, 2, 5, 6, 9):
                    opt.found_inf = torch.tensor(1.0)
                    before = deepcopy([*(p.detach() for p in params), *shown(opt), *map(dict, opt.state.values())])
                    train(opt, params, [overflown])
                    after = [*(p.detach() for p in params), *shown(opt), *map(dict, opt.state.values())]
                    for x, y in zip(after, before, strict=True):
                        assert_same(*([z.values() if isinstance(z, dict) else [z] for z in (x, y)]))
                opt.found_inf = torch.tensor(0.0)
            train(opt, params, [batch])
        runs.append([*params, *shown(opt)])
    assert_same(*runs)


@backends
@pytest.mark.parametrize("statistics", ["exact", "lagged"])
def test_gradients_that_are_not_finite_teach_nothing(statistics, backend):
    """Whatever they do to the parameters: coefficients stay numbers within their bounds. skip_nonfinite leaves all as it is."""
    params, batches = parameters(), gradients(8)
    batches[4][1][0] = float("nan")
    opt = learning(params, backend, statistics=statistics)
    train(opt, params, batches[:4])
    before = opt.coefficients
    train(opt, params, batches[4:5])
    assert torch.equal(opt.coefficients, before)
    assert opt.hyper_gradient.isnan().all()
    train(opt, params, batches[5:])
    assert opt.coefficients.isfinite().all()
    params, runs = parameters(), []
    for skip in (False, True):
        params = parameters()
        opt = learning(params, backend, statistics=statistics, skip_nonfinite=skip)
        train(opt, params, [batch for step, batch in enumerate(batches) if skip or step != 4])
        runs.append([*params, *shown(opt)])
    assert_same(*runs)


@backends
@variants
def test_what_a_tensor_contributes(variant, backend):
    """Nothing without a gradient now or in the update before, nor after an update of lr 0; else the sums of the others."""
    params, batches = parameters(), gradients(6, missing={(2, 0), (4, 1)})
    opt = learning([{"params": params[:3]}, {"params": params[3:], "lr": 0.0}], backend, variant=variant)
    silent = {1: [], 2: [0], 3: [0], 4: [1], 5: [1]}
    train(opt, params, batches[:1])
    assert not opt.hyper_sums.any()
    for step in range(1, 6):
        train(opt, params, batches[step : step + 1])
        teaches = opt.hyper_sums.any(1).tolist()
        assert teaches == [t < 3 and t not in silent[step] for t in range(len(params))]
        torch.testing.assert_close(opt.hyper_gradient[0], -1e-2 * opt.hyper_sums.sum(0), rtol=1e-14, atol=0.0)


@backends
@variants
@pytest.mark.parametrize("statistics", ["exact", "lagged"])
def test_float32_keeps_close_to_float64(statistics, variant, backend):
    """30 steps from interior coefficients; as for the golden numbers, relative to the largest entry."""
    batches, runs = gradients(30), []
    for dtype in (torch.float32, F64):
        params = [nn.Parameter(p.detach().to(dtype)) for p in parameters()]
        opt = learning(params, backend, variant=variant, statistics=statistics)
        train(opt, params, [[g.to(dtype) for g in batch] for batch in batches])
        runs.append([*(p.detach().double() for p in params), *shown(opt)])
        assert {x.dtype for x in shown(opt)} == {F64}
    for x, y in zip(*runs, strict=True):
        assert y.numel() == 0 or (x - y).abs().max() <= 1e-4 * y.abs().max()
