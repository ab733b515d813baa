"""What surrounds an optimizer: torch's defaults, copies, compilers, gradients of complex functions. As torch's AdamW there."""

import contextlib
import copy
import importlib.util
import pickle
from collections import defaultdict

import pytest
import torch
import torch.multiprocessing as mp
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from metaadamw_fast import FeatureConfig, MetaAdamW, MetaLearner, ops

from .models import noise, same
from .optimizers import AVGRAD, META, every, every_with

HAS_CPP = ops._unavailable("cpp", torch.device("cpu")) is None


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def loss_fn(model, batch):
    return (model(batch) - 1).square().mean()


def train(model, opt, steps=2):
    for seed in range(steps):
        opt.zero_grad()
        loss_fn(model, noise((5, 6), seed)).backward()
        opt.step()


def assert_same(a, b):
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("statistics", ["exact", "lagged"])
@pytest.mark.parametrize("built", [True, False], ids=["built in it", "called in it"])
def test_inference_mode_around_the_set_up_leaves_nothing_behind(built, statistics):
    """As a set-up function with the wrong decorator: tensors made in inference mode could never be written outside of it."""

    def run(mode):
        model, extra = mlp(), nn.Parameter(torch.ones(3))
        saved = MetaAdamW(mlp().parameters(), head_init="xavier", seed=3, statistics=statistics, skip_nonfinite=True).state_dict()
        with mode(built):
            opt = MetaAdamW(model.parameters(), head_init="xavier", statistics=statistics, skip_nonfinite=True)
            meta = MetaLearner(opt, model, loss_fn)
        for called in (mode(not built), torch.enable_grad()):
            loss_fn(model, noise((5, 6), 0)).backward()
            with called:
                opt.load_state_dict(saved)
                opt.step()
                saved, learned = opt.state_dict(), meta.state_dict()
                meta.load_state_dict(learned)
        with mode(True):
            opt.add_param_group({"params": [extra]})
        train(model, opt)
        with torch.no_grad():
            for x in (*saved["metaadamw"]["encoder"].values(), learned["log_vars"]):
                x.add_(1)  # as torch.distributed.checkpoint loads into what is there
        report = meta.update(*(noise((5, 6), i) for i in range(3)))
        assert report.total.isfinite()
        train(model, opt)
        assert opt.skipped_steps == 0
        return [*model.parameters(), *opt.encoder.parameters(), opt.statistics, opt.lr_scale]

    torch.testing.assert_close(run(torch.inference_mode), run(lambda _: torch.enable_grad()), rtol=0, atol=0)


@pytest.mark.parametrize("built", [True, False], ids=["built in it", "called in it"])
def test_inference_mode_around_the_set_up_of_avgrad(built):
    def run(mode):
        model, extra = mlp(), nn.Parameter(torch.ones(3))
        saved = AVGRAD(mlp().parameters(), skip_nonfinite=True).state_dict()
        with mode(built):
            opt = AVGRAD(model.parameters(), skip_nonfinite=True)
        for called in (mode(not built), torch.enable_grad()):
            loss_fn(model, noise((5, 6), 0)).backward()
            with called:
                opt.load_state_dict(saved)
                opt.step()
                saved = opt.state_dict()
        with mode(True):
            opt.add_param_group({"params": [extra]})
        train(model, opt)
        assert opt.skipped_steps == 0
        return [*model.parameters(), *(x for state in opt.state.values() for x in state.values()), opt.statistics]

    torch.testing.assert_close(run(torch.inference_mode), run(lambda _: torch.enable_grad()), rtol=0, atol=0)


ESTIMATED = {
    "plain": {},
    "AVGrad": {"spec": AVGRAD},
    "AVGrad, clipped": {"spec": AVGRAD, "max_grad_norm": 1.0, "skip_nonfinite": True, "maximize": True},
    "AVGrad, low precision": {"spec": AVGRAD, "dtype": torch.bfloat16, "master_weights": True, "stochastic_rounding": True},
    "lagged, amsgrad": {"statistics": "lagged", "amsgrad": True},
    "clipped, maximize": {"max_grad_norm": 1.0, "maximize": True},
    "enhanced, skipping": {"features": FeatureConfig("enhanced", gating=True), "skip_nonfinite": True},
    "standardized, lr on a device": {"features": "norm_basic_plus", "lr": torch.tensor},
    "low precision": {"dtype": torch.bfloat16, "master_weights": True, "state_dtype": torch.float32, "stochastic_rounding": True},
    "reference": {"backend": "reference", "variant": "released", "total_steps": 9},
}


@pytest.mark.parametrize("name", ESTIMATED)
def test_steps_on_tensors_without_elements(name):
    """As estimators of memory take them: the states are those of a real run, and nothing asks for a number."""

    def run(mode):
        options = dict(ESTIMATED[name])
        spec = options.pop("spec", META)
        dtype = options.pop("dtype", torch.float32)
        with mode:
            model = nn.Sequential(nn.Linear(6, 8, dtype=dtype), nn.Tanh(), nn.Linear(8, 3, dtype=dtype))
            if "lr" in options:
                options["lr"] = options["lr"](0.1)
            opt = spec(model.parameters(), **options)
            for _ in range(3):
                opt.zero_grad()
                loss_fn(model, torch.ones(5, 6, dtype=dtype)).backward()
                opt.step()
            if "skip_nonfinite" in options:  # a GradScaler's
                opt.found_inf, opt.grad_scale = torch.zeros(1), torch.ones(1)
                opt.step()
            opt.add_param_group({"params": [nn.Parameter(torch.ones(3, dtype=dtype))]})
            opt.step()
        made = [model[0].weight, *(getattr(opt, name) for name in spec.shown), *(opt.encoder.parameters() if spec.encodes else ())]
        made += [x for state in opt.state.values() for x in state.values()]
        return made, [list(state) for state in opt.state.values()]

    (real, names), (fake, fake_names) = run(contextlib.nullcontext()), run(FakeTensorMode())
    assert names == fake_names
    assert all(isinstance(x, FakeTensor) for x in fake)
    describe = [[(x.shape, x.stride(), x.dtype, x.device) for x in xs] for xs in (real, fake)]
    assert describe[0] == describe[1]


def negative_view(shape, seed):
    x = torch.complex(noise(shape, seed), noise(shape, seed + 1)).conj().imag
    assert x.is_neg()
    return x


CPP = pytest.mark.skipif(not HAS_CPP, reason="no extension")
KINDS = [pytest.param("cpp", META, marks=CPP), ("reference", META), pytest.param("cpp", AVGRAD, marks=CPP)]


@pytest.mark.parametrize(("backend", "spec"), KINDS, ids=str)
def test_gradients_that_are_negative_views(backend, spec):
    """The C++ ops work on addresses that a launch keeps: not those of torch's copy of such a view, which is gone after the call."""
    runs = []
    for make in (spec.eager, lambda ps, **kw: spec.kind(ps, backend=backend, **spec.plain, **kw)):
        params = [nn.Parameter(noise((300, 400), i)) for i in range(2)]
        opt = make(params, lr=0.1)
        for step in range(4):
            params[0].grad = negative_view((300, 400), 2 * step) if step != 2 else noise((300, 400), step)
            params[1].grad = noise((300, 400), 50 + step)
            opt.step()
            junk = [torch.full((300, 400), 1e3) for _ in range(4)]
        del junk
        runs.append([*params, opt.state[params[0]]["exp_avg"]])
    torch.testing.assert_close(runs[0], runs[1], rtol=1e-6, atol=1e-7)


@every
@pytest.mark.skipif(not HAS_CPP, reason="no extension")
def test_a_parameter_that_is_a_negative_view_is_refused_by_the_kernels(spec):
    p = nn.Parameter(negative_view((4,), 0))
    p.grad = torch.ones(4)
    before = p.detach().clone()
    with pytest.raises(RuntimeError, match="negative view"):
        spec.kind([p], backend="cpp").step()
    assert torch.equal(p, before)


@every
def test_a_copy_does_not_step_the_original_that_a_scheduler_follows(spec):
    model = mlp()
    opt = spec.kind(model.parameters())
    torch.optim.lr_scheduler.StepLR(opt, 3)
    opt.register_step_post_hook(lambda *_: None)
    train(model, opt)
    other, copied = copy.deepcopy((model, opt))
    train(other, copied, 3)
    assert (opt.steps_done, copied.steps_done) == (2, 5)
    assert not copied._optimizer_step_post_hooks
    loaded = pickle.loads(pickle.dumps(opt))
    assert loaded.steps_done == 2


def step_of_a_spawned_avgrad(model, opt, expected):
    torch.set_num_threads(1)
    train(model, opt, 1)
    assert same([*model.parameters()], expected)


def test_an_avgrad_is_sent_to_a_spawned_process():
    model = mlp()
    opt = AVGRAD(model.named_parameters(), max_grad_norm=1.0)
    train(model, opt)
    other_model, other_opt = copy.deepcopy((model, opt))
    train(other_model, other_opt, 1)
    expected = [x.detach() for x in other_model.parameters()]
    process = mp.get_context("spawn").Process(target=step_of_a_spawned_avgrad, args=(model, opt, expected))
    process.start()
    process.join(120)
    assert process.exitcode == 0


def step_of_a_spawned_process(opt, meta, expected):
    """What the parent's copy would do: one step, one meta-update, and an embedding of the encoder's own random numbers."""
    torch.set_num_threads(1)
    model = meta.model
    assert meta.optimizer is opt
    train(model, opt, 1)
    meta.update(*(noise((5, 6), i) for i in range(3)))
    opt.encoder.add_groups(1)
    found = [*model.parameters(), *opt.encoder.parameters()]
    for x, y in zip(found, expected, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("steps", [0, 2])
def test_an_optimizer_is_sent_to_a_spawned_process(steps):
    """As torch's can be. Nothing in it may be made while it is pickled: the child gets the file descriptors of its tensors."""
    model = mlp()
    opt = MetaAdamW(model.named_parameters(), features="enhanced", head_init="xavier")
    meta = MetaLearner(opt, model, loss_fn)
    train(model, opt, steps)
    other_model, other_opt, other_meta = copy.deepcopy((model, opt, meta))
    train(other_model, other_opt, 1)
    other_meta.update(*(noise((5, 6), i) for i in range(3)))
    other_opt.encoder.add_groups(1)
    expected = [x.detach() for x in (*other_model.parameters(), *other_opt.encoder.parameters())]
    process = mp.get_context("spawn").Process(target=step_of_a_spawned_process, args=(opt, meta, expected))
    process.start()
    process.join(120)
    assert process.exitcode == 0


@every
def test_a_copy_of_a_backend_without_a_name_of_its_own(spec):
    """That of Triton is made when it is asked for: no import finds it."""
    model = mlp()
    opt = spec.kind(model.parameters())
    train(model, opt)
    opt._backend = type("Nameless", (opt._backend,), {})
    _, copied = pickle.loads(pickle.dumps((model, opt)))
    assert copied.steps_done == 2
    assert not spec.encodes or copied.lr_scale.tolist() == opt.lr_scale.tolist()


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton")
@every_with({}, MetaAdamW=[{"encoder_graph": True}])
def test_a_pickle_of_an_optimizer_with_triton(monkeypatch, spec, options):
    """Triton's backend is made when it is asked for. Nothing is launched here, so it may stand for the tensors of the CPU, too."""
    monkeypatch.setattr(ops, "_unavailable", lambda name, device: None)
    model = mlp()
    opt = spec(model.named_parameters(), backend="triton", **options)
    assert opt._backend.name == "triton"
    meta = MetaLearner(opt, model, loss_fn) if spec.encodes else None
    _, loaded, learner = pickle.loads(pickle.dumps((model, opt, meta)))
    assert not spec.encodes or learner.optimizer is loaded
    loaded._current_states()
    assert loaded._backend is opt._backend
    assert same(loaded.state_dict(), opt.state_dict())


@every
def test_another_state_and_other_param_groups(spec):
    """Replaced, not changed: how people reset the moments."""
    runs = []
    for make in (spec.eager, lambda ps, **kw: spec.kind(ps, **spec.plain, **kw)):
        model, other = mlp(), mlp()
        opt = make(list(model.parameters()), lr=0.1)
        train(model, opt)
        opt.state = defaultdict(dict)
        train(model, opt, 1)
        assert [float(x["step"]) for x in opt.state.values()] == [1.0] * 4
        opt.param_groups = [{**group, "params": list(other.parameters()), "amsgrad": True} for group in opt.param_groups]
        train(other, opt, 1)
        assert spec is not META or all("max_exp_avg_sq" in opt.state[p] for p in other.parameters())
        runs.append((model, other))
    for a, b in zip(*runs, strict=True):
        assert_same(a, b)


@every
def test_a_compiled_step_is_the_step(spec):
    model, other = mlp(), mlp()
    opt, compiled = (spec(m.parameters(), lr=0.1) for m in (model, other))
    step = torch.compile(lambda: compiled.step(), backend="eager")
    for seed in range(3):
        for m in (model, other):
            m.zero_grad()
            loss_fn(m, noise((5, 6), seed)).backward()
        opt.step()
        step()
    assert compiled.steps_done == 3
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_avgrad_is_the_same_whatever_the_default_dtype(dtype):
    runs = []
    for default in (torch.get_default_dtype(), dtype):
        before = torch.get_default_dtype()
        torch.set_default_dtype(default)
        try:
            params = [nn.Parameter(noise((5, 4), 0)), nn.Parameter(noise((3,), 1, torch.bfloat16))]
            opt = AVGRAD(params, skip_nonfinite=True, max_grad_norm=1.0)
            for step in range(3):
                for i, p in enumerate(params):
                    p.grad = noise(p.shape, 10 * step + i, p.dtype)
                opt.step()
        finally:
            torch.set_default_dtype(before)
        runs.append([*params, *(x for p in params for x in opt.state[p].values()), opt.grad_norm])
    assert same(*runs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_encoder_is_float32_whatever_the_default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        model = nn.Linear(6, 3)
        opt = MetaAdamW(model.parameters(), features="enhanced", grouping="param_groups", skip_nonfinite=True)
        model(noise((2, 6), 0).to(dtype)).sum().backward()
        opt.step()
    finally:
        torch.set_default_dtype(before)
    assert model.weight.dtype == dtype
    assert {x.dtype for x in opt.encoder.state_dict().values()} == {torch.float32}
    assert opt.lr_scale.dtype == torch.float32


@every
def test_a_default_device_is_not_where_the_optimizer_goes(spec):
    model = mlp()
    with torch.device("meta"):
        opt = spec.kind(model.parameters(), skip_nonfinite=True, **({"features": "enhanced"} if spec.encodes else {}))
    train(model, opt)
    assert opt.steps_done == 2
    with torch.device("meta"):
        opt = spec.kind(mlp().parameters())
    assert not spec.encodes or opt.encoder.head.weight.device.type == "cpu"
    assert opt.statistics.device.type == "cpu"


class Masked(nn.Module):
    """With a buffer that is saved for the backward pass, and one whose elements share memory."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 3)
        self.register_buffer("factor", torch.full((3,), 2.0))
        self.register_buffer("mask", torch.ones(1).expand(3))

    def forward(self, x):
        return self.linear(x) * self.factor * self.mask


def test_a_meta_update_between_a_forward_and_its_backward():
    torch.manual_seed(0)
    model = Masked()
    opt = MetaAdamW(model.parameters(), head_init="xavier")
    meta = MetaLearner(opt, model, loss_fn)
    train(model, opt, 1)
    grads = [p.grad.clone() for p in model.parameters()]
    loss = loss_fn(model, noise((5, 6), 3))
    expected = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    meta.update(*(noise((5, 6), 4 + i) for i in range(3)))
    assert meta.updates == 1
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))
    model.zero_grad()
    loss.backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), expected, strict=True))


def test_a_loss_that_differentiates_on_its_way():
    def penalized(model, x):
        x = x.clone().requires_grad_()
        y = model(x)
        (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        return (y - 1).square().mean() + slope.square().mean()

    model = mlp()
    opt = MetaAdamW(model.parameters(), head_init="xavier")
    report = MetaLearner(opt, model, penalized).update(*(noise((5, 6), i) for i in range(3)))
    a, b, v = (noise((5, 6), i) for i in range(3))
    expected = (penalized(model, a) - penalized(model, v)).abs()
    torch.testing.assert_close(report.generalization_gap, expected.detach())
    assert b.grad is None


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.1}])
def test_released_alignment_of_a_maximized_loss_is_that_of_the_minimized_negative(options):
    found = []
    for sign in (1.0, -1.0):
        model = mlp()
        opt = MetaAdamW(model.named_parameters(), model=model, variant="released", maximize=sign < 0, head_init="xavier", **options)

        def signed(model, batch, sign=sign):
            return sign * loss_fn(model, batch)

        meta = MetaLearner(opt, model, signed, objective="gradient")
        signed(model, noise((5, 6), 0)).backward()
        opt.step()
        found.append(meta.update(noise((5, 6), 1), noise((5, 6), 2)).gradient_alignment)
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-7)


def test_errors_of_the_meta_learner_and_of_param_groups():
    model = mlp()
    opt = MetaAdamW(model.parameters())
    with pytest.raises(TypeError, match="MetaAdamW, got AdamW"):
        MetaLearner(torch.optim.AdamW(model.parameters()), model, loss_fn)
    for options in ({"priorities": (float("nan"), 1, 1)}, {"fixed_weights": (1, 1, float("inf"))}, {"gate_l1": float("nan")}):
        with pytest.raises(ValueError, match=f"Invalid {next(iter(options))}"):
            MetaLearner(opt, model, loss_fn, **options)
    after_step = MetaLearner(opt, model, loss_fn).every(1, [], [])
    for _ in range(2):
        train(model, opt, 1)
        with pytest.raises(ValueError, match="no more batches"):
            after_step()
    with pytest.raises(TypeError, match="must be a dict"):
        opt.add_param_group(list(nn.Linear(1, 1).parameters()))
