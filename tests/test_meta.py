"""docs/algorithm.md section 6: the meta-update against a double backward in float64, written here from that section."""

import copy
import math

import pytest
import torch
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from metaadamw_fast import FeatureConfig, MetaAdamW, MetaLearner

from .models import (
    attention,
    batch,
    conv_net,
    cosine,
    expected_features,
    expected_scales,
    ids_of,
    lstm,
    make,
    mse,
    one_thread,  # noqa: F401
    perceptron,
    relative,
    tied,
    train,
)
from .tolerances import FLOAT32_META_GRADIENT, META_GRADIENT

TERMS = ("gradient", "loss_decrease", "gen_gap")
START = torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64)  # of the log-variances


class Recorder(torch.optim.SGD):
    """Keeps the gradients that it is given."""

    def step(self, closure=None):
        self.seen = [None if p.grad is None else p.grad.clone() for group in self.param_groups for p in group["params"]]
        return super().step(closure)


def oracle(opt, model, batches, *, objective="combined", balance="huw", gap_at="theta", **options):
    """The terms, the total and its gradients by name, from the state of the optimizer and the model's parameters."""
    model, rng, sign = copy.deepcopy(model), torch.get_rng_state(), -1 if opt.param_groups[0]["maximize"] else 1
    named, states = dict(model.named_parameters()), [opt.state.get(p, {}) for group in opt.param_groups for p in group["params"]]
    hypers = [group for group in opt.param_groups for _ in group["params"]]
    b1, b2, val = batches[:3]
    gap = batches[-1]

    def loss(values, data):
        torch.set_rng_state(rng)
        with sdpa_kernel(SDPBackend.MATH):  # no other one can be differentiated twice
            return sign * mse(lambda x: functional_call(model, values, (x,)), data)

    def gradient(values, data, graph=False):
        wanted = {name: x for name, x in values.items() if x.requires_grad}
        found = torch.autograd.grad(loss(values, data), list(wanted.values()), create_graph=graph, allow_unused=True)
        return [dict(zip(wanted, found, strict=True)).get(name) for name in values]

    g1 = gradient(named, b1)
    if opt.max_grad_norm is not None:
        norm = torch.cat([g.flatten() for g in g1 if g is not None]).norm()
        g1 = [None if g is None else g * min(1.0, opt.max_grad_norm / (norm + 1e-6)) for g in g1]
    rows, k = [], opt.steps_done + 1
    for (name, p), g, state in zip(named.items(), g1, states, strict=True):
        index = [int(part) for part in name.split(".") if part.isdigit()]
        g = torch.zeros_like(p) if g is None else g
        zeros = torch.zeros_like(p)  # of a frozen parameter, which has no state
        moments = state.get("exp_avg", zeros), state.get("exp_avg_sq", zeros)
        rows.append((g, *moments, p.detach(), p.dim() == 1, index[0] if index else None))
    encoder, groups = opt.encoder, ids_of(opt)
    config, t = encoder.features, k / opt.total_steps if opt.total_steps else 2 / (1 + math.exp(-k / 1000)) - 1
    largest = max((row[5] for row in rows if row[5] is not None), default=0)
    features = expected_features(config.version, rows, groups, t, max_layer=largest, dim=encoder.dim)
    scales = expected_scales(encoder, features, heads=4, standardised=5 if config.version == "norm_basic" else 0)

    theta = {}
    for (name, p), g, state, h, group in zip(named.items(), g1, states, hypers, groups, strict=True):
        theta[name] = p.detach().requires_grad_(p.requires_grad)
        if g is not None:
            (beta1, beta2), k, lr = h["betas"], float(state["step"]) + 1, float(h["lr"])
            m = beta1 * state["exp_avg"] + (1 - beta1) * g
            v = beta2 * state["exp_avg_sq"] + (1 - beta2) * g * g
            if h["amsgrad"]:
                v = torch.maximum(v, state["max_exp_avg_sq"])
            u = (m / (1 - beta1**k)) / ((v / (1 - beta2**k)).sqrt() + h["eps"])
            decay = 1 - lr * scales[0, group] * scales[1, group] * float(h["weight_decay"])
            theta[name] = decay * p.detach() - lr * scales[0, group] * u

    terms = {}
    if objective in ("gradient", "combined"):
        g2, alignment = gradient(theta, b2, graph=True), []
        for number in range(scales.shape[1]):
            mine = [i for i, group in enumerate(groups) if group == number]
            x1, x2 = (
                torch.cat([rows[i][0].new_zeros(rows[i][0].numel()) if g[i] is None else g[i].flatten() for i in mine])
                for g in (g1, g2)
            )
            alignment.append(scales[2, number] * (x2 @ x2) - scales[3, number] * cosine(x1, x2))
        terms["gradient"] = torch.stack(alignment).mean()
    if objective in ("loss_decrease", "combined"):
        terms["loss_decrease"] = loss(theta, val) - loss(named, val).detach()
    if objective in ("gen_gap", "combined"):
        point = theta if gap_at == "lookahead" else {name: p.detach() for name, p in named.items()}
        terms["gen_gap"] = (loss(point, b1) - loss(point, gap)).abs()

    log_vars = START.clone().requires_grad_()
    if objective == "combined" and balance == "huw":
        kinds, priorities = options.get("term_kinds", ["regression"] * 3), options.get("priorities", (1, 1, 1))
        factors = [1.0 if kind == "classification" else 0.5 for kind in kinds]
        total = sum(
            f * ((-s).exp() * terms[name] + p * s) for f, s, p, name in zip(factors, log_vars, priorities, TERMS, strict=True)
        )
    else:
        weights = options.get("fixed_weights", (1.0, 0.3, 0.3)) if objective == "combined" and balance == "fixed" else (1, 1, 1)
        total = sum(weights[TERMS.index(name)] * term for name, term in terms.items())
    learnable = dict(encoder.named_parameters())
    decayed = [p for name, p in learnable.items() if name.startswith("encoder.") or name == "head.weight"]
    total = total + options.get("encoder_decay", 1e-4) * sum(p.norm() for p in decayed)
    if config.gating:
        total = total + options.get("gate_l1", 1e-4) * learnable["feature_gates"].abs().sum()
    learnable |= {"log_vars": log_vars} if objective == "combined" and balance == "huw" else {}
    torch.set_rng_state(rng)
    gradients = torch.autograd.grad(total, list(learnable.values()), allow_unused=True)
    return terms, total, scales.detach(), dict(zip(learnable, gradients, strict=True))


def entries(model):
    named = list(model.named_parameters())
    return [
        {"params": named[:2], "lr": 2e-2, "weight_decay": 0.3},
        {"params": named[2:5], "betas": (0.5, 0.9), "eps": 1e-4},
        {"params": named[5:], "amsgrad": True, "weight_decay": 0.0},
    ]


def setting(model=perceptron, params=None, dtype=torch.float64, gap_batch=False, learner=None, **options):
    """Model, optimizer after three steps, learner with a Recorder, and batches."""
    model = model(dtype)
    gating = options.pop("gating", False)
    options["features"] = FeatureConfig(options.pop("version", "basic"), gating=gating)
    opt = make(model, **options)
    if params:
        opt = MetaAdamW(params(model), model=model, lr=1e-2, encoder=opt.encoder)
    opt.encoder.to(dtype)
    train(model, opt, 3)
    meta = MetaLearner(opt, model, mse, make_optimizer=Recorder, **(learner or {}))
    with torch.no_grad():
        meta.log_vars.copy_(START.to(dtype))
    return model, opt, meta, [batch(model, 50 + i) for i in range(4 if gap_batch else 3)]


def case(objective="combined", **options):
    names = ("balance", "gap_at", "priorities", "term_kinds", "fixed_weights", "encoder_decay", "gate_l1")
    learner = {"objective": objective, **{name: options.pop(name) for name in names if name in options}}
    return {"learner": learner, **options}


AHEAD = {"gap_at": "lookahead"}
KINDS = ("regression", "classification", "regression")
GRADIENTS = {
    **{objective: case(objective) for objective in (*TERMS, "combined")},
    "gen_gap ahead": case("gen_gap", **AHEAD),
    "huw ahead": case(**AHEAD),
    "priorities, kinds": case(priorities=(2.0, 5.0, 0.5), term_kinds=KINDS, **AHEAD),
    "fixed": case(balance="fixed"),
    "fixed ahead": case(balance="fixed", fixed_weights=(0.5, 2.0, 0.7), **AHEAD),
    "sum": case(balance="sum"),
    "sum ahead": case(balance="sum", **AHEAD),
    "gap batch": case(gap_batch=True),
    "gap batch ahead": case(gap_batch=True, **AHEAD),
    "no regularisers": case(encoder_decay=0.0, gate_l1=0.0, gating=True),
    "gating": case(gating=True, gate_l1=1e-2, **AHEAD),
    "norm_basic, gating": case(version="norm_basic", gating=True, encoder_decay=1e-2),
    "enhanced": case(version="enhanced", gating=True, total_steps=10),
    "amsgrad": case(amsgrad=True),
    **{f"maximize, {gap_at}": case(maximize=True, gap_at=gap_at) for gap_at in ("theta", "lookahead")},
    "clipped": case(max_grad_norm=0.1, **AHEAD),
    "clipped, maximize": case(max_grad_norm=0.1, maximize=True),
    "not quite clipped": case(max_grad_norm=1e3),
    "param groups": case(params=entries, **AHEAD),
    "one group": case(grouping="param_groups"),
    "reference": case(backend="reference", max_grad_norm=0.1, amsgrad=True),
    "lagged": case(statistics="lagged"),
    "tied, frozen, unused": case(model=tied, **AHEAD),
    "tied, gradient": case("gradient", model=tied),
    "norms below 1e-8": case("gradient", model=lambda dtype: perceptron(dtype, factor=1e-9), encoder_decay=0.0),
    "conv": case(model=conv_net),
    "batch norm": case(model=lambda dtype: conv_net(dtype, batch_norm=True), **AHEAD),
    "batch norm, eval": case(model=lambda dtype: conv_net(dtype, batch_norm=True).eval()),
    "attention": case(model=attention, **AHEAD),
    "dropout": case(model=lambda dtype: attention(dtype, dropout=0.5), **AHEAD),
    "lstm": case(model=lstm, **AHEAD),
}


def handed_over(expected):
    """The names in the order in which the meta-optimizer has them: group embeddings last."""
    return sorted(expected, key=lambda name: name.startswith("group_embeddings."))


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_equal_a_double_backward(name):
    model, opt, meta, batches = setting(**GRADIENTS[name])
    learner = GRADIENTS[name]["learner"]
    terms, total, scales, expected = oracle(opt, model, batches, **learner)
    report = meta.update(*batches)
    names = handed_over(expected)
    assert len(names) == len(meta.meta_optimizer.seen)
    for name, actual in zip(names, meta.meta_optimizer.seen, strict=True):
        if expected[name] is None:  # what nothing depends on, such as the layers behind a gap at theta without decay
            assert actual is None or not actual.any(), name
        else:
            assert expected[name].norm() > 0, name
            assert relative(actual, expected[name]) < META_GRADIENT, name
    assert report.total.item() == pytest.approx(total.item(), rel=1e-12)
    torch.testing.assert_close(torch.stack([report.lr_scale, report.wd_scale]), scales[:2], rtol=1e-12, atol=0)
    reported = (report.gradient_alignment, report.loss_decrease, report.generalization_gap)
    for term, value in zip(TERMS, reported, strict=True):
        assert (value is None) == (term not in terms)
        if value is not None:
            assert value.shape == ()
            assert value.item() == pytest.approx(terms[term].item(), rel=1e-10)
    assert report.log_vars.shape == (3,)
    assert torch.equal(report.log_vars, meta.log_vars)


def test_a_batch_of_its_own_for_the_gap():
    """`gap_batch` defaults to the validation batch."""
    _, _, meta, batches = setting()
    _, _, other, _ = setting()
    assert torch.equal(meta.update(*batches).total, other.update(*batches, batches[2]).total)
    _, _, another, _ = setting()
    assert not torch.equal(meta.update(*batches).total, another.update(*batches, batches[0]).total)


@pytest.mark.parametrize("name", ["combined", "batch norm", "attention", "lstm", "enhanced"])
def test_gradients_in_float32(name):
    """Where torch's own kernels differ from those of float64, and for some of which there is no double backward."""
    model, opt, meta, batches = setting(**GRADIENTS[name], dtype=torch.float32)
    double_model, double_opt = copy.deepcopy((model, opt))
    double_model.double()
    double_opt.encoder.double()
    for state in double_opt.state.values():
        state |= {key: x.double() for key, x in state.items()}
    doubled = [tuple(x.double() for x in data) for data in batches]
    _, _, _, expected = oracle(double_opt, double_model, doubled, **GRADIENTS[name]["learner"])
    meta.update(*batches)
    for key, actual in zip(handed_over(expected), meta.meta_optimizer.seen, strict=True):
        assert relative(actual, expected[key]) < FLOAT32_META_GRADIENT, key
