"""``MetaAdamW.look_ahead``, through which the learner asks the optimizer: what it returns, and that nothing else is asked."""

import ast
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn

import metaadamw_fast
from metaadamw_fast import FeatureConfig, MetaLearner

from .models import (
    batch,
    make,
    mse,
    noise,
    one_thread,  # noqa: F401
    perceptron,
    same,
    tied,
    train,
)

PACKAGE = Path(metaadamw_fast.__file__).parent
LEARNER = ("evaluation", "lookahead", "meta", "meta_checkpoint", "model_state", "parallel", "schedule", "weighting")


def complex_model(dtype=torch.float64):
    model = nn.Module()
    model.w = nn.Parameter(torch.view_as_complex(noise((4, 3, 2), 0, dtype)))
    model.b = nn.Parameter(noise((5,), 1, dtype))
    return model


STEPS = {
    "plain": {},
    "reference": {"backend": "reference"},
    "amsgrad, clipped": {"amsgrad": True, "max_grad_norm": 0.1},
    "maximize": {"maximize": True, "max_grad_norm": 0.1},
    "enhanced": {"features": FeatureConfig("enhanced", gating=True)},
    "frozen and unused": {"model": tied},
    "complex": {"model": complex_model},
    "lazy, no step before": {"allocate": "lazy", "steps": 0},
}


def gradients(opt, seed):
    """One for each parameter that is trained; every fifth has none."""
    params = [p for group in opt.param_groups for p in group["params"]]
    numbers = [noise((*p.shape, 2), seed + t, torch.float64) for t, p in enumerate(params)]
    found = [torch.view_as_complex(x) if p.is_complex() else x[..., 0].to(p.dtype) for p, x in zip(params, numbers, strict=True)]
    return params, [None if t % 5 == 4 or not p.requires_grad else g for t, (p, g) in enumerate(zip(params, found, strict=True))]


def step_with(opt, params, grads, sign=1):
    for p, g in zip(params, grads, strict=True):
        p.grad = None if g is None else sign * g
    opt.step()


def prepared(model=perceptron, steps=2, **options):
    model = model(torch.float64)
    opt = make(model, lr=1e-2, **options)
    opt.encoder.to(torch.float64)
    for step in range(steps):
        step_with(opt, *gradients(opt, 100 * step))
    return opt


@pytest.mark.parametrize("options", STEPS.values(), ids=STEPS)
def test_it_is_the_step_that_is_taken(options):
    opt = prepared(**options)
    params, g1 = gradients(opt, 1000)
    before = [p.detach().clone() for p in params]
    states = [(id(x), x.clone()) for state in opt.state.values() for x in state.values()]
    ahead = opt.look_ahead(g1)
    assert all(map(torch.equal, params, before))
    found = [(id(x), x) for state in opt.state.values() for x in state.values()]  # more, if they were not there
    assert all(i == j and torch.equal(x, y) for (i, x), (j, y) in zip(states, found, strict=False))
    moved = ahead.parameters(before)

    step_with(opt, params, g1, -1 if options.get("maximize") else 1)
    assert torch.equal(ahead.scales[:2], torch.stack([opt.lr_scale, opt.wd_scale]))
    assert ahead.scales.requires_grad
    for x, p, g in zip(moved, params, g1, strict=True):
        assert (x is None) == (g is None)
        if x is not None:
            torch.testing.assert_close(x, p.detach(), rtol=1e-12, atol=1e-14)


def test_group_sums():
    opt = prepared(grouping="fine_grained")
    _, xs = gradients(opt, 1000)
    ys = [None if t % 3 == 0 else g for t, g in enumerate(gradients(opt, 2000)[1])]
    found = opt.look_ahead(xs).group_sums(xs, ys)
    for number, group in enumerate(opt.groups):
        x, y = (
            torch.cat(
                [
                    torch.zeros(p.numel(), dtype=torch.float64) if (g := zs[t]) is None else g.flatten()
                    for t, p in zip(group.members, group.params, strict=True)
                ]
            )
            for zs in (xs, ys)
        )
        torch.testing.assert_close(found[number], torch.stack([x @ x, x @ y, y @ y]), rtol=1e-12, atol=1e-14)


class Spectrum(nn.Module):
    """A complex parameter, or its real and imaginary parts as a real one."""

    def __init__(self, as_real):
        super().__init__()
        parts = noise((6, 3, 2), 0, torch.float64)
        self.layer = nn.Linear(6, 6).double()
        self.w = nn.Parameter(parts if as_real else torch.view_as_complex(parts))

    def forward(self, x):
        w = self.w if self.w.is_complex() else torch.view_as_complex(self.w)
        x = torch.tanh(self.layer(x)).to(w.dtype) @ w
        return (x * x).imag + x.abs()


@pytest.mark.parametrize("hvp", ["exact", "finite_difference"])
def test_a_meta_update_of_complex_parameters_is_that_of_their_parts(hvp):
    seen = []
    for as_real in (True, False):
        torch.manual_seed(0)
        model = Spectrum(as_real)
        opt = make(model, lr=1e-2, head_init="identity")  # then no feature, such as the number of elements, has a part in it
        opt.encoder.to(torch.float64)
        batches = [(noise((8, 6), i, torch.float64), noise((8, 3), i + 10, torch.float64)) for i in range(3)]
        mse(model, batches[0]).backward()
        opt.step()
        meta = MetaLearner(opt, model, mse, gap_at="lookahead", hvp=hvp, lr=1.0, make_optimizer=torch.optim.SGD)
        report = meta.update(*batches)
        terms = [report.gradient_alignment, report.loss_decrease, report.generalization_gap]
        seen.append([*terms, *opt.encoder.head.bias.detach(), *report.log_vars])
        assert opt.encoder.head.bias.abs().min() > 0
    # Rounding alone differs: at most 1e-16 over the 1e-5 of a difference.
    torch.testing.assert_close(torch.stack(seen[1]), torch.stack(seen[0]), rtol=1e-9, atol=1e-9)


# ------------------------------------------------------------------------------------------------- the optimizer's own table


@pytest.mark.parametrize("variant", ["paper", "released"])
def test_a_meta_update_leaves_the_table_of_the_steps_alone(variant):
    model = perceptron()
    opt = make(model, variant=variant, max_grad_norm=1.0, backend="cpp")
    train(model, opt, 2)
    launch = opt._states.launch
    table, seen = launch._table.clone(), opt._states._seen
    MetaLearner(opt, model, mse, gap_at="lookahead").update(*(batch(model, i) for i in range(3)))
    assert opt._states.launch is launch
    assert torch.equal(launch._table, table)
    assert opt._states._seen == seen


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_gradients_are_free_after_it(backend):
    opt = prepared(backend=backend)
    _, g1 = gradients(opt, 1000)
    alive = [weakref.ref(g) for g in g1 if g is not None]
    ahead = opt.look_ahead(g1)
    del g1
    assert not any(reference() is not None for reference in alive)
    assert ahead.directions[0] is not None


# --------------------------------------------------------------------------------------------------------------------- errors


ERRORS = {
    "too few": (lambda g: g[1:], ValueError, "an entry of g1 for each of the 10 parameters, got 9"),
    "too many": (lambda g: [*g, None], ValueError, "an entry of g1 for each of the 10 parameters, got 11"),
    "shape": (lambda g: [g[0][:1], *g[1:]], RuntimeError, "shape"),
    "sparse": (lambda g: [g[0].to_sparse(), *g[1:]], RuntimeError, "sparse"),
    "device": (lambda g: [g[0].to("meta"), *g[1:]], RuntimeError, "device"),
}


@pytest.mark.parametrize(("spoil", "error", "message"), ERRORS.values(), ids=ERRORS)
def test_gradients_that_do_not_fit(spoil, error, message):
    opt = prepared()
    before = opt.state_dict()
    with pytest.raises(error, match=message):
        opt.look_ahead(spoil(gradients(opt, 1000)[1]))
    assert same(opt.state_dict(), before)


def test_the_released_code_needs_the_last_gradients():
    opt = prepared(variant="released")
    _, g1 = gradients(opt, 1000)
    with pytest.raises(ValueError, match="an entry of last_grads for each of the 10 parameters, got 0"):
        opt.look_ahead(g1)
    assert opt.look_ahead(g1, g1).clip == 1.0


# ----------------------------------------------------------------------------------------------------------------- the seam


def private_names():
    """The underscored attributes of an optimizer that has taken a step, of its states and of their lists."""
    opt = prepared()
    objects = (opt, opt._states, opt._states.held, opt._hyperparameters)
    names = {name for x in objects for name in dir(x) if name.startswith("_") and not name.endswith("__")}
    assert {"_current_states", "_rank_sums", "_group_of", "_backend", "_encode", "_written"} <= names
    return names


def private_reads(source, names):
    """Those of the names that are asked of anything but ``self``, also by a string."""
    nodes = list(ast.walk(ast.parse(source)))
    attributes = [x for x in nodes if isinstance(x, ast.Attribute) and not (isinstance(x.value, ast.Name) and x.value.id == "self")]
    strings = [x.value for x in nodes if isinstance(x, ast.Constant) and isinstance(x.value, str)]
    return names & {*(x.attr for x in attributes), *strings}


@pytest.mark.parametrize("module", LEARNER)
def test_the_learner_reads_nothing_private_of_the_optimizer(module):
    assert not private_reads((PACKAGE / f"{module}.py").read_text(), private_names())


@pytest.mark.parametrize("read", ["opt._backend", "self.optimizer._group_of", "getattr(opt, '_rank_sums')", "states.held._take(x)"])
def test_a_private_read_is_seen(read):
    assert private_reads(f"def f(self, opt, states):\n    return {read}\n", private_names())
