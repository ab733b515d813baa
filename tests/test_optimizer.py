"""The optimizer as a whole: its step, what torch promises of any optimizer, and what must not change a step."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_

from metaadamw_fast import FeatureConfig, MetaAdamW
from metaadamw_fast.core.states import States

from .models import (
    assert_same_bits,
    batch,
    expected_features,
    expected_scales,
    ids_of,
    make,
    mse,
    noise,
    one_thread,  # noqa: F401
    perceptron,
    relative,
    train,
)
from .optimizers import AVGRAD, META, every, every_with
from .tolerances import CLIPPED, ENCODER, REDUCTION

BACKENDS = ("cpp", "reference")


# ------------------------------------------------------------------------------------------------------- one step, by its formula


@pytest.mark.parametrize("variant", ["paper", "released"])
def test_a_step_is_the_formula(variant):
    """docs/algorithm.md sections 3 to 5 and 9, in float64, with scales that differ from group to group."""
    model = perceptron(torch.float64)
    opt = make(model, variant=variant, features="norm_basic", lr_scale_range=1.5)
    opt.encoder.double()
    for k in range(1, 5):
        mse(model, batch(model, k)).backward()
        before = [(p.detach().clone(), *(opt.state[p][n].clone() for n in ("exp_avg", "exp_avg_sq"))) for p in model.parameters()]
        opt.step()
        rows = [(p.grad, m, v, q, None, None) for p, (q, m, v) in zip(model.parameters(), before, strict=True)]
        t = 2 / (1 + math.exp(-k / 1000)) - 1
        features = expected_features("norm_basic", rows, ids_of(opt), t, dim=opt.encoder.dim)
        scales = expected_scales(opt.encoder, features, heads=4, standardised=5, ranges=(1.5, 1.0)).detach()
        for i, name in enumerate(("lr_scale", "wd_scale", "flatness_weight", "alignment_weight")):
            torch.testing.assert_close(getattr(opt, name), scales[i], rtol=1e-12, atol=0)
        assert scales[0].std() > 0.01 < scales[1].std()
        for p, (q, m, v), group in zip(model.parameters(), before, ids_of(opt), strict=True):
            m, v = 0.9 * m + 0.1 * p.grad, 0.999 * v + 0.001 * p.grad**2
            decay = 3e-3 * scales[0, group] * scales[1, group] * 0.1 / (1 if variant == "paper" else 1 - 0.9**k)
            step = 3e-3 * scales[0, group] * (m / (1 - 0.9**k)) / ((v / (1 - 0.999**k)).sqrt() + 1e-8)
            torch.testing.assert_close(p.detach(), (1 - decay) * q - step, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("backend", BACKENDS)
@every_with(
    {}, {"maximize": True, "weight_decay": 0.0}, {"betas": (0.6, 0.7), "eps": 0.1, "lr": 0.05}, MetaAdamW=[{"amsgrad": True}]
)
def test_steps_are_those_of_torch_s_own_operations(spec, options, backend):
    """In float64, for as many steps as the mean of an AVGrad takes to differ from its second moment."""
    models = [perceptron(torch.float64) for _ in range(2)]
    options = {"lr": 3e-3, "weight_decay": 0.1, **options}
    ours = spec.kind(models[0].parameters(), backend=backend, **spec.plain, **options)
    for model, opt in zip(models, (ours, spec.eager(models[1].parameters(), **options)), strict=True):
        train(model, opt, 12)
    assert ours.state[models[0].out.weight].keys() == opt.state[models[1].out.weight].keys()
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        assert relative(p, q) < REDUCTION[torch.float64]
        assert all(relative(x, opt.state[q][name]) < REDUCTION[torch.float64] for name, x in ours.state[p].items())


def test_lagged_scales_are_those_of_the_step_before():
    """A twin in exact mode takes over the state before step s-1; its scales there are the lagged ones of step s."""
    model = perceptron()
    lagged = make(model, statistics="lagged", total_steps=20)
    expected = torch.ones(2, len(lagged.groups))
    for step in range(6):
        lagged.zero_grad()
        mse(model, batch(model, step)).backward()
        twin = copy.deepcopy(model)
        exact = MetaAdamW(twin.named_parameters(), model=twin, total_steps=20)
        exact.load_state_dict(lagged.state_dict())
        for p, q in zip(twin.parameters(), model.parameters(), strict=True):
            p.grad = q.grad.clone()
        lagged.step()
        exact.step()
        assert torch.equal(torch.stack([lagged.lr_scale, lagged.wd_scale]), expected)
        assert torch.equal(lagged.statistics, exact.statistics)
        expected = torch.stack([exact.lr_scale, exact.wd_scale])
        assert not torch.equal(expected, torch.stack([lagged.lr_scale, lagged.wd_scale]))


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_lagged_step_is_one_pass_whoever_writes_and_whatever_has_no_gradient(backend, capturable, monkeypatch):
    """From the first step on. Its statistics are those of a pass of its own, in bits."""

    def passes(*_, **__):
        raise AssertionError("a lagged step has measured beside its update")

    model = perceptron()
    model.norm.weight.requires_grad_(False)
    lagged = make(model, statistics="lagged", backend=backend)
    for group in lagged.param_groups:
        group["capturable"] = capturable  # the constructor wants a CUDA device
    for step in range(6):
        lagged.zero_grad()
        mse(model, batch(model, step)).backward()
        if step in (1, 2, 4):
            model.out.bias.grad = None
        twin = copy.deepcopy(model)
        exact = MetaAdamW(twin.named_parameters(), model=twin, backend=backend)
        exact.load_state_dict(lagged.state_dict())
        for p, q in zip(twin.parameters(), model.parameters(), strict=True):
            p.grad = None if q.grad is None else q.grad.clone()
        exact.step()
        with monkeypatch.context() as patch:
            patch.setattr(States, "measure", passes)
            lagged.step()
        assert torch.equal(lagged.statistics, exact.statistics)
        model.out.weight.data.mul_(1.5)  # which no version counter tells
        model.layers[0].bias.detach().numpy()[:] += 0.25
        lagged.state[model.out.weight]["exp_avg_sq"].data.mul_(0.5)


# ------------------------------------------------------------------------------------------------------------- what can be read


GATED = FeatureConfig("enhanced", gating=True)


@every_with({}, MetaAdamW=[{"features": GATED, "head_init": start} for start in ("identity", "xavier")])
def test_building_draws_nothing_from_the_global_random_state(spec, options):
    model = perceptron()
    state = torch.get_rng_state()
    spec.of_model(model, **options)
    assert torch.equal(torch.get_rng_state(), state)


# ----------------------------------------------------------------------------------------------------------- clipping, non-finite


@every
@pytest.mark.parametrize("backend", BACKENDS)
def test_max_grad_norm_is_clip_grad_norm(backend, spec):
    models = [perceptron(), perceptron()]
    folded = make(models[0], spec, max_grad_norm=2.0, backend=backend, **spec.still)
    plain = make(models[1], spec, backend=backend, **spec.still)
    norms = []
    for step in range(50):
        for model, opt in zip(models, (folded, plain), strict=True):
            opt.zero_grad()
            mse(model, batch(model, step)).backward()
        unclipped = [p.grad.clone() for p in models[0].parameters()]
        norms.append(clip_grad_norm_(models[1].parameters(), 2.0))
        folded.step()
        plain.step()
        assert all(torch.equal(p.grad, g) for p, g in zip(models[0].parameters(), unclipped, strict=True))
        torch.testing.assert_close(folded.grad_norm, norms[-1].to(folded.sums_dtype()), rtol=1e-5, atol=0)
    assert 10 < sum(norm > 2.0 for norm in norms) < 40
    if spec.encodes:
        torch.testing.assert_close(folded.lr_scale, plain.lr_scale, **ENCODER)
    assert all(relative(p, q) < CLIPPED for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True))


@every
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_non_finite_gradient_in_a_clipped_step(bad, spec):
    models = [perceptron(), perceptron()]
    optimizers = [make(models[0], spec, max_grad_norm=0.5), make(models[1], spec)]
    for model in models:
        mse(model, batch(model, 0)).backward()
        model.out.weight.grad[0, 0] = bad
    clip_grad_norm_(models[1].parameters(), 0.5)
    for opt in optimizers:
        opt.step()
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=0, equal_nan=True)


# ------------------------------------------------------------------------------------------------------- as any torch optimizer


@every
def test_closures_hooks_and_zero_grad(spec):
    model = perceptron()
    opt, calls = make(model, spec), []
    opt.register_step_pre_hook(lambda *_: calls.append("pre"))
    opt.register_step_post_hook(lambda *_: calls.append("post"))

    def closure():
        calls.append("closure")
        opt.zero_grad()
        loss = mse(model, batch(model, 0))
        loss.backward()  # with gradients enabled, though step() runs without
        return loss

    with torch.no_grad():
        loss = opt.step(closure)
    assert calls == ["pre", "closure", "post"]
    assert loss.requires_grad
    assert loss == mse(perceptron(), batch(model, 0))
    assert opt.step() is None
    opt.zero_grad()
    assert all(p.grad is None for p in model.parameters())
    opt.step()
    assert [x["step"].item() for x in opt.state.values()] == [2.0] * 10


@every_with({}, {"foreach": True}, {"fused": False, "foreach": None}, {"fused": True})
def test_what_callers_of_adamw_pass_besides_changes_nothing(spec, options):
    """Neither the step nor the param groups, by whose keys checkpoints are told apart."""
    models = [perceptron(), perceptron()]
    optimizers = [make(models[0], spec), make(models[1], spec, **options, differentiable=False)]
    for model, opt in zip(models, optimizers, strict=True):
        train(model, opt, 2)
    assert_same_bits(*zip(models, optimizers, strict=True))
    assert optimizers[0].param_groups[0].keys() == optimizers[1].param_groups[0].keys()


@every_with(MetaAdamW=[{"features": "enhanced"}], AVGrad=[{"max_grad_norm": 1e6}])
def test_add_param_group_keeps_ids_scales_and_states(spec, options):
    model = perceptron(depth=2)
    opt = make(model, spec, **options)
    train(model, opt, 3)
    statistics = opt.statistics.clone()
    states = {p: {name: x.clone() for name, x in state.items()} for p, state in opt.state.items()}
    if spec.encodes:
        names, scales = [list(group.names) for group in opt.groups], [opt.lr_scale.clone(), opt.wd_scale.clone()]
        embeddings = [p.detach().clone() for p in opt.encoder.group_embeddings]
    extra = nn.Linear(3, 3)
    opt.add_param_group({"params": [(f"extra.{n}", p) for n, p in extra.named_parameters()], "lr": 0.5, "weight_decay": 0.0})
    if spec.encodes:
        assert [group.names for group in opt.groups[: len(names)]] == names
        assert torch.equal(opt.lr_scale, torch.cat([scales[0], torch.ones(2)]))
        assert torch.equal(opt.wd_scale, torch.cat([scales[1], torch.ones(2)]))
        assert all(torch.equal(a, b) for a, b in zip(embeddings, opt.encoder.group_embeddings, strict=False))
    assert statistics[:, 0].all()
    assert torch.equal(opt.statistics, torch.cat([statistics, torch.zeros_like(statistics[:2])]))
    assert all(torch.equal(x, opt.state[p][name]) for p, state in states.items() for name, x in state.items())
    before = extra.weight.detach().clone()
    (mse(model, batch(model, 3)) + extra.weight.sum()).backward()
    opt.step()
    scale = opt.lr_scale[-2] if spec.encodes else 1
    torch.testing.assert_close(extra.weight.detach(), before - 0.5 * scale, rtol=0, atol=1e-6)
    assert [opt.state[p]["step"].item() for p in (model.out.weight, extra.weight, extra.bias)] == [4, 1, 0]


# -------------------------------------------------------------------------------------------------- what must not change a step


def ten_steps(spec, threads=1, context=None, dtype=torch.float32, **options):
    """Gradients come from outside: those of a model need not have the same bits in every setting."""
    before, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    params = [nn.Parameter(noise(shape, i, dtype)) for i, shape in enumerate([(300, 400), (70,), (33, 65), (0,), (1,), (9, 7)])]
    params[2].data = params[2].data.t()
    model = nn.ParameterList(params)
    try:
        torch.set_num_threads(threads)
        opt = make(model, spec, **options)
        for step in range(10):
            for i, p in enumerate(params):
                p.grad = noise(p.shape, 100 * step + i, dtype)
            if context == "invalidate":
                opt.invalidate_statistics()
            if context == "medium":
                torch.set_float32_matmul_precision("medium")
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=context == "autocast"):
                opt.step()
        assert torch.get_float32_matmul_precision() == ("medium" if context == "medium" else precision)
    finally:
        torch.set_num_threads(before)
        torch.set_float32_matmul_precision(precision)
    return model, opt


@every_with(MetaAdamW=[{"features": version} for version in ("basic", "enhanced", "norm_basic_plus")], AVGrad=[{}])
@pytest.mark.parametrize("other", [{}, {"threads": 2}, {"threads": 3}, {"context": "autocast"}, {"context": "medium"}], ids=str)
def test_equal_bits(other, spec, options):
    options = {**options, "max_grad_norm": 50.0}
    assert_same_bits(ten_steps(spec, **options), ten_steps(spec, **options, **other))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_equal_bits_whether_sums_are_carried_or_measured(dtype, backend):
    options = {"dtype": dtype, "backend": backend, "features": "enhanced", "amsgrad": True}
    assert_same_bits(ten_steps(META, **options), ten_steps(META, **options, context="invalidate"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_update_without_sums_has_the_bits_of_one_with_them(backend):
    """A norm that is never reached is measured, and multiplies the gradients with 1."""
    plain, measured = (ten_steps(AVGRAD, backend=backend, max_grad_norm=x)[0] for x in (None, 1e9))
    assert all(torch.equal(p, q) for p, q in zip(plain.parameters(), measured.parameters(), strict=True))


@every
def test_mixed_dtypes_are_updated_as_each_on_its_own(spec):
    dtypes = (torch.bfloat16, torch.float32, torch.float16, torch.float64)
    together = [nn.Parameter(noise((40, 30), 1, dtype)) for dtype in dtypes]
    apart = copy.deepcopy(together)
    optimizers = [spec.kind(ps, lr=1e-2, weight_decay=0.1, **spec.plain) for ps in (together, *([p] for p in apart))]
    for step in range(5):
        for p, q in zip(together, apart, strict=True):
            p.grad = q.grad = noise(p.shape, step, p.dtype)
        for opt in optimizers:
            opt.step()
    for p, q, dtype in zip(together, apart, dtypes, strict=True):
        assert torch.equal(p, q)
        assert relative(p, together[3]) < 5 * torch.finfo(dtype).eps * 2
        assert all(optimizers[0].state[p][name].dtype == dtype for name in ("exp_avg", "exp_avg_sq"))


@every
@pytest.mark.parametrize("steps", [0, 2])
def test_a_model_that_changes_its_dtype(steps, spec):
    """It goes on as a float64 model; the moments stay what they are."""
    model = perceptron()
    opt = make(model, spec, **spec.plain)
    train(model, opt, steps)
    twin = copy.deepcopy(model).double()
    expected = spec.eager(twin.parameters(), lr=3e-3, weight_decay=0.1, **({"foreach": False} if spec is META else {}))
    if steps:
        state = copy.deepcopy(opt.state_dict()["state"])
        expected.load_state_dict({"state": state, "param_groups": expected.state_dict()["param_groups"]})
    model.double()
    train(model, opt, 5, first=steps)
    train(twin, expected, 5, first=steps)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert relative(p, q) < REDUCTION[torch.float32]
