"""Saving and resuming: bitwise the uninterrupted run, to and from torch.optim.AdamW, by hooks, by copy and pickle."""

import copy
import io
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from metaadamw_fast import FeatureConfig, MetaAdamW, MetaLearner

from .models import (
    assert_same_bits,
    batch,
    make,
    mse,
    noise,
    one_thread,  # noqa: F401
    perceptron,
    relative,
    same,
    train,
)
from .optimizers import AVGRAD, META, MOMENTS, OFF, every
from .tolerances import REDUCTION


def make_learner(run):
    if not run.spec.encodes:
        return None
    return MetaLearner(run.opt, run.model, mse, lr=1e-2, gap_at="lookahead", priorities=(2.0, 1.0, 0.5))


class Run:
    """A training, of MetaAdamW with a meta-update after every second step, but of bfloat16 parameters, which allow none."""

    def __init__(self, spec=META, dtype=torch.float32, **options):
        if spec.encodes:
            options = {"features": FeatureConfig("enhanced", gating=True), "amsgrad": True, "max_grad_norm": 1.5, **options}
        self.spec, self.model = spec, perceptron(dtype)
        self.opt = make(self.model, spec, **options)
        self.meta = make_learner(self)
        self.step = 0

    def to(self, last):
        while self.step < last:
            train(self.model, self.opt, 1, first=self.step)
            self.step += 1
            if self.meta is not None and self.step % 2 == 0 and next(self.model.parameters()).itemsize > 2:
                self.meta.update(*(batch(self.model, 100 * i + self.step) for i in range(1, 4)))
        return self

    def state(self):
        return {
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self.opt.state_dict(),
            "meta": None if self.meta is None else self.meta.state_dict(),
        }

    def load(self, state):
        self.step = state["step"]
        self.model.load_state_dict(state["model"])
        self.opt.load_state_dict(state["optimizer"])
        if self.meta is not None:
            self.meta.load_state_dict(state["meta"])
        return self

    def assert_same(self, other):
        assert self.step == other.step
        assert_same_bits((self.model, self.opt), (other.model, other.opt))
        assert same(self.state(), other.state())


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


OPTIONS = {
    "enhanced": {},
    "lagged": {"statistics": "lagged"},
    "basic": {"features": "basic", "amsgrad": False, "max_grad_norm": None, "total_steps": 20},
    "bf16": {"dtype": torch.bfloat16, "features": "norm_basic"},
    "AVGrad": {"spec": AVGRAD},
    "AVGrad, clipped": {"spec": AVGRAD, "max_grad_norm": 0.5, "skip_nonfinite": True, "backend": "reference"},
    "AVGrad, bf16, rounded": {"spec": AVGRAD, "dtype": torch.bfloat16, "stochastic_rounding": True},
    "AVGrad, bf16, masters": {"spec": AVGRAD, "dtype": torch.bfloat16, "master_weights": True},
    "AVGrad, bf16, masters, rounded": {
        "spec": AVGRAD,
        "dtype": torch.bfloat16,
        "master_weights": True,
        "stochastic_rounding": True,
    },
    "AVGrad, fp16, fp32 states": {"spec": AVGRAD, "dtype": torch.float16, "state_dtype": torch.float32},
}


@pytest.mark.parametrize("at", [0, 3, 4])
@pytest.mark.parametrize("case", OPTIONS)
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(case, at):
    options = OPTIONS[case]
    expected = Run(**options).to(8)
    saved = Run(**options).to(at).state()
    for start in (Run(**options), Run(**options, seed=7).to(1)):  # nothing of the second one may survive
        state = through_a_file(saved)
        start.load(state)
        assert same(start.state(), state)
        start.to(8).assert_same(expected)
    run = Run(**options).to(4)
    assert not run.spec.encodes or run.opt.lr_scale.ne(1).all()


@every
def test_the_seed_of_stochastic_rounding_is_part_of_a_checkpoint(spec):
    rounded = {"spec": spec, "dtype": torch.bfloat16, "stochastic_rounding": True}
    expected = Run(**rounded, seed=2**40 + 3).to(6)
    state = through_a_file(Run(**rounded, seed=2**40 + 3).to(3).state())
    Run(**rounded, seed=7).load(state).to(6).assert_same(expected)
    Run(spec, dtype=torch.bfloat16).load(state).to(6)  # one that does not round by chance has no use for it
    for seed in ("absent", None):  # an earlier version's checkpoint; one without stochastic rounding
        state["optimizer"][spec.key]["rounding_seed"] = None
        if seed == "absent":
            del state["optimizer"][spec.key]["rounding_seed"]
        run = Run(**rounded, seed=7).load(state)
        assert run.opt.state_dict()[spec.key]["rounding_seed"] == 7
    for seed in (0.5, "7", 2**64):
        state["optimizer"][spec.key]["rounding_seed"] = seed
        with pytest.raises(ValueError, match="rounding_seed"):
            run.opt.load_state_dict(state["optimizer"])


def test_the_generator_is_part_of_a_checkpoint():
    """A group that comes after a resume starts with the embedding that it would have had."""
    runs = [Run(), Run(seed=5)]
    runs[1].load(through_a_file(runs[0].to(2).state()))
    for run in runs:
        run.opt.add_param_group({"params": [("extra.weight", nn.Parameter(torch.ones(2, 2)))]})
    assert torch.equal(runs[0].opt.encoder.group_embeddings[-1], runs[1].opt.encoder.group_embeddings[-1])


def with_an_added_group(learner_first=True):
    run = Run()
    run.model.extra = nn.Embedding.from_pretrained(torch.ones(2, 2), freeze=False)
    run.opt.add_param_group({"params": [("extra.weight", run.model.extra.weight)], "lr": 0.1})
    if not learner_first:
        run.meta = make_learner(run)
    return run


@pytest.mark.parametrize("learner_first", [True, False])
def test_a_checkpoint_after_add_param_group(learner_first):
    """Group and embedding came after the learner was built; whoever resumes may build the learner when all groups are there."""
    expected = with_an_added_group().to(8)
    state = through_a_file(with_an_added_group().to(4).state())
    with_an_added_group(learner_first).load(state).to(8).assert_same(expected)


KILLED = {"MetaAdamW": {}, "AVGrad": OPTIONS["AVGrad, bf16, masters, rounded"]}


def work(name, folder, last):
    """Trains to step `last`, saving after every step and resuming from what is there."""
    torch.set_num_threads(1)
    folder, run = Path(folder), Run(**KILLED[name])
    if (folder / "state").exists():
        run.load(torch.load(folder / "state", weights_only=True))
        print("resumed at", run.step, flush=True)
    while run.step < last:
        run.to(run.step + 1)
        torch.save(run.state(), folder / "new")
        os.replace(folder / "new", folder / "state")


@pytest.mark.parametrize("name", KILLED)
def test_save_kill_load_continue(name, tmp_path):
    def start(last):
        code = f"from tests.test_checkpoint import work; work({name!r}, {str(tmp_path)!r}, {last})"
        return subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, text=True)

    victim = start(10**9)
    deadline = time.monotonic() + 60
    while not (tmp_path / "state").exists() or torch.load(tmp_path / "state", weights_only=True)["step"] < 5:
        assert victim.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    victim.send_signal(signal.SIGKILL)
    assert victim.wait() == -signal.SIGKILL
    killed_at = torch.load(tmp_path / "state", weights_only=True)["step"]
    successor = start(killed_at + 5)
    output, _ = successor.communicate(timeout=60)
    assert output == f"resumed at {killed_at}\n"
    assert successor.returncode == 0
    final = torch.load(tmp_path / "state", weights_only=True)
    assert final["step"] == killed_at + 5
    assert same(final, Run(**KILLED[name]).to(killed_at + 5).state())


# --------------------------------------------------------------------------------------------------------- to and from AdamW


ADAMW = {
    "plain": {},
    "amsgrad": {"amsgrad": True},
    "fused": {"fused": True},
    "maximize": {"maximize": True, "lr": 1e-4},
}


def moments(opt, model):
    names = ("step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    return [{name: opt.state[p][name].clone() for name in names if name in opt.state[p]} for p in model.parameters()]


@pytest.mark.parametrize("partly", [False, True])
@pytest.mark.parametrize("case", ADAMW)
@pytest.mark.parametrize("into", ["MetaAdamW", "AdamW"])
def test_a_checkpoint_of_the_other_optimizer(into, case, partly):
    """The same moments and steps, and training goes on the same. `partly`: a parameter that never had a gradient."""
    adamw = lambda ps, **options: torch.optim.AdamW(ps, **{"lr": 3e-3, **ADAMW[case], **options})  # noqa: E731
    meta_adamw = lambda ps: MetaAdamW(ps, **OFF, **{"lr": 3e-3, **ADAMW[case]})  # noqa: E731
    if case == "fused":
        meta_adamw = lambda ps: MetaAdamW(ps, lr=3e-3, **OFF)  # noqa: E731
    builds = (adamw, meta_adamw) if into == "MetaAdamW" else (meta_adamw, adamw)
    models = [perceptron(torch.float64) for _ in range(2)]
    for model in models:
        model.layers[1].weight.requires_grad_(not partly)
    first, second = (build(model.parameters()) for build, model in zip(builds, models, strict=True))
    train(models[0], first, 4)
    first.param_groups[0]["lr"] *= 0.5
    models[1].load_state_dict(models[0].state_dict())
    state = through_a_file(first.state_dict())
    if into == "MetaAdamW":
        encoder = {name: x.clone() for name, x in second.encoder.state_dict().items()}
        with pytest.warns(UserWarning, match="AdamW"):
            second.load_state_dict(state)
        assert same(dict(second.encoder.state_dict()), encoder)
        assert second.steps_done == 4
    else:
        second.load_state_dict(state)
    assert second.param_groups[0]["lr"] == first.param_groups[0]["lr"]
    for a, b in zip(moments(first, models[0]), moments(second, models[1]), strict=True):
        assert same(a, b) or (partly and (not a or not a["step"]) and not b.get("step", 0))
    for model, opt in zip(models, (first, second), strict=True):
        train(model, opt, 5, first=4)
    for a, b in zip(moments(first, models[0]), moments(second, models[1]), strict=True):
        assert a.get("step", 0) == b.get("step", 0)
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert relative(p, q) < REDUCTION[torch.float64]


OTHERS = {
    "Adam": torch.optim.Adam,
    "AdamW": torch.optim.AdamW,
    "AdamW, amsgrad": lambda ps, **options: torch.optim.AdamW(ps, amsgrad=True, **options),
    "MetaAdamW": lambda ps, **options: MetaAdamW(ps, **OFF, **options),
}


def noisy_steps(model, opt, first, last):
    for step in range(first, last):
        for i, p in enumerate(model.parameters()):
            p.grad = noise(p.shape, 100 * step + i, p.dtype)
        opt.step()


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("other", OTHERS)
def test_avgrad_goes_on_from_a_checkpoint_of_adam(other, dtype, backend):
    """With A = v, so the next step is Adam's but for that v has moved since; with A = 0 it would be some ten times as long."""
    options = {"lr": 1e-3, "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.0}
    model = perceptron(dtype)
    adam = OTHERS[other](model.parameters(), **options)
    noisy_steps(model, adam, 0, 100)
    twin = copy.deepcopy(model)
    opt = AVGRAD(twin.parameters(), lr=0.5, betas=(0.5, 0.5), backend=backend)
    state = through_a_file(adam.state_dict())
    kept = copy.deepcopy(state)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.load_state_dict(state)
    assert same(state, kept)
    assert opt.steps_done == 100
    assert all(opt.param_groups[0][name] == x for name, x in options.items())
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        ours, theirs = opt.state[q], adam.state[p]
        assert same({name: ours[name] for name in ("step", *MOMENTS)}, {name: theirs[name] for name in ("step", *MOMENTS)})
        assert same(ours["average_sq"], theirs["exp_avg_sq"].float())
        assert ours["average_sq"].data_ptr() != ours["exp_avg_sq"].data_ptr()
    for m, o in ((model, adam), (twin, opt)):
        for p in m.parameters():
            nn.init.zeros_(p)  # so that what is left is the step, to all its bits
        noisy_steps(m, o, 100, 101)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert 0 < relative(q, p) < 0.05
    assert opt.state[twin.out.weight]["step"] == 101


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_adam_goes_on_from_a_checkpoint_of_avgrad_and_back(kind):
    """Torch keeps the mean beside its own moments, in the parameter's dtype. Loaded again, it is float32."""
    model = perceptron(torch.bfloat16)
    opt = AVGRAD(model.parameters())
    noisy_steps(model, opt, 0, 3)
    adam = kind(model.parameters())
    adam.load_state_dict(through_a_file(opt.state_dict()))
    noisy_steps(model, adam, 3, 5)
    again = AVGRAD(model.parameters())
    again.load_state_dict(through_a_file(adam.state_dict()))
    assert again.steps_done == 5
    for p in model.parameters():
        assert same(adam.state[p]["exp_avg_sq"], again.state[p]["exp_avg_sq"])
        assert again.state[p]["average_sq"].dtype == torch.float32
        assert same(again.state[p]["average_sq"], opt.state[p]["average_sq"].bfloat16().float())
    noisy_steps(model, again, 5, 6)


# --------------------------------------------------------------------------------------------- dtypes, aliases, hooks, copies


@pytest.mark.parametrize("learner", ["before", "after"])
@pytest.mark.parametrize("statistics", ["exact", "lagged"])
def test_an_encoder_in_float64_stays_in_float64(statistics, learner):
    """Whether the learner was built before the cast, its log-variances then in float32, or after."""

    def double():
        run = Run(statistics=statistics).to(1)
        run.opt.encoder.double()
        if learner == "after":
            run.meta = make_learner(run)
        return run

    expected = double().to(8)
    state = through_a_file(double().to(4).state())
    resumed = Run(statistics=statistics).load(state)
    assert {x.dtype for x in resumed.opt.encoder.state_dict().values()} == {torch.float64}
    assert resumed.opt.lr_scale.dtype == resumed.opt.features.dtype == resumed.opt.statistics.dtype == torch.float64
    assert resumed.meta.log_vars.dtype == (torch.float64 if learner == "after" else torch.float32)
    resumed.to(8).assert_same(expected)
    back = double().load(through_a_file(Run(statistics=statistics).to(4).state()))
    back.to(8).assert_same(Run(statistics=statistics).to(8))


def test_a_checkpoint_that_does_not_tell_the_encoder_s_sizes():
    """Those of earlier versions do not."""
    state = through_a_file(Run().to(3).state())
    del state["optimizer"]["metaadamw"]["config"]
    Run(seed=7).load(state).to(6).assert_same(Run().to(6))


def test_a_width_that_is_given_equals_one_that_is_found():
    width = make(perceptron(), features=FeatureConfig("norm_basic")).encoder.dim
    state = make(perceptron(), features=FeatureConfig("norm_basic", dim=width, group_embed_dim=9)).state_dict()
    opt = make(perceptron(), features=FeatureConfig("norm_basic"), seed=3)
    opt.load_state_dict(state)
    assert same(dict(opt.encoder.state_dict()), state["metaadamw"]["encoder"])


@pytest.mark.parametrize("make_optimizer", [torch.optim.SGD, torch.optim.RMSprop, torch.optim.Adafactor, torch.optim.Adagrad])
def test_meta_optimizers_whose_states_have_other_shapes(make_optimizer):
    runs = [Run() for _ in range(2)]
    for run in runs:
        run.meta = MetaLearner(run.opt, run.model, mse, make_optimizer=make_optimizer)
    runs[0].to(4)
    runs[1].load(through_a_file(runs[0].state())).to(8).assert_same(runs[0].to(8))


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_states_keep_their_saved_dtypes(dtype, spec):
    """But for one that is always wide."""
    model = perceptron(torch.bfloat16)
    opt = make(model, spec)
    state = opt.state_dict()
    for i, p in enumerate(model.parameters()):
        state["state"][i] = {"step": torch.tensor(3.0)}
        state["state"][i] |= {name: noise(p.shape, i, dtype).square() for name in ("exp_avg", "exp_avg_sq")}
    opt.load_state_dict(through_a_file(state))
    for i, p in enumerate(model.parameters()):
        found = {name: x for name, x in opt.state[p].items() if name in state["state"][i]}
        assert same(found, state["state"][i])
        assert opt.state[p].keys() == {"step", *spec.states}
    train(model, opt, 2)
    assert all(s["exp_avg"].dtype == s["exp_avg_sq"].dtype == dtype and s["step"] == 5 for s in opt.state.values())
    if spec is AVGRAD:
        assert {s["average_sq"].dtype for s in opt.state.values()} == {torch.promote_types(dtype, torch.float32)}


@pytest.mark.parametrize("options", [{"statistics": "lagged"}, {"spec": AVGRAD}], ids=["MetaAdamW", "AVGrad"])
def test_what_is_loaded_is_neither_changed_nor_referred_to(options):
    run = Run(**options).to(3)
    state = run.state()
    before = copy.deepcopy(state)
    Run(**options).load(state).to(7)
    assert same(state, before)
    with torch.no_grad():
        extra = state["optimizer"][run.spec.key]
        for x in (*state["optimizer"]["state"][0].values(), extra["steps"], *extra.get("encoder", {}).values()):
            x.fill_(7.0)
    loaded = Run(**options).load(before)
    for x in before["optimizer"]["state"][0].values():
        x.fill_(7.0)
    before["optimizer"]["param_groups"][0]["lr"] = 7.0
    loaded.to(7).assert_same(Run(**options).to(7))


@every
def test_hooks_on_checkpoints(spec):
    model, calls = perceptron(), []
    opt = make(model, spec)
    train(model, opt, 2)
    opt.register_state_dict_pre_hook(lambda o: calls.append(o is opt))
    opt.register_state_dict_post_hook(lambda o, state: {"wrapped": state})
    state = opt.state_dict()
    assert calls == [True]
    assert state.keys() == {"wrapped"}
    assert state["wrapped"].keys() == {"state", "param_groups", spec.key}
    other = make(perceptron(), spec, seed=3)
    other.register_load_state_dict_pre_hook(lambda o, state: state["wrapped"])
    other.register_load_state_dict_post_hook(lambda o: calls.append(o.state[o.param_groups[0]["params"][0]]["step"].item()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # that it looks like a checkpoint of AdamW
        other.load_state_dict(state)
    assert calls == [True, 2.0]
    assert same(other.state_dict()["state"], opt.state_dict()["wrapped"]["state"])
    assert not spec.encodes or same(dict(other.encoder.state_dict()), dict(opt.encoder.state_dict()))


@every
@pytest.mark.parametrize("kind", ["state_dict", "load_state_dict"])
def test_a_call_while_another_is_at_its_hooks(kind, spec):
    """As from another thread, which saves in the background: neither call may change what the other goes through."""
    opt = make(perceptron(), spec)
    state, nested = opt.state_dict(), []

    def call():
        opt.state_dict() if kind == "state_dict" else opt.load_state_dict(state)

    def hook(*_):
        if not nested:
            nested.append(True)
            call()

    for register in ("pre_hook", "post_hook"):
        nested.clear()
        handles = [getattr(opt, f"register_{kind}_{register}")(f) for f in (hook, lambda *_: None)]
        call()
        assert nested
        for handle in handles:
            handle.remove()


@every
def test_a_checkpoint_is_taken_by_threads_beside_the_steps(spec):
    model = perceptron()
    opt, errors, done = make(model, spec), [], threading.Event()
    train(model, opt, 1)

    def save():
        try:
            while not done.is_set():
                assert opt.state_dict().keys() == {"state", "param_groups", spec.key}
        except Exception as error:
            errors.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    threads = [threading.Thread(target=save) for _ in range(2)]
    try:
        for thread in threads:
            thread.start()
        for _ in range(100):
            opt.step()
    finally:
        done.set()
        for thread in threads:
            thread.join()
        sys.setswitchinterval(interval)
    assert not errors


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda x: pickle.loads(pickle.dumps(x))}


@pytest.mark.parametrize(
    "options", [{"statistics": "exact"}, {"statistics": "lagged"}, {"spec": AVGRAD}], ids=["", "lagged", "AVGrad"]
)
@pytest.mark.parametrize("kind", COPIES)
def test_a_copy_goes_on_like_the_original(kind, options):
    run = Run(**options).to(3)
    twin = COPIES[kind](run)
    expected = Run(**options).to(7)
    twin.to(7).assert_same(expected)
    assert run.step == 3
    run.to(7).assert_same(expected)


def test_what_users_keep_beside_the_states_is_theirs():
    """It is saved and loaded, whatever it looks like, and has no part in what is ours: as with torch's optimizers."""
    run = Run().to(3)
    weight, bias = run.model.out.weight, run.model.out.bias
    run.opt.state["tuner"] = {"step": 1e9, "exp_avg": None, "wealth": torch.ones(2)}
    run.opt.state["calls"] = 7
    run.opt.state[weight] |= {
        "slow": weight.detach().clone(),
        "momentum_buffer": torch.ones(2, dtype=torch.int64),  # as other optimizers call theirs, of another shape
        "history": [{"at": 3, "value": torch.tensor(0.5)}, ("a", None)],
    }
    state = through_a_file(run.state())
    other = Run(seed=7).to(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # that it looks like a checkpoint of AdamW
        other.load(state)
    assert other.opt.steps_done == 3
    theirs = (other.opt.state["tuner"], other.opt.state["calls"], dict(other.opt.state[other.model.out.weight]))
    assert same(theirs, (run.opt.state["tuner"], 7, dict(run.opt.state[weight])))
    assert same(other.state(), state)
    assert same(other.to(8).state(), run.to(8).state())
    plain = torch.optim.AdamW(perceptron().parameters())
    plain.state[plain.param_groups[0]["params"][-1]]["slow"] = torch.ones(3)  # of a parameter without states of the optimizer's own
    with pytest.warns(UserWarning, match="AdamW"):
        other.opt.load_state_dict(plain.state_dict())
    assert other.opt.state[other.model.out.bias]["slow"].tolist() == [1, 1, 1]
    assert other.opt.state[other.model.out.bias]["step"] == 0
    assert "slow" not in run.opt.state[bias]


NAMES = {
    "names": lambda model: {"params": model.named_parameters()},
    "a model": lambda model: {"params": model.parameters(), "model": model},
    "none": lambda model: {"params": model.parameters()},
    "none, in two": lambda model: {"params": [{"params": model[:1].parameters()}, {"params": model[1:].parameters()}]},
}


def convolution():
    """Two fine-grained groups: a convolution and a norm have the same layer type."""
    return nn.Sequential(nn.Conv2d(4, 2, 1), nn.BatchNorm2d(2))


def trained(names, steps, seed, **options):
    model = convolution()
    opt = MetaAdamW(**NAMES[names](model), head_init="xavier", seed=seed, **options)
    for step in range(steps):
        for i, p in enumerate(model.parameters()):
            p.grad = noise(p.shape, 10 * step + i)
        opt.step()
    return model, opt


@pytest.mark.parametrize("statistics", ["exact", "lagged"])
@pytest.mark.parametrize("there", NAMES)
@pytest.mark.parametrize("here", NAMES)
def test_a_checkpoint_with_names_and_one_without(here, there, statistics):
    """Positions match, as in torch. The encoder comes along where there are as many groups; else it stays, and names are named."""
    _, saved = trained(there, 3, seed=1, statistics=statistics)
    model, opt = trained(here, 1, seed=2, statistics=statistics)
    if (here == "none, in two") != (there == "none, in two"):
        with pytest.raises(ValueError, match="parameter groups"):
            opt.load_state_dict(saved.state_dict())
        return
    encoder = copy.deepcopy(opt.encoder.state_dict())
    state = through_a_file(saved.state_dict())
    fits = len(opt.groups) == len(saved.groups)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        opt.load_state_dict(state)
    for i, p in enumerate(model.parameters()):
        assert same(dict(opt.state[p]), state["state"][i])
    assert opt.steps_done == 3
    assert same(dict(opt.encoder.state_dict()), dict(saved.encoder.state_dict() if fits else encoder))
    assert len(caught) == (not fits)
    if not fits:
        assert "without names" in str(caught[0].message) if there == "none" else "with names" in str(caught[0].message)
        assert ("named_parameters" if here == "none" else "param_groups") in str(caught[0].message)


def test_a_checkpoint_with_other_names_that_does_not_fit_says_so():
    _, opt = trained("names", 1, seed=0)
    other = MetaAdamW(nn.Sequential(nn.Conv2d(4, 3, 1), nn.BatchNorm2d(3)).parameters())
    with pytest.raises(ValueError, match=r'has shape .* saved without names .* pass grouping="param_groups"'):
        opt.load_state_dict(other.state_dict())
    state = trained("none", 1, seed=0)[1].state_dict()
    del state["metaadamw"]["named"]  # checkpoints of earlier versions tell by their param groups only
    with pytest.warns(UserWarning, match="saved without names"):
        opt.load_state_dict(state)


def test_an_encoder_that_adamw_carried_along_is_not_loaded():
    """AdamW keeps what it finds in a param group, and saves it with states that are newer."""
    run = Run()
    run.to(2)
    plain = torch.optim.AdamW(run.model.parameters())
    plain.load_state_dict(run.opt.state_dict())
    again = Run()
    again.opt.load_state_dict(plain.state_dict())  # nothing has happened since: it fits
    assert same(dict(again.opt.encoder.state_dict()), dict(run.opt.encoder.state_dict()))
    train(run.model, plain, 1)
    fresh = Run()
    before = copy.deepcopy(dict(fresh.opt.encoder.state_dict()))
    with pytest.warns(UserWarning, match="plain AdamW"):
        fresh.opt.load_state_dict(plain.state_dict())
    assert same(dict(fresh.opt.encoder.state_dict()), before)
    assert fresh.opt.steps_done == 3
