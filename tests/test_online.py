"""Online learning, docs/algorithm.md section 13: what a step learns of the last one, against autograd through that update."""

import math

import pytest
import torch
from torch import nn

from metaadamw_fast import MADA, MetaAdamW, MetaLearner, OnlineLearner
from metaadamw_fast.core import devices

from .models import noise

SHAPES = {"a.weight": (3, 4), "a.bias": (3,), "b.weight": (2, 3), "c.weight": (5,)}
RATE, DECAY = 0.05, 0.4
FREELY = (math.log(64.0), 0.0)  # down, too


def group_of(name, _):
    return name[0]


def build(policy="scales", backend="reference", dtype=torch.float64, learner=(), every_group=(), **options):
    """Four tensors in three groups, of two param groups."""
    params = {name: nn.Parameter(noise(shape, i).to(dtype)) for i, (name, shape) in enumerate(SHAPES.items())}
    named = list(params.items())
    groups = [{"params": named[:2], **dict(every_group)}, {"params": named[2:], "lr": 0.03, "betas": (0.7, 0.9)}]
    opt = MetaAdamW(groups, lr=0.1, weight_decay=DECAY, grouping=group_of, backend=backend, head_init="xavier", **options)
    opt.encoder.double()
    rate = {"rate": RATE} if "rate" not in dict(learner) and "lr" not in dict(learner) else {}
    freely = {"range": FREELY} if policy == "scales" else {}
    return params, opt, OnlineLearner(opt, policy=policy, **{**freely, **rate, **dict(learner)})


def test_no_scale_falls_below_one_by_default():
    """Its interval is what the learner's ``range`` says; a number is one around 0."""
    ends = {}
    for name, options in {"default": {}, "around 1": {"range": (0.2, 0.0)}, "pair": {"range": ((-0.1, 0.3), 0.0)}}.items():
        p = nn.Parameter(torch.ones(4))
        opt = MetaAdamW([p], lr=0.01)
        OnlineLearner(opt, rate=0.5, **options)
        seen = []
        for step in range(12):
            p.grad = torch.full((4,), 1.0 if step < 6 else -3.0)
            opt.step()
            seen.append(opt.lr_scale.item())
        ends[name] = (min(seen), max(seen))
    assert ends["default"][0] == 1
    assert ends["default"][1] > math.exp(1.0)
    assert ends["around 1"] == pytest.approx((math.exp(-0.2), math.exp(0.2)))
    assert ends["pair"] == pytest.approx((math.exp(-0.1), math.exp(0.3)))


def put_gradients(params, step, scale=1.0):
    for i, p in enumerate(params.values()):
        p.grad = (noise(p.shape, 100 * step + i) * scale).to(p)


class Moves:
    """What a step of ``opt`` did, as autograd sees it: p = d·p_t - a·u with u of the moments that it left."""

    def __init__(self, params, opt, before):
        self.opt, self.before, self.released = opt, before, opt.variant == "released"
        self.scales = opt._scales[:2].double().clone()
        self.lr = [g["lr"] for g in opt.param_groups for _ in g["params"]]
        self.decay = [g["weight_decay"] for g in opt.param_groups for _ in g["params"]]
        self.u, self.correction = [], []
        for p, group in ((p, g) for g in opt.param_groups for p in g["params"]):
            state, (beta1, beta2) = opt.state[p], group["betas"]
            k = float(state["step"])
            v = state.get("max_exp_avg_sq", state["exp_avg_sq"])
            self.u.append((state["exp_avg"] / (1 - beta1**k)) / ((v / (1 - beta2**k)).sqrt() + group["eps"]))
            self.correction.append(1 - beta1**k)

    def derivative(self, params, teaches, by="scales"):
        """Of Σ⟨g, p⟩, [2, G], by autograd through the update."""
        scales = self.scales.clone().requires_grad_()
        total = scales.sum() * 0
        for t, (name, p) in enumerate(params.items()):
            if name not in teaches or p.grad is None:
                continue
            g = "abc".index(name[0])
            decay = self.lr[t] * scales[0, g] * (scales[1, g].detach() if self.released else scales[1, g]) * self.decay[t]
            decay = decay / self.correction[t] if self.released else decay
            kept = (1 - decay).clamp(min=0.5) if self.opt.clamps_decay else 1 - decay
            sign = -1.0 if self.opt.param_groups[t // 2]["maximize"] else 1.0
            p_next = kept * self.before[name] - self.lr[t] * scales[0, g] * self.u[t]
            torch.testing.assert_close(p_next, p, rtol=1e-12, atol=1e-14)  # it is the update that was made
            total = total + sign * (p.grad * p_next).sum()
        return torch.autograd.grad(total, scales)[0] * (self.scales if by == "logs" else 1)


def clones(params):
    return {name: p.detach().clone() for name, p in params.items()}


OPTIONS = {
    "plain": {},
    "amsgrad": {"amsgrad": True},
    "maximize, of one group": {"every_group": {"maximize": True}},
    "released": {"variant": "released"},
    "clipped": {"max_grad_norm": 0.1},
    "enhanced": {"features": "enhanced"},
}


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("statistics", ["exact", "lagged"])
@pytest.mark.parametrize("name", OPTIONS)
def test_scales_learn_from_the_derivative_of_the_loss(name, statistics, backend):
    """By the last step's lr, while a schedule changes it; both scales, and the decay factor clamped in group a."""
    learner = {"gradient": "loss", "trace": 0, "range": (1.0, 0.5), "rate": 0.2}
    params, opt, learner = build(backend=backend, statistics=statistics, learner=learner, **OPTIONS[name])
    moves, bounded, clamped = None, False, False
    log_scales = used = torch.zeros(2, 3, dtype=torch.float64)
    for step in range(8):
        opt.param_groups[0]["lr"] = 3.0 if step in (3, 4) else 0.1 / (step + 1)
        put_gradients(params, step)
        before = clones(params)
        if moves is not None:
            derivative = moves.derivative(params, SHAPES, by="logs")
            bounds = torch.tensor([[1.0], [0.5]], dtype=torch.float64)
            log_scales = (log_scales - 0.2 * derivative).minimum(bounds).maximum(-bounds)
        opt.step()
        used, shown = log_scales, used if statistics == "lagged" else log_scales
        torch.testing.assert_close(opt._scales[:2], shown.exp(), rtol=1e-9, atol=1e-12)
        moves = Moves(params, opt, before)
        bounded |= bool((log_scales[0].abs() == 1).any())
        clamped |= bool((opt._last.numbers[5] == 0.5).any())
    assert (opt.lr_scale != 1).all()
    assert (opt.wd_scale != 1).all() == (name != "released")
    assert bounded
    assert clamped


@pytest.mark.parametrize("statistics", ["exact", "lagged"])
@pytest.mark.parametrize("name", OPTIONS)
def test_the_encoder_learns_from_the_derivative_of_the_loss(name, statistics):
    """One step of SGD down the gradient that autograd takes through encoder and update at once."""
    options = {"gradient": "loss", "trace": 0, "make_optimizer": torch.optim.SGD, "lr": 0.3}
    params, opt, _ = build("encoder", statistics=statistics, learner=options, **OPTIONS[name])
    moves = None
    for step in range(5):
        put_gradients(params, step)
        before, features, scales = clones(params), opt.features.clone(), opt._scales.clone()
        expected = [p.detach().clone() for p in opt.encoder.parameters()]
        from_encoder = statistics == "exact" or step > 1
        if moves is not None and from_encoder:
            again = opt.encoder(opt.encoder.embed(features))
            torch.testing.assert_close(again, scales) if statistics == "exact" and step == 1 else None
            of_scales = torch.zeros_like(again)
            of_scales[:2] = moves.derivative(params, SHAPES)
            grads = torch.autograd.grad(again, list(opt.encoder.parameters()), of_scales, allow_unused=True)
            expected = [p if g is None else p - 0.3 * g for p, g in zip(expected, grads, strict=True)]
            assert any(g is not None and g.abs().max() > 1e-8 for g in grads)
        opt.step()
        for p, q in zip(opt.encoder.parameters(), expected, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-13)
        moves = Moves(params, opt, before)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("statistics", ["exact", "lagged"])
@pytest.mark.parametrize("trace", [0.0, 0.8])
@pytest.mark.parametrize("gradient", ["cosine", "loss"])
def test_scales_learn_from_the_moves_before(gradient, trace, statistics, backend):
    """h = Σ trace^k·(the move k steps ago); a cosine is of the group's tensors together, and of no length."""
    params, opt, _ = build(
        backend=backend, statistics=statistics, max_grad_norm=0.3, learner={"gradient": gradient, "trace": trace}
    )
    traces = {name: torch.zeros_like(p) for name, p in params.items()}
    log_scale = used = torch.zeros(3, dtype=torch.float64)
    for step in range(7):
        put_gradients(params, step)
        before = clones(params)
        if step:
            for g, letter in enumerate("abc"):
                names = [name for name in params if name[0] == letter]
                grad, h = (torch.cat([xs[n].flatten() for n in names]) for xs in ({n: params[n].grad for n in names}, traces))
                along = grad.dot(h) / (grad.norm() * h.norm() if gradient == "cosine" else 1)
                log_scale = log_scale.clone()
                log_scale[g] -= RATE * along.detach()
        opt.step()
        used, shown = log_scale, used if statistics == "lagged" else log_scale
        torch.testing.assert_close(opt.lr_scale.double(), shown.exp(), rtol=1e-9, atol=1e-12)
        assert (opt.wd_scale == 1).all()
        for name, p in params.items():
            move = p.detach() - before[name]
            traces[name] = trace * traces[name] + move
            if trace:
                torch.testing.assert_close((p - opt.state[p]["ema_param"]) / trace, traces[name], rtol=1e-9, atol=1e-12)
    assert (opt.lr_scale - 1).abs().min() > 1e-4


@pytest.mark.parametrize("statistics", ["exact", "lagged"])
def test_who_did_not_move_or_has_no_gradient_teaches_nothing(statistics):
    params, opt, _ = build(statistics=statistics, learner={"trace": 0.5})
    plans = [{"a.bias"}, {"a.weight", "b.weight"}, set(), {"c.weight"}, {"c.weight"}, set()]
    h = {}
    log_scale = torch.zeros(3, dtype=torch.float64)
    for step, absent in enumerate(plans):
        put_gradients(params, step)
        for name in absent:
            params[name].grad = None
        shown = log_scale.clone()
        for g, letter in enumerate("abc"):
            pairs = [(params[n].grad.flatten(), h[n].flatten()) for n in h if n[0] == letter and n not in absent]
            if pairs:
                grad, along = (torch.cat(xs) for xs in zip(*pairs, strict=True))
                log_scale[g] -= RATE * (grad.dot(along) / (grad.norm() * along.norm())).detach()
        opt.step()
        torch.testing.assert_close(opt.lr_scale.double(), (shown if statistics == "lagged" else log_scale).exp(), rtol=1e-9, atol=0)
        h = {name: (p - opt.state[p]["ema_param"]).detach() for name, p in params.items() if name not in absent}


@pytest.mark.parametrize("statistics", ["exact", "lagged"])
@pytest.mark.parametrize("where", ["host", "device"])
@pytest.mark.parametrize("policy", ["scales", "encoder"])
def test_a_step_that_does_not_count_teaches_nothing(policy, where, statistics, monkeypatch):
    if where == "device":
        monkeypatch.setattr(devices, "readable", lambda x: False)
    runs = [build(policy, statistics=statistics, skip_nonfinite=True, learner={"gradient": "loss"}) for _ in range(2)]
    for step in range(5):
        for number, (params, opt, _) in enumerate(runs):
            if number and step in (1, 3):
                put_gradients(params, 50 + step, math.inf if step == 1 else math.nan)
                opt.step()
            put_gradients(params, step)
            opt.step()
    (params, opt, learner), (theirs, other, others) = runs
    assert other.skipped_steps == 2
    assert all(torch.equal(p, q) for p, q in zip(params.values(), theirs.values(), strict=True))
    assert torch.equal(opt._scales, other._scales)
    assert torch.equal(learner._log_scales, others._log_scales)
    assert not torch.equal(opt.lr_scale, torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("statistics", ["exact", "lagged"])
@pytest.mark.parametrize("gradient", ["cosine", "loss"])
def test_loss_scales_and_clipping_change_nothing_of_what_is_learned(gradient, statistics):
    (params, opt, learner), (scaled, other, others) = (
        build(statistics=statistics, max_grad_norm=clip, learner={"gradient": gradient}) for clip in (None, None)
    )
    for step in range(5):
        put_gradients(params, step)
        put_gradients(scaled, step, 1024.0)
        opt.step()
        other.grad_scale, other.found_inf = torch.tensor(1024.0), torch.tensor(0.0)
        other.step()
    torch.testing.assert_close(learner._log_scales, others._log_scales, rtol=1e-12, atol=1e-14)
    assert learner._log_scales[0].all()


@pytest.mark.parametrize("trace", [0.0, 0.9])
@pytest.mark.parametrize("gradient", ["cosine", "loss"])
def test_who_maximizes_learns_from_the_negative_gradient(gradient, trace):
    results = []
    for sign in (1.0, -1.0):
        options = {"every_group": {"maximize": sign < 0}, "learner": {"gradient": gradient, "trace": trace}}
        params, opt, learner = build(max_grad_norm=1.0, **options)
        for step in range(4):
            put_gradients(params, step)
            for p in opt.param_groups[0]["params"]:
                p.grad *= sign
            opt.step()
        results.append(learner._log_scales)
    assert torch.equal(*results)
    assert results[0][0].all()


@pytest.mark.parametrize("where", ["host", "device"])
@pytest.mark.parametrize("statistics", ["exact", "lagged"])
def test_it_learns_in_every_third_step_only(statistics, where, monkeypatch):
    if where == "device":
        monkeypatch.setattr(devices, "readable", lambda x: False)
    params, opt, learner = build(statistics=statistics, learner={"every": 3})
    before, changed = learner._log_scales.clone(), []
    for step in range(1, 13):
        put_gradients(params, step)
        if step == 7:
            opt.steps_done = 7  # a user's own count
        opt.step()
        changed.append(not torch.equal(learner._log_scales, before))
        before = learner._log_scales.clone()
    assert [i for i, x in enumerate(changed, 1) if x] == [3, 6, 8, 11]  # the 9th and the 12th by the count


def test_a_group_whose_gradient_is_not_finite_learns_nothing_of_it():
    params, opt, learner = build(learner={"gradient": "loss"})
    for step in range(3):
        put_gradients(params, step)
        if step == 2:
            params["b.weight"].grad[0, 0] = math.nan
            before = learner._log_scales.clone()
        opt.step()
    assert torch.equal(learner._log_scales[:, 1], before[:, 1])
    assert (learner._log_scales[0, [0, 2]] != before[0, [0, 2]]).all()
    assert learner._log_scales.isfinite().all()


def test_the_default_meta_optimizer_steps_over_what_is_not_finite():
    params, opt, learner = build("encoder", learner={"gradient": "loss"})
    for step in range(4):
        put_gradients(params, step)
        if step == 2:
            params["b.weight"].grad[0, 0] = math.nan
            before = [p.detach().clone() for p in opt.encoder.parameters()]
        opt.step()
        if step == 2:
            assert all(torch.equal(p, q) for p, q in zip(opt.encoder.parameters(), before, strict=True))
    # The last step learned again, of the groups whose features were finite.
    assert {float(s["step"]) for s in learner.meta_optimizer.state.values()} == {2.0}
    assert all(p.grad is None for p in opt.encoder.parameters())


def test_regularizers_of_the_encoder():
    params, opt, _ = build("encoder", learner={"encoder_decay": 0.1, "make_optimizer": torch.optim.SGD, "trace": 0, "lr": 0.5})
    plain_params, plain, _ = build("encoder", learner={"make_optimizer": torch.optim.SGD, "trace": 0, "lr": 0.5})
    for step in range(2):
        for ps, o in ((params, opt), (plain_params, plain)):
            put_gradients(ps, step)
            head = o.encoder.head.weight.detach().clone()
            o.step()
    torch.testing.assert_close(opt.encoder.head.weight, plain.encoder.head.weight - 0.5 * 0.1 * head / head.norm())


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize(("form", "factor"), [("linear", -0.2), ("log", 0.5)])
def test_the_log_form_clamps_the_decay_factor(form, factor, backend):
    p = nn.Parameter(torch.ones(3, dtype=torch.float64))
    opt = MetaAdamW([p], lr=3.0, weight_decay=0.4, backend=backend)
    opt.encoder.scale_form = form
    p.grad = torch.zeros_like(p)
    opt.step()
    torch.testing.assert_close(p, torch.full_like(p, factor))


def test_beside_a_meta_learner():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()

    def loss_fn(model, x):
        return (model(x) - 1).square().mean()

    for policy in ("encoder", "scales", None):
        opt = MetaAdamW(model.named_parameters(), model=model, features="enhanced", ema_decay=0.9)
        opt.encoder.double()
        if policy is not None:
            OnlineLearner(opt, policy=policy)
        meta = MetaLearner(opt, model, loss_fn)
        for step in range(3):
            opt.zero_grad()
            loss_fn(model, noise((5, 3), step).double()).backward()
            opt.step()
        batches = [noise((5, 3), 10 + i).double() for i in range(3)]
        if policy != "scales":
            assert bool(meta.update(*batches).applied)
        else:
            with pytest.raises(RuntimeError, match="OnlineLearner with policy='scales' sets the scales"):
                meta.update(*batches)


BAD = {
    "policy": ({"policy": "both"}, "Invalid policy"),
    "gradient": ({"gradient": "sign"}, "Invalid gradient"),
    "rate": ({"rate": -1.0}, "Invalid rate"),
    "two rates": ({"rate": 0.1, "lr": 0.1}, "two names of one number"),
    "every": ({"every": 0}, "Invalid every"),
    "trace": ({"trace": 1.0}, "Invalid trace"),
    "another trace": ({"trace": 0.5}, "ema_decay is 0.9"),
    "range": ({"range": (1.0,)}, "Invalid range"),
    "range without 0": ({"range": ((0.1, 1.0), 0.0)}, "Invalid range"),
    "range of an encoder": ({"policy": "encoder", "range": (1.0, 0.0)}, "no use for range"),
    "decay of scales": ({"encoder_decay": 0.1}, "no use for encoder_decay"),
}


@pytest.mark.parametrize("kind", BAD)
def test_arguments_that_cannot_be(kind):
    opt = MetaAdamW([nn.Parameter(torch.ones(3))], ema_decay=0.9)
    options, words = BAD[kind]
    with pytest.raises(ValueError, match=words):
        OnlineLearner(opt, **options)
    OnlineLearner(opt)  # nothing was left behind
    with pytest.raises(ValueError, match="has an OnlineLearner already"):
        OnlineLearner(opt)
    with pytest.raises(ValueError, match="Invalid ema_decay"):
        MetaAdamW([nn.Parameter(torch.ones(3))], ema_decay=1.0)
    with pytest.raises(TypeError, match="got MADA"):
        OnlineLearner(MADA([nn.Parameter(torch.ones(3))]))


def test_it_is_unwrapped():
    opt = MetaAdamW([nn.Parameter(torch.ones(3))])
    OnlineLearner(type("Wrapper", (), {"optimizer": opt})())
    assert opt._learner is not None


@pytest.mark.parametrize("options", [{}, {"amsgrad": True}, {"statistics": "lagged"}, {"max_grad_norm": 0.5}], ids=str)
@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_at_rate_0_it_is_the_optimizer_without_it(backend, options):
    """Bit for bit, of float32 and bfloat16 parameters: the update is AdamW's."""
    for dtype in (torch.float32, torch.bfloat16):
        params = [[nn.Parameter(noise((7, 5), 1).to(dtype)), nn.Parameter(noise((3,), 2).to(dtype))] for _ in range(2)]
        plain, online = (MetaAdamW(ps, lr=0.1, backend=backend, **options) for ps in params)
        if "max_grad_norm" in options:
            plain.encoder.double()  # so that its sums, and with them the factor, are float64, too
        OnlineLearner(online, rate=0.0)
        for step in range(4):
            for ps in params:
                for i, p in enumerate(ps):
                    p.grad = noise(p.shape, 10 * step + i).to(dtype)
            plain.step()
            online.step()
            assert online.statistics.shape == plain.statistics.shape
            assert online.statistics.dtype == torch.float32
            torch.testing.assert_close(online.statistics, plain.statistics.float())
        for p, q in zip(*params, strict=True):
            assert torch.equal(p, q)
            assert torch.equal(plain.state[p]["exp_avg"], online.state[q]["exp_avg"])
            assert online.state[q]["ema_param"].dtype == torch.float32
