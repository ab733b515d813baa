"""What a meta-update leaves as it was, what it reports, and where it moves the scales."""

import copy
import functools

import pytest
import torch
from torch import nn

from metaadamw_fast import FeatureConfig, MetaAdamW, MetaLearner, MicroBatches

from .models import (
    attention,
    batch,
    conv_net,
    lstm,
    make,
    mse,
    noise,
    one_thread,  # noqa: F401
    perceptron,
    relative,
    same,
    tied,
    train,
)


def weight_normed():
    model = perceptron()
    nn.utils.parametrizations.weight_norm(model.out)
    return model


MODELS = {
    "perceptron": perceptron,
    "batch norm": lambda: conv_net(batch_norm=True),
    "dropout": lambda: attention(dropout=0.5),
    "lstm": lstm,
    "tied, frozen, unused": tied,
    "channels_last": lambda: conv_net(batch_norm=True).to(memory_format=torch.channels_last),
    "weight norm": weight_normed,
}


def prepared(model, loss_fn=mse, **options):
    """Optimizer and learner after two steps, the last one's gradients standing."""
    learner = {"gap_at": "lookahead", **options.pop("learner", {})}
    opt = make(model, features=FeatureConfig("enhanced", gating=True), **options)
    train(model, opt, 2)
    return opt, MetaLearner(opt, model, loss_fn, **learner)


def everything(model, opt):
    """Whatever section 6.8 names, with the identity of the tensors, and the settings of torch."""
    modules = list(model.modules())
    own = [(id(x), x.detach().clone()) for m in modules for x in (*m._parameters.values(), *m._buffers.values()) if x is not None]
    names = [[*m._parameters, "/", *m._buffers, "/", *m.__dict__] for m in modules]
    recurrent = [id(x) for m in modules if isinstance(m, nn.RNNBase) for x in m._flat_weights]
    grads = [None if p.grad is None else (id(p.grad), p.grad.clone()) for p in model.parameters()]
    rest = [[m.training for m in modules], [p.requires_grad for p in model.parameters()], torch.get_rng_state()]
    state = [copy.deepcopy(opt.state[p]) for p in model.parameters() if p in opt.state]
    read = [getattr(opt, name).clone() for name in ("lr_scale", "wd_scale", "features", "statistics", "grad_norm")]
    sdp = (f() for f in (torch.backends.cuda.flash_sdp_enabled, torch.backends.cuda.math_sdp_enabled))
    flags = [torch.is_grad_enabled(), torch._C._get_mkldnn_enabled(), torch.get_float32_matmul_precision(), *sdp]
    return [own, names, recurrent, grads, rest, [dict(s) for s in state], read, opt.steps_done, flags]


@pytest.mark.parametrize("hvp", ["exact", "finite_difference"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", MODELS)
def test_the_model_is_exactly_as_before(kind, training, hvp):
    model = MODELS[kind]()
    opt, meta = prepared(model, learner={"hvp": hvp})
    model.train(training)
    next(iter(model.children())).train(not training)
    before, encoder = everything(model, opt), copy.deepcopy(opt.encoder.state_dict())
    report = meta.update(*(batch(model, 10 + i) for i in range(3)))
    assert same(everything(model, opt), before)
    assert report.total.isfinite()
    moved = [name for name, x in opt.encoder.state_dict().items() if not torch.equal(x, encoder[name])]
    assert set(encoder) - set(moved) <= {f"group_embeddings.{i}" for i in range(len(opt.groups))}
    assert all(p.grad is None for p in (*opt.encoder.parameters(), meta.log_vars))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("deterministic", [False, True])
def test_recurrent_layers_change_no_other_setting_of_torch(deterministic):
    """Not even for the time of an evaluation, and nothing warns."""
    model, backend = lstm(), torch.backends.mkldnn
    seen = []

    def loss_fn(model, data):
        seen.append((backend.deterministic, backend.matmul.fp32_precision, backend.rnn.fp32_precision, backend.enabled))
        return mse(model, data)

    _, meta = prepared(model, loss_fn)
    before = backend.deterministic, backend.matmul.fp32_precision, backend.rnn.fp32_precision, backend.enabled
    try:
        backend.deterministic, backend.rnn.fp32_precision = deterministic, "bf16"
        meta.update(*(batch(model, i) for i in range(3)))
        enabled = [True] * 4 + [False]  # off for the second derivative only, which is taken last
        assert seen == [(deterministic, before[1], "bf16", x) for x in enabled]
        assert backend.enabled == before[3]
    finally:
        backend.deterministic, _, backend.rnn.fp32_precision, _ = before


class SomeError(Exception):
    pass


@pytest.mark.parametrize(("hvp", "call"), [("exact", i) for i in range(1, 7)] + [("finite_difference", i) for i in range(1, 9)])
@pytest.mark.parametrize("kind", ["batch norm", "dropout", "lstm", "tied, frozen, unused"])
def test_the_model_is_as_before_when_an_evaluation_raises(kind, hvp, call):
    """Of five evaluations, or seven with differences: each leaves another mode and no gradients, and one raises."""
    model, last = MODELS[kind](), {"exact": 5, "finite_difference": 7}[hvp]
    error = KeyboardInterrupt if call % 2 else SomeError
    calls = []

    def loss_fn(model, data):
        calls.append(1)
        value = mse(model, data)
        torch.rand(3)
        model.eval()
        model.zero_grad()
        if len(calls) == call:
            raise error
        return value

    opt, meta = prepared(model, loss_fn, learner={"hvp": hvp})
    before, learner = everything(model, opt), copy.deepcopy([dict(opt.encoder.state_dict()), meta.state_dict()])
    batches = [batch(model, 10 + i) for i in range(3)]
    if call <= last:
        with pytest.raises(error):
            meta.update(*batches)
        assert same([dict(opt.encoder.state_dict()), meta.state_dict()], learner)
    else:
        meta.update(*batches)
        assert len(calls) == last
    assert same(everything(model, opt), before)


class Caching(nn.Module):
    """A buffer that is there from the first evaluation on, as rotary embeddings keep theirs, and one that is replaced."""

    shape = (4, 6)

    def __init__(self):
        super().__init__()
        self.out = nn.Linear(6, 3)
        self.register_buffer("cache", None)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        if self.cache is None:
            self.cache = self.out.weight.norm() * torch.ones(3)
            self.register_buffer("late", torch.ones(3))
        self.count = self.count + 1
        return self.out(x) + self.cache.detach()


def test_buffers_that_evaluations_create_or_replace():
    with torch.random.fork_rng():
        model = Caching()
    opt = make(model)
    before = everything(model, opt)
    MetaLearner(opt, model, mse).update(*(batch(model, i) for i in range(3)))
    assert model.cache is None
    assert same(everything(model, opt), before)


# ------------------------------------------------------------------------------------------------------- non-finite objectives

META_OPTIMIZERS = {
    "adam": torch.optim.Adam,
    "sgd": functools.partial(torch.optim.SGD, momentum=0.9, dampening=0.5, weight_decay=0.1),
    "rmsprop": functools.partial(torch.optim.RMSprop, momentum=0.9),
}
POISONS = {  # batches in which an input is not finite; in the last case only the gap at θ has no number, and no gradient of it
    "nan in the first batch": ((float("nan"), 0, 0), {}),
    "nan in the second batch": ((0, float("nan"), 0), {}),
    "inf in validation": ((0, 0, float("inf")), {}),
    "one objective": ((0, float("nan"), 0), {"objective": "gradient"}),
    "no gradient of it": ((0, 0, float("nan")), {"objective": "gen_gap", "gap_at": "theta"}),
}


@pytest.mark.parametrize("variant", ["paper", "released"])
@pytest.mark.parametrize("before", [0, 2])
@pytest.mark.parametrize("optimizer", META_OPTIMIZERS)
@pytest.mark.parametrize("poison", POISONS)
def test_a_non_finite_objective_is_reported_and_moves_nothing(poison, optimizer, before, variant):
    added, learner = POISONS[poison]
    learner = {"make_optimizer": META_OPTIMIZERS[optimizer], **learner}
    sides = []
    for poisoned in (True, False):
        model = conv_net(batch_norm=True)
        opt, meta = prepared(model, learner=learner, variant=variant)
        for i in range(before):
            meta.update(*(batch(model, 10 * i + j) for j in range(3)))
        if poisoned:
            held = everything(model, opt), copy.deepcopy([dict(opt.encoder.state_dict()), meta.state_dict()])
            gates = None if opt.encoder.feature_gates.grad is None else opt.encoder.feature_gates.grad.clone()
            data = [batch(model, 100 + j) for j in range(3)]
            report = meta.update(*((x + value, y) for (x, y), value in zip(data, added, strict=True)))
            assert not report.total.isfinite()
            assert not report.applied
            assert same(everything(model, opt), held[0])
            assert same([dict(opt.encoder.state_dict()), meta.state_dict()], held[1])
            assert same(opt.encoder.feature_gates.grad, gates)
            assert torch.equal(report.log_vars, meta.log_vars)
        report = meta.update(*(batch(model, 200 + j) for j in range(3)))
        assert report.total.isfinite()
        assert report.applied
        sides.append([dict(opt.encoder.state_dict()), meta.state_dict(), vars(report)])
    assert same(*sides)


def test_a_finite_objective_with_a_gradient_that_is_not_finite_moves_nothing():
    """The gradient of a root at zero, of a loss that is zero at the look-ahead."""
    model = nn.ParameterList([nn.Parameter(torch.zeros(5))])
    opt = MetaAdamW(model.named_parameters(), lr=0.1, head_init="xavier")
    loss_fn = lambda m, root: (m[0] - m[0].detach()).square().sum().sqrt() if root else m[0].sum()  # noqa: E731
    meta = MetaLearner(opt, model, loss_fn, objective="loss_decrease")
    before = copy.deepcopy([dict(opt.encoder.state_dict()), meta.state_dict()])
    report = meta.update(False, False, True)
    assert report.total.isfinite()
    assert not report.applied
    assert same([dict(opt.encoder.state_dict()), meta.state_dict()], before)


@pytest.mark.parametrize("variant", ["paper", "released"])
@pytest.mark.parametrize("model", [tied, perceptron], ids=["frozen and unused", "no step at all"])
def test_the_decay_of_a_parameter_without_a_step_is_nothing(model, variant):
    """The released code divides it by 1 - β1^k, which is 0 at k = 0."""
    sides = []
    for weight_decay in (0.5, 0.0):
        net = model()
        named = dict(net.named_parameters())
        steps = 2 if model is tied else 0
        idle = [name for name in named if not steps or name.startswith(("frozen.", "unused."))]
        groups = [{"params": [(name, named[name]) for name in idle], "weight_decay": weight_decay}]
        moving = [(name, p) for name, p in named.items() if name not in idle]
        groups += [{"params": moving, "weight_decay": 0.1}] if moving else []
        opt = MetaAdamW(groups, model=net, head_init="xavier", variant=variant)
        train(net, opt, steps)
        meta = MetaLearner(opt, net, mse, gap_at="lookahead")
        report = meta.update(*(batch(net, 10 + i) for i in range(3)))
        assert report.applied
        assert meta.updates == 1
        sides.append([vars(report), dict(opt.encoder.state_dict())])
    if steps or variant == "released":  # the paper's look-ahead takes a first step
        assert same(*sides)


# ---------------------------------------------------------------------------------------------------------- batches and reports

NONE = {"gradient": (1, 0, 0), "loss_decrease": (0, 1, 0), "gen_gap": (0, 0, 1), "combined": (1, 1, 1)}


@pytest.mark.parametrize("objective", NONE)
def test_terms_that_the_objective_does_not_have_are_none(objective):
    model = perceptron()
    _, meta = prepared(model, learner={"objective": objective, "gap_at": "theta"})
    batches = [batch(model, i) for i in range(2 if objective == "gradient" else 3)]
    report = meta.update(*batches)
    terms = (report.gradient_alignment, report.loss_decrease, report.generalization_gap)
    assert tuple(int(term is not None) for term in terms) == NONE[objective]


def test_equal_dropout_masks_in_the_evaluations_that_are_compared():
    """Without a step, θ′ is θ: the loss does not decrease at all, and the gradients of equal batches are parallel."""
    model = attention(dropout=0.5)
    opt, meta = prepared(model, weight_decay=0.0)
    opt.param_groups[0]["lr"] = 0.0
    data = batch(model, 5)
    report = meta.update(data, data, data)
    assert report.loss_decrease == 0
    assert report.generalization_gap == 0
    squares = torch.zeros(len(opt.groups))
    for number, group in enumerate(opt.groups):
        rng = torch.get_rng_state()
        found = torch.autograd.grad(mse(model, data), group.params)
        torch.set_rng_state(rng)
        squares[number] = sum(g.square().sum() for g in found)
    assert report.gradient_alignment < squares.mean() - 0.2  # a mean alignment weight of 0.5 times cosines of 1
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = mse(model, data)
    assert mse(model, data) != first  # masks do matter
    torch.set_rng_state(state)


def updated(batches, **options):
    model = perceptron(torch.float64)
    opt = make(model)
    opt.encoder.double()
    train(model, opt, 2)
    meta = MetaLearner(opt, model, mse, gap_at="lookahead", **options)
    report = meta.update(*batches)
    return opt.encoder.state_dict() | {"log_vars": report.log_vars, "total": report.total}


def test_micro_batches_count_as_one():
    whole = [(noise((8, 6), i, torch.float64), noise((8, 3), 10 + i, torch.float64)) for i in range(3)]
    halves = [MicroBatches([(x[:4], y[:4]), (x[4:], y[4:])]) for x, y in whole]
    sgd = {"make_optimizer": torch.optim.SGD, "lr": 1.0}
    actual, expected = updated(halves, **sgd), updated(whole, **sgd)
    assert all(relative(actual[name], expected[name]) < 1e-12 for name in expected)
    first = updated([half[0] for half in halves], **sgd)
    assert any(relative(first[name], expected[name]) > 1e-6 for name in expected)


def test_a_list_is_a_batch():
    """DataLoaders collate to lists."""
    model = perceptron(torch.float64)
    batches = [batch(model, i) for i in range(3)]
    assert same(dict(updated([list(data) for data in batches])), dict(updated(batches)))


@pytest.mark.parametrize("rate", [100.0, -100.0])
def test_log_variances_are_clamped(rate):
    model = perceptron()
    _, meta = prepared(
        model, learner={"make_optimizer": lambda params, lr: torch.optim.SGD(params, lr=lr, maximize=rate < 0), "lr": 100.0}
    )
    report = meta.update(*(batch(model, i) for i in range(3)))
    assert meta.log_vars.abs().max() == 4
    assert torch.equal(report.log_vars, meta.log_vars)


def test_a_group_that_comes_after_the_learner():
    model = perceptron()
    opt, meta = prepared(model)
    batches = [batch(model, i) for i in range(3)]
    meta.update(*batches)
    model.layers.append(nn.Linear(12, 12))
    opt.add_param_group({"params": [(f"late.{name}", p) for name, p in model.layers[-1].named_parameters()]})
    start = [p.detach().clone() for p in opt.encoder.group_embeddings]
    for _ in range(3):
        report = meta.update(*batches)
    assert report.lr_scale.shape == (len(opt.groups),) == (len(start),)
    assert not any(torch.equal(p, x) for p, x in zip(opt.encoder.group_embeddings, start, strict=True))


@pytest.mark.parametrize("hvp", ["exact", "finite_difference"])
@pytest.mark.parametrize("variant", ["paper", "released"])
def test_parameters_outside_the_model_and_frozen_ones(variant, hvp):
    """A factor of the loss, in a group that came after the learner; a layer frozen after two steps, which the released θ′ moves."""
    model, factor = perceptron(), nn.Parameter(torch.ones(()))
    loss_fn = lambda m, data: factor * mse(m, data)  # noqa: E731
    opt = make(model, variant=variant)
    meta = MetaLearner(opt, model, loss_fn, gap_at="lookahead", hvp=hvp)
    opt.add_param_group({"params": [("factor", factor)], "lr": 0.1})
    for step in range(2):
        opt.zero_grad()
        loss_fn(model, batch(model, step)).backward()
        opt.step()
    model.layers[0].requires_grad_(False)
    before, factor_before = everything(model, opt), [factor.detach().clone(), factor.grad.clone()]
    meta.update(*(batch(model, 10 + i) for i in range(3)))
    assert same(everything(model, opt), before)
    assert same([factor.detach(), factor.grad], factor_before)


# ------------------------------------------------------------------------------------------------------ where the scales go

PULLS = {  # lr, weight decay, start, which scale moves up or down: half the squared distance to 1
    "too small an lr": (1e-3, 0.0, 0.0, 0, 1),
    "too large an lr": (1.9, 0.0, 0.0, 0, -1),
    "a decay away from the minimum": (1e-2, 5.0, 0.9, 1, -1),
    "a decay towards the minimum": (1e-2, 5.0, 2.0, 1, 1),
}


@pytest.mark.parametrize("name", PULLS)
def test_the_loss_decrease_moves_the_scales(name):
    lr, weight_decay, start, row, direction = PULLS[name]
    model = nn.ParameterList([nn.Parameter(torch.full((5,), start))])
    opt = MetaAdamW(model.named_parameters(), lr=lr, weight_decay=weight_decay)
    meta = MetaLearner(opt, model, lambda m, target: 0.5 * (m[0] - target).square().sum(), objective="loss_decrease", lr=1e-2)
    target = torch.ones(5)
    reports = [meta.update(target, target, target) for _ in range(60)]
    scales = torch.stack([torch.stack([r.lr_scale, r.wd_scale])[:, 0] for r in reports])[:, row]
    assert scales[0] == 1  # the identity start
    assert (scales[-1] - 1) * direction > 0.2
    assert reports[-1].loss_decrease < reports[0].loss_decrease
