"""Hessian-vector products: central differences against the exact ones, and models that have no exact one."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from metaadamw_fast import MetaAdamW, MetaLearner, MicroBatches
from metaadamw_fast.evaluation import Evaluation

from .models import attention, batch, conv_net, lstm, make, mse, noise, one_thread, perceptron, relative, seeded, train  # noqa: F401
from .test_meta import Recorder
from .test_meta_state import everything, same


class SiluNet(nn.Module):
    shape = (4, 3, 8, 8)

    def __init__(self):
        super().__init__()
        self.conv1, self.bn, self.conv2 = nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 3, stride=2)
        self.out = nn.Linear(4, 3)

    def forward(self, x):
        return self.out(F.silu(self.conv2(F.silu(self.bn(self.conv1(x))))).mean((2, 3)))


class Language(nn.Module):
    """An embedding whose weight is the head's too; targets are its own tokens."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.hidden = nn.Linear(8, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.head(torch.tanh(self.hidden(self.embed(tokens))))


class ReluNet(nn.Module):
    shape = (32, 6)

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 3))

    def forward(self, x):
        return self.layers(x)


silu_net, language, relu_net = (seeded(kind) for kind in (SiluNet, Language, ReluNet))


def next_token(model, data):
    return F.cross_entropy(model(data[:, :-1]).flatten(0, 1), data[:, 1:].flatten())


def tokens(seed):
    return torch.randint(0, 11, (6, 9), generator=torch.Generator().manual_seed(seed))


def gradients(build, hvp, loss_fn=mse, data=batch, steps=3, dtype=torch.float32, **options):
    """What the meta-optimizer gets from one update, as one vector, and the Hessian product in it, of which most parts are small."""
    name = "exact_product" if hvp == "exact" else "difference_product"
    original, products = getattr(Evaluation, name), []

    def product(*arguments, **keywords):
        products.append(original(*arguments, **keywords))
        return products[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Evaluation, name, product)
        gradient = _gradients(build, hvp, loss_fn, data, steps, dtype, **options)
    (found,) = products
    return gradient, torch.cat([x.flatten() for x in found if x is not None])


def _gradients(build, hvp, loss_fn, data, steps, dtype, **options):
    model = build(dtype)
    opt = make(model, lr=1e-2)
    for step in range(steps):
        opt.zero_grad()
        loss_fn(model, data(model, step)).backward()
        opt.step()
    opt.encoder.to(dtype)
    meta = MetaLearner(opt, model, loss_fn, objective="gradient", encoder_decay=0.0, make_optimizer=Recorder, hvp=hvp, **options)
    before = everything(model, opt)
    meta.update(*(data(model, 50 + i) for i in range(3)))
    assert same(everything(model, opt), before)
    return torch.cat([x.flatten() for x in meta.meta_optimizer.seen if x is not None])


SMOOTH = {
    "attention, GELU": {"build": attention},
    "convolution, batch norm, SiLU": {"build": silu_net},
    "lstm": {"build": lstm},
    "perceptron, tanh": {"build": perceptron},
    "embedding, tied head": {"build": language, "loss_fn": next_token, "data": lambda _, seed: tokens(seed)},
}


@pytest.mark.parametrize("name", SMOOTH)
def test_differences_of_smooth_models(name):
    for exact, difference in zip(*(gradients(hvp=hvp, **SMOOTH[name]) for hvp in ("exact", "finite_difference")), strict=True):
        assert exact.norm() > 0
        assert relative(difference, exact) <= 1e-2
        assert F.cosine_similarity(difference, exact, dim=0) >= 0.999


@pytest.mark.parametrize("name", ["attention, GELU", "perceptron, tanh"])
def test_differences_in_float64(name):
    exact, difference = (gradients(hvp=hvp, dtype=torch.float64, **SMOOTH[name])[1] for hvp in ("exact", "finite_difference"))
    assert 0 < relative(difference, exact) <= 1e-6


def test_differences_of_kinked_models():
    """ReLU: some inputs change sides within the difference, which no second derivative sees. The README names the error.

    The product itself may be off by its own size; it is a small part of the encoder's gradient.
    """
    exact, difference = (gradients(relu_net, hvp)[0] for hvp in ("exact", "finite_difference"))
    assert 1e-3 < relative(difference, exact) <= 0.1


def test_an_objective_without_alignment_needs_no_product():
    """Two evaluations less, so finite differences and exact products are the same numbers."""
    results = []
    for hvp in ("exact", "finite_difference"):
        model = perceptron()
        calls = []

        def loss_fn(model, data, calls=calls):
            calls.append(1)
            return mse(model, data)

        opt = make(model)
        train(model, opt, 2)
        meta = MetaLearner(opt, model, loss_fn, objective="loss_decrease", hvp=hvp)
        meta.update(*(batch(model, i) for i in range(3)))
        results.append([dict(opt.encoder.state_dict()), len(calls)])
    assert same(*results)
    assert results[0][1] == 3


# ----------------------------------------------------------------------------------------- models without a second derivative


class Checkpointed(nn.Module):
    shape = (8, 6)

    def __init__(self, reentrant):
        super().__init__()
        self.first, self.second, self.reentrant = nn.Linear(6, 6), nn.Linear(6, 3), reentrant
        self.drop = nn.Dropout(0.3)

    def forward(self, x):
        x = torch.tanh(self.first(x))
        return checkpoint(lambda y: torch.tanh(self.second(self.drop(y))), x, use_reentrant=self.reentrant)


class FlashAttention(nn.Module):
    shape = (4, 5, 6)

    def __init__(self):
        super().__init__()
        self.attn_in, self.out = nn.Linear(6, 18), nn.Linear(6, 3)

    def forward(self, x):
        q, k, v = self.attn_in(x).view(*x.shape[:2], 3, 2, 3).permute(2, 0, 3, 1, 4)
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            mixed = F.scaled_dot_product_attention(q, k, v)
        return self.out(mixed.transpose(1, 2).flatten(2)).mean(1)


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.sin(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return gradient * torch.cos(ctx.saved_tensors[0])


class OnceDifferentiable(nn.Module):
    shape = (8, 6)

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.second(Once.apply(self.first(x)))


WITHOUT = {
    "checkpoint, reentrant": (lambda: Checkpointed(True), r"incompatible with \.grad\(\)"),
    "flash attention": (FlashAttention, "is not implemented"),
    "once differentiable": (OnceDifferentiable, "once_differentiable"),
}


@pytest.mark.parametrize("name", WITHOUT)
def test_auto_takes_differences_and_says_so_once(name):
    build, message = WITHOUT[name]
    torch.manual_seed(0)
    model = build()
    opt = make(model)
    train(model, opt, 2)
    batches = [batch(model, 50 + i) for i in range(3)]
    exact = MetaLearner(*copied(model, opt), mse, hvp="exact")
    with pytest.raises(RuntimeError, match=message):
        exact.update(*batches)
    auto, difference = (MetaLearner(*copied(model, opt), mse, hvp=hvp) for hvp in ("auto", "finite_difference"))
    before = everything(auto.model, auto.optimizer)
    with pytest.warns(UserWarning, match="no exact second derivative.*central differences") as caught:
        report = auto.update(*batches)
    assert len([w for w in caught if "central differences" in str(w.message)]) == 1
    assert report.total.isfinite()
    assert same(everything(auto.model, auto.optimizer), before)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*central differences")
        other = difference.update(*batches)
        assert same(vars(report), vars(other))
        assert same(vars(auto.update(*batches)), vars(difference.update(*batches)))


def copied(model, opt):
    """The optimizer and a copy of its model, which belong together."""
    model, opt = copy.deepcopy((model, opt))
    return opt, model


@pytest.mark.parametrize("variant", ["paper", "released"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_changes_no_number(reentrant, variant):
    torch.manual_seed(0)
    model = Checkpointed(reentrant)
    opt = make(model, variant=variant)
    train(model, opt, 2)
    plain_opt, plain = copied(model, opt)
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        q.grad = p.grad  # what the released code takes its features from; deepcopy leaves it out
    plain.forward = lambda x: torch.tanh(plain.second(plain.drop(torch.tanh(plain.first(x)))))
    batches = [batch(model, 50 + i) for i in range(3)]
    reports = [MetaLearner(o, m, mse, hvp="finite_difference").update(*batches) for o, m in ((opt, model), (plain_opt, plain))]
    assert same(*map(vars, reports))


def test_a_gradient_that_is_not_the_optimizer_s_stays_what_it_is():
    """Reentrant checkpointing hands gradients to `.grad`, to that of every parameter."""
    model = Checkpointed(True)
    opt = MetaAdamW(model.first.parameters())
    mse(model, batch(model, 0)).backward()
    gradients = [(p, p.grad, p.grad.clone()) for p in model.parameters()]
    MetaLearner(opt, model, mse, hvp="finite_difference").update(*(batch(model, 50 + i) for i in range(3)))
    assert all(p.grad is g and torch.equal(g, x) for p, g, x in gradients)


@pytest.mark.parametrize("hvp", ["exact", "finite_difference"])
def test_a_loss_that_depends_on_no_parameter_of_the_optimizer(hvp):
    model = perceptron()
    opt = MetaAdamW([nn.Parameter(torch.ones(2)), *model.out.parameters()], head_init="xavier")
    model.unused = opt.param_groups[0]["params"][0]
    report = MetaLearner(opt, model, lambda m, data: m.layers[0](data[0]).square().mean(), hvp=hvp).update(
        *(batch(model, 50 + i) for i in range(3))
    )
    assert report.gradient_alignment == report.loss_decrease == 0


def test_a_compiled_model():
    """Through AOT autograd, whose backward has no backward."""
    model = perceptron()
    opt = make(model)
    compiled = torch.compile(model, backend="aot_eager")
    train(model, opt, 2)
    batches = [batch(model, 50 + i) for i in range(3)]
    plain_opt, plain = copied(model, opt)
    with pytest.warns(UserWarning, match="no exact second derivative .*create_graph=False"):
        report = MetaLearner(opt, model, lambda _, data: F.mse_loss(compiled(data[0]), data[1])).update(*batches)
    other = MetaLearner(plain_opt, plain, mse, hvp="finite_difference").update(*batches)
    assert relative(report.total, other.total) < 1e-5


@pytest.mark.parametrize("hvp", ["exact", "finite_difference"])
def test_autocast_around_the_update_sees_the_parameters_of_the_moment(hvp):
    """The cache of autocast holds low-precision copies of the parameters; a look-ahead must not be evaluated with the old ones."""
    reports = []
    for around in (True, False):
        model = perceptron()
        opt = make(model)
        train(model, opt, 2)
        batches = [batch(model, 50 + i) for i in range(3)]

        def loss_fn(model, data, around=around):
            with torch.autocast("cpu", torch.bfloat16, enabled=True, cache_enabled=around):
                return mse(model, data).float()

        meta = MetaLearner(opt, model, loss_fn, hvp=hvp)
        with torch.autocast("cpu", torch.bfloat16, enabled=around):
            mse(model, batches[0])  # fills the cache
            reports.append(meta.update(*batches))
    assert relative(reports[0].total, reports[1].total) < 1e-3
    assert reports[0].loss_decrease != 0


@pytest.mark.parametrize("hvp", ["exact", "finite_difference"])
def test_micro_batches_are_one_batch(hvp):
    def run(split):
        model = perceptron()
        opt = make(model)
        train(model, opt, 2)
        batches = [batch(model, 50 + i) for i in range(3)]
        if split:
            batches = [MicroBatches([tuple(x[:4] for x in data), tuple(x[4:] for x in data)]) for data in batches]
        return MetaLearner(opt, model, mse, hvp=hvp).update(*batches)

    torch.testing.assert_close(vars(run(False)), vars(run(True)), rtol=1e-4, atol=1e-6)


class Scaler:
    """Of a GradScaler what the learner asks."""

    def get_scale(self):
        return 2.0**12


def test_a_scaler_keeps_float16_gradients():
    """Gradients of 1e-9 are zeros in float16 without it."""

    def run(scaler):
        model = perceptron()
        opt = make(model)
        train(model, opt, 2)
        seen = []

        class Half(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return x.clone()

            @staticmethod
            def backward(ctx, gradient):
                seen.append(gradient.abs().max().item())
                return gradient.half().float()

        loss_fn = lambda m, data: Half.apply(m(data[0]) * 1e-8).square().mean() + Half.apply(m(data[0])).mean() * 1e-9  # noqa: E731
        meta = MetaLearner(opt, model, loss_fn, hvp="finite_difference", scaler=scaler, encoder_decay=0.0)
        return meta.update(*(batch(model, 50 + i) for i in range(3)))

    assert run(None).gradient_alignment == 0
    assert run(Scaler()).gradient_alignment != 0


# ----------------------------------------------------------------------------------------------------------------- every steps


def test_every_few_steps_with_loaders_that_begin_again():
    def run(by_hand):
        model = perceptron()
        opt = make(model)
        meta = MetaLearner(opt, model, mse)
        train_batches, val_batches = [batch(model, 20 + i) for i in range(3)], [batch(model, 30)]
        reports = []
        after_step = meta.every(2, train_batches, val_batches, warm_up=3)
        numbers = iter([0, 1, 2, 0, 1, 2])
        for step in range(1, 9):
            train(model, opt, 1, step)
            if by_hand and step in (4, 6, 8):
                reports.append(meta.update(train_batches[next(numbers)], train_batches[next(numbers)], val_batches[0]))
            elif not by_hand:
                report = after_step()
                assert (report is not None) == (step in (4, 6, 8))
                reports += [] if report is None else [report]
        return [vars(report) for report in reports]

    assert same(run(True), run(False))


def test_every_without_batches():
    model = perceptron()
    opt = make(model)
    meta = MetaLearner(opt, model, mse, objective="gradient")
    with pytest.raises(ValueError, match="Invalid steps: 0"):
        meta.every(0, [])
    few, enough = meta.every(1, iter([batch(model, 0)])), meta.every(1, [batch(model, 0)])
    train(model, opt, 1)
    with pytest.raises(ValueError, match="train has no more batches"):
        few()
    assert enough().generalization_gap is None


def updates_of(model, opt, after_step, skipped):
    """Trains for as many steps, of which a GradScaler skips some; the steps after which an update came."""
    seen = []
    for step, skip in enumerate(skipped):
        opt.found_inf = torch.tensor(float(skip))
        train(model, opt, 1, step)
        del opt.found_inf
        if after_step() is not None:
            seen.append(step)
    return seen


@pytest.mark.parametrize("readable", [True, False], ids=["count on the host", "count on a device"])
def test_every_follows_the_count_of_the_optimizer(monkeypatch, readable):
    """Neither skipped steps nor a checkpoint that is loaded later shift it; a skipped step after an update brings no second one."""
    if not readable:
        monkeypatch.setattr("metaadamw_fast.core.devices.readable", lambda x: False)
    model = perceptron()
    opt = make(model)
    after_step = MetaLearner(opt, model, mse).every(3, [batch(model, 20)], [batch(model, 30)], warm_up=1)
    start = copy.deepcopy(opt.state_dict())
    assert updates_of(model, opt, after_step, [0, 1, 1, 0, 0, 1, 1, 0, 0, 1, 0]) == [4, 10]
    assert opt.steps_done == 6
    at_six = copy.deepcopy(opt.state_dict())
    assert updates_of(model, opt, after_step, [0]) == []
    opt.load_state_dict(start)
    assert updates_of(model, opt, after_step, [0, 0, 0, 0]) == [2]
    opt.load_state_dict(at_six)  # its update has been made
    assert updates_of(model, opt, after_step, [1, 1, 0, 0, 0]) == [4]
    opt.steps_done = 29
    assert updates_of(model, opt, after_step, [1, 0, 0]) == [1]
    resumed = MetaLearner(opt, model, mse).every(31, [batch(model, 20)], [batch(model, 30)])  # made at 31
    assert updates_of(model, opt, resumed, [1, 0]) == []


def test_every_where_some_steps_are_followed_by_no_call():
    model = perceptron()
    opt = make(model)
    after_step = MetaLearner(opt, model, mse).every(4, [batch(model, 20)], [batch(model, 30)])
    for count, due in ((3, False), (3, True), (1, False), (1, True), (9, True)):  # 3, 6, 7, 8, 17
        train(model, opt, count)
        assert (after_step() is not None) == due


@pytest.mark.parametrize("called", [True, False], ids=["step", "replay"])
def test_every_waits_for_the_device_only_where_an_update_may_be_due(monkeypatch, called):
    """A replay of a captured step runs no Python."""
    model = perceptron()
    opt = make(model)
    after_step = MetaLearner(opt, model, mse).every(4, [batch(model, 20)], [batch(model, 30)])
    read, waits = MetaAdamW.steps_done.fget, []
    monkeypatch.setattr(MetaAdamW, "steps_done", property(lambda opt: waits.append(0) or read(opt)))
    for step in range(1, 13):
        train(model, opt, 1, step)
        opt.step_calls -= not called
        updates = after_step() is not None
        assert updates == (step % 4 == 0)
        assert len(waits) == step // 4


def test_several_param_groups_frozen_and_unused_parameters():
    model = perceptron()
    model.unused = nn.Linear(2, 2)
    model.norm.bias.requires_grad_(False)
    entries = [{"params": list(part.parameters())} for part in (model.layers, model.norm, model.out, model.unused)]
    entries[0]["weight_decay"] = 0.3
    opt = MetaAdamW(entries, lr=1e-2, head_init="xavier")
    data = [(noise((8, 6), i), noise((8, 3), i + 10)) for i in range(3)]
    for hvp in ("exact", "finite_difference"):
        before = everything(model, opt)
        assert MetaLearner(opt, model, mse, hvp=hvp).update(*data).total.isfinite()
        assert same(everything(model, opt), before)
