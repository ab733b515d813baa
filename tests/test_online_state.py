"""What an OnlineLearner remembers: across checkpoints, copies, writes of others, param groups, graphs and ranks."""

import copy
import io
import math
import pickle
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

from metaadamw_fast import MetaAdamW, OnlineLearner
from metaadamw_fast.core import devices

from . import ranks
from .cases import same_bits
from .models import noise, perceptron, same
from .test_capture import Recording, allow
from .test_foreign_writes import WRITES

FREELY = (math.log(64.0), 0.0)  # down, too
POLICIES = {
    "scales": {},
    "scales, loss, no trace": {"gradient": "loss", "trace": 0, "range": (2.0, 1.0)},
    "scales, every third": {"every": 3},
    "encoder": {"policy": "encoder", "lr": 0.05},
    "encoder, loss, every second": {"policy": "encoder", "gradient": "loss", "lr": 0.05, "every": 2},
    "encoder, SGD": {"policy": "encoder", "gradient": "loss", "make_optimizer": torch.optim.SGD, "lr": 0.5},
}


def name_of(name, _):
    return name


def learner_of(opt, options):
    """Its scales may fall, too."""
    freely = {} if options.get("policy") == "encoder" else {"range": FREELY}
    return OnlineLearner(opt, **{**freely, **options})


class Run:
    """A training by gradients that depend on the step alone; each tensor is a group."""

    def __init__(self, learner=None, dtype=torch.float32, **options):
        self.model = perceptron(dtype)
        options = {"lr": 0.05, "weight_decay": 0.1, "grouping": name_of, **options}
        self.opt = MetaAdamW(self.model.named_parameters(), **options)
        self.learner = None if learner is None else learner_of(self.opt, learner)
        self.step = 0

    def to(self, last):
        while self.step < last:
            for i, p in enumerate(self.model.parameters()):
                p.grad = noise(p.shape, 100 * self.step + i).to(p) if p.requires_grad else None
            self.opt.step()
            self.step += 1
        return self

    def assert_same(self, other):
        assert same(self.model.state_dict(), other.model.state_dict())
        assert same(self.opt.state_dict(), other.opt.state_dict())


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("statistics", ["exact", "lagged"])
@pytest.mark.parametrize("name", POLICIES)
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(name, statistics, backend):
    """At any step, whichever of model and optimizer is loaded first, the learner before or after; and copied or pickled."""
    options = {"statistics": statistics, "backend": backend, "features": "enhanced", "amsgrad": True, "max_grad_norm": 2.0}
    for at in (1, 2, 4):
        run = Run(POLICIES[name], **options).to(at)
        file = io.BytesIO()
        torch.save((run.model.state_dict(), run.opt.state_dict()), file)
        copied = copy.deepcopy(run)
        pickled = pickle.loads(pickle.dumps((run.model, run.opt)))
        run.to(9)
        assert not torch.equal(run.opt.lr_scale, torch.ones_like(run.opt.lr_scale))
        for order in ("model first", "optimizer first", "learner last"):
            file.seek(0)
            model, opt = torch.load(file, weights_only=True)
            other = Run(None if order == "learner last" else POLICIES[name], seed=3, **options)
            if order == "optimizer first":
                other.opt.load_state_dict(opt)
            other.model.load_state_dict(model)
            if order != "optimizer first":
                other.opt.load_state_dict(opt)
            if order == "learner last":
                learner_of(other.opt, POLICIES[name])
            other.step = at
            run.assert_same(other.to(9))
        run.assert_same(copied.to(9))
        copied.model, copied.opt = pickled
        copied.step = at
        run.assert_same(copied.to(9))


def test_a_write_before_a_checkpoint_is_known_after_it():
    runs = [Run({}).to(3) for _ in range(2)]
    for run in runs:
        with torch.no_grad():
            run.model.out.weight.mul_(2)
    copied, saved = copy.deepcopy(runs[0]), (runs[0].model.state_dict(), runs[0].opt.state_dict())
    loaded = Run({})
    loaded.model.load_state_dict(saved[0])
    loaded.opt.load_state_dict(saved[1])
    loaded.step = 3
    for run in (runs[0], copied, loaded):
        runs[1].to(6).assert_same(run.to(6))


TAUGHT = {"load_state_dict"}  # what belongs to a checkpoint


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("statistics", ["exact", "lagged"])
@pytest.mark.parametrize("kind", [kind for kind in WRITES if kind != "load_state_dict"])
def test_what_others_write_teaches_nothing_once(kind, statistics, backend):
    """Of that tensor, and of no other; behind the back of torch it is all of them."""
    params = {name: nn.Parameter(noise((6, 6), i)) for i, name in enumerate("abc")}
    opt = MetaAdamW(params.items(), grouping=name_of, statistics=statistics, backend=backend)
    learner = OnlineLearner(opt, range=FREELY)
    taught = []
    for step in range(6):
        if step == 3:
            WRITES[kind](params["b"], opt)
        for i, p in enumerate(params.values()):
            p.grad = noise(p.shape, 10 * step + i)
        before = learner._log_scales.clone()
        opt.step()
        taught.append((learner._log_scales[0] != before[0]).tolist())
    everyone = [True] * 3
    others = [False] * 3 if kind in ("behind the back", "another optimizer's fused step") else [True, False, True]
    assert taught == [[False] * 3, everyone, everyone, others, everyone, everyone]


@pytest.mark.parametrize("what", ["max_exp_avg_sq", "ema_param", "master_param"])
def test_writes_to_other_states(what):
    p, q = (nn.Parameter(noise((6, 6), i).bfloat16()) for i in range(2))
    opt = MetaAdamW([("p", p), ("q", q)], grouping=name_of, amsgrad=True, master_weights=True)
    learner = OnlineLearner(opt, range=FREELY)
    for step in range(4):
        p.grad, q.grad = (noise(p.shape, 10 * step + i).bfloat16() for i in range(2))
        before = learner._log_scales.clone()
        if step == 3:
            opt.state[p][what].mul_(2)
        opt.step()
    assert (learner._log_scales[0] != before[0]).tolist() == [False, True]


def frozen_gets_a_gradient(run):
    run.model.norm.weight.requires_grad_()


def a_group_joins(run):
    run.extra = nn.Parameter(noise((4,), 7))
    run.opt.add_param_group({"params": [("extra", run.extra)]})
    run.extra.grad = torch.ones(4)


def a_group_leaves(run):
    first = run.opt.param_groups[0]
    first["params"] = first["params"][1:]
    first["param_names"] = first["param_names"][1:]


def released(run):
    run.opt.release()


def flags(run):
    run.opt.param_groups[0]["amsgrad"] = True


CHANGES = [frozen_gets_a_gradient, a_group_joins, a_group_leaves, released, flags]


@pytest.mark.parametrize("statistics", ["exact", "lagged"])
@pytest.mark.parametrize("policy", ["scales", "encoder"])
@pytest.mark.parametrize("change", CHANGES)
def test_lists_that_are_made_anew_forget_nothing(change, policy, statistics):
    """Every tensor that moved teaches, and keeps what it has learned; a write at the same time is noticed."""
    run = Run({"policy": policy, "trace": 0.5}, statistics=statistics, features="enhanced")
    run.model.norm.weight.requires_grad_(False)
    run.opt.release()
    run.to(4)
    names = [group.names[0] for group in run.opt.groups]
    learned = dict(zip(names, run.learner._log_scales[0].tolist(), strict=True))
    change(run)
    with torch.no_grad():
        run.model.out.bias.add_(1)
    taught = []
    learn = run.learner.learn

    def spy(optimizer, sums, step):
        taught.append(dict(zip([m.name for m in optimizer._members], (optimizer._last.numbers[1] != 0).tolist(), strict=True)))
        assert set(learned) & set(taught[0]) <= {group.names[0] for group in optimizer.groups}
        learn(optimizer, sums, step)

    run.learner.learn = spy
    now = dict(zip([g.names[0] for g in run.opt.groups], run.learner._log_scales[0].tolist(), strict=False))
    assert all(now[name] == x for name, x in learned.items() if name in now and change is not a_group_leaves)
    run.to(5)
    assert {name for name, x in taught[0].items() if not x} == {"norm.weight", "out.bias", "extra"} & set(taught[0])
    run.to(6)
    if statistics == "lagged" and policy == "encoder" and change in (a_group_joins, a_group_leaves):
        assert any(taught[1].values()) == (change is a_group_leaves)  # no scales of the encoder: the new group has no statistics
    run.to(7)
    assert all(x for name, x in taught[-1].items() if change is frozen_gets_a_gradient or name != "norm.weight")
    assert len(taught[-1]) == len(names) + (change is a_group_joins) - (change is a_group_leaves)


def test_scales_stay_with_their_groups():
    run = Run({"trace": 0}).to(3)
    before = dict(zip([g.names[0] for g in run.opt.groups], run.learner._log_scales[0].tolist(), strict=True))
    group = run.opt.param_groups[0]
    order = [3, 1, 5, 2, 0, 4]
    for key in ("params", "param_names"):
        group[key] = [group[key][i] for i in order if i < len(group[key])]
    run.opt.add_param_group({"params": [("extra", nn.Parameter(torch.ones(3)))]})
    after = dict(zip([g.names[0] for g in run.opt.groups], run.learner._log_scales[0].tolist(), strict=True))
    assert after.pop("extra") == 0
    assert after
    assert after == {name: before[name] for name in after}


# ------------------------------------------------------------------------------------------------------------ CUDA graphs


def graph_run(policy, statistics, backend, **learner):
    run = Run(None, statistics=statistics, backend=backend, lr=torch.tensor(0.05))
    options = {"make_optimizer": lambda ps, lr: torch.optim.Adam(ps, lr=lr, fused=True, capturable=True)}
    OnlineLearner(run.opt, policy=policy, **learner, **(options if policy == "encoder" else {}))
    allow(run.opt)
    return run


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """As in test_capture.py."""
    under_way = []
    monkeypatch.setattr(devices, "readable", lambda x: False)
    monkeypatch.setattr(devices, "capturing", lambda device: bool(under_way))
    return under_way


def numbers_of(run):
    saved = run.opt.state_dict()["metaadamw"]
    saved["online"].pop("count")  # the host's, which a replay does not tell
    return [p.detach().clone() for p in run.model.parameters()], saved


def written_by(run):
    return [*run.model.parameters(), *(x for p in run.model.parameters() for x in run.opt.state[p].values())]


@contextmanager
def recording_of(recording, written):
    """Neither what a recording undoes at its end nor a replay raises a version counter: a graph does not."""
    recording.__enter__()
    yield
    with torch.autograd._unsafe_preserve_version_counter(tuple(written)):
        recording.__exit__(None, None, None)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("statistics", ["exact", "lagged"])
@pytest.mark.parametrize(
    ("policy", "learner"),
    [("scales", {}), ("scales", {"every": 3, "gradient": "loss", "trace": 0}), ("encoder", {}), ("encoder", {"every": 2})],
)
def test_a_captured_step_learns_at_every_replay(policy, learner, statistics, backend, as_on_a_gpu):
    eager, recorded = (graph_run(policy, statistics, backend, **learner) for _ in range(2))
    recording = None
    for step in range(11):
        for run in (eager, recorded):
            for i, p in enumerate(run.model.parameters()):
                g = noise(p.shape, 100 * step + i)
                p.grad = g if p.grad is None else p.grad.copy_(g)
            run.opt.param_groups[0]["lr"].fill_(0.05 / (step + 1))
            if step == 8:
                run.opt.invalidate_statistics()  # reaches the graph
            if run is eager or step < 3 or step == 6:
                run.opt.step()
                continue
            if recording is None:
                as_on_a_gpu.append(True)
                written = written_by(run)
                recording = Recording(written)
                with recording_of(recording, written):
                    run.opt.step()
                as_on_a_gpu.clear()
            with torch.autograd._unsafe_preserve_version_counter(tuple(written)):
                recording.replay()
        if policy == "scales":
            assert same(numbers_of(recorded), numbers_of(eager)), f"step {step}"
        else:  # sums of torch's differ in their last bits with the addresses
            pairs = zip(tree_leaves(numbers_of(recorded)), tree_leaves(numbers_of(eager)), strict=True)
            for x, y in pairs:
                torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-7) if isinstance(x, torch.Tensor) else None
    assert not torch.equal(eager.opt.lr_scale, torch.ones_like(eager.opt.lr_scale))


def test_what_a_graph_cannot_hold_is_refused(as_on_a_gpu):
    for make in (torch.optim.SGD, lambda ps, lr: torch.optim.Adam(ps, lr=lr, fused=True)):
        run = Run({"policy": "encoder", "make_optimizer": make}).to(2)
        allow(run.opt)
        run.to(3)
        before = copy.deepcopy(run)
        as_on_a_gpu.append(True)
        with pytest.raises(RuntimeError, match="fused=True and capturable=True"):
            run.to(4)
        as_on_a_gpu.clear()
        run.assert_same(before)
    run = Run({}).to(2)
    allow(run.opt)
    run.to(3)
    with torch.no_grad():
        run.model.out.bias.add_(1)
    as_on_a_gpu.append(True)
    with pytest.raises(RuntimeError, match="written since the last step"):
        run.to(4)
    as_on_a_gpu.clear()
    before = run.learner._log_scales.clone()
    run.to(4)
    number = next(i for i, group in enumerate(run.opt.groups) if group.names == ["out.bias"])
    assert [i for i, x in enumerate((run.learner._log_scales[0] == before[0]).tolist()) if x] == [number]


# ------------------------------------------------------------------------------------------------------------ checkpoints


def test_checkpoints_without_a_learner():
    plain = Run(None).to(3)
    saved = plain.opt.state_dict()
    assert saved["metaadamw"]["online"] is None
    del saved["metaadamw"]["online"]  # of an earlier version
    run = Run({"policy": "encoder"}).to(4)
    fresh = Run({"policy": "encoder"})
    for x in (run, fresh):
        x.opt.load_state_dict(saved)
        x.model.load_state_dict(plain.model.state_dict())  # later: the averages start as these
        x.step = 3
        x.to(4)
    for p, q in zip(run.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(run.opt.state[p]["ema_param"], q + (p - q) * (1 - run.learner.trace), rtol=1e-6, atol=1e-7)
    run.to(7).assert_same(fresh.to(7))


def test_a_checkpoint_that_waits_for_a_learner_knows_whether_steps_came_between():
    run = Run({}).to(4)
    saved, model = run.opt.state_dict(), copy.deepcopy(run.model.state_dict())
    late = Run(None)
    late.model.load_state_dict(model)
    late.opt.load_state_dict(saved)
    assert late.opt.state_dict()["metaadamw"]["online"] is None
    late.step = 4
    late.to(5)
    assert late.opt.state[late.model.out.bias]["ema_param"] is not None  # it is of the checkpoint, and stands still
    averages = copy.deepcopy(late)
    OnlineLearner(averages.opt)
    assert averages.opt.rank_sums is not None  # makes the states
    assert all(torch.equal(averages.opt.state[p]["ema_param"], p) for p in averages.model.parameters())
    learner = OnlineLearner(late.opt, trace=0, range=FREELY)
    assert torch.equal(learner._log_scales, saved["metaadamw"]["online"]["log_scales"])
    late.to(6)
    assert torch.equal(learner._log_scales, saved["metaadamw"]["online"]["log_scales"])
    late.to(7)
    assert not torch.equal(learner._log_scales, saved["metaadamw"]["online"]["log_scales"])


SPOILS = {
    "another policy": (lambda x: x.update(policy="encoder"), "has an OnlineLearner of policy 'encoder'"),
    "a part missing": (lambda x: x.pop("last"), "lacks last"),
    "another shape": (lambda x: x.update(log_scales=torch.zeros(2, 99)), "log_scales of the OnlineLearner has shape"),
    "a count that is none": (lambda x: x.update(count=-1), "count of the OnlineLearner"),
    "no dict": (lambda x: None, "is of type int"),
}


@pytest.mark.parametrize("kind", SPOILS)
def test_a_spoilt_checkpoint_changes_nothing(kind):
    run = Run({}).to(3)
    saved = copy.deepcopy(run.opt.state_dict())
    spoil, words = SPOILS[kind]
    spoil(saved["metaadamw"]["online"])
    if kind == "no dict":
        saved["metaadamw"]["online"] = 3
    saved["param_groups"][0]["metaadamw"] = saved["metaadamw"]
    before = copy.deepcopy(run)
    with pytest.raises(ValueError, match=words):
        run.opt.load_state_dict(saved)
    run.to(5).assert_same(before.to(5))
    late = Run(None)
    late.opt.load_state_dict(saved)
    with pytest.raises(ValueError, match=words):
        OnlineLearner(late.opt)
    late.to(1)


def test_torch_loads_a_checkpoint_with_averages():
    run = Run({}).to(3)
    other = torch.optim.AdamW(run.model.parameters())
    other.load_state_dict(run.opt.state_dict())
    assert all("ema_param" in state for state in other.state.values())


# ------------------------------------------------------------------------------------------------------------ the averages


@pytest.mark.parametrize("masters", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_averaged_parameters(backend, dtype, masters):
    run = Run(None, dtype=dtype, backend=backend, ema_decay=0.75, master_weights=masters, stochastic_rounding=True)
    expected = {p: p.detach().float() if dtype != torch.float64 else p.detach().clone() for p in run.model.parameters()}
    for step in range(4):
        run.to(step + 1)
        for p, e in expected.items():
            now = run.opt.state[p].get("master_param", p).detach().to(e)
            e += 0.25 * (now - e)
    kept = copy.deepcopy(run)

    def evaluate():
        for p, e in expected.items():
            found = run.opt.state[p]["ema_param"]
            assert found.dtype == e.dtype
            # A kernel may take up the parameter before it is rounded to where it is stored.
            tolerance = 1e-6 if masters or dtype.itemsize > 2 else torch.finfo(dtype).eps
            torch.testing.assert_close(found, e, rtol=1e-6, atol=tolerance * float(e.abs().max()))
            assert torch.equal(p, found.to(dtype))
            if "master_param" in run.opt.state[p]:
                assert torch.equal(run.opt.state[p]["master_param"], found)
        raise KeyError("in the block")

    with pytest.raises(KeyError, match="in the block"), run.opt.ema_params():
        evaluate()
    run.assert_same(kept)
    run.to(6).assert_same(kept.to(6))


def test_averages_are_a_write_to_a_learner():
    run = Run({}, ema_decay=0.9).to(3)
    assert run.learner.trace == 0.9
    before = run.learner._log_scales.clone()
    with run.opt.ema_params():
        pass
    run.to(4)
    assert torch.equal(run.learner._log_scales, before)
    run.to(5)
    assert (run.learner._log_scales[0] != before[0]).all()
    with pytest.raises(RuntimeError, match="build the optimizer with ema_decay="), Run(None).opt.ema_params():
        pass


# ------------------------------------------------------------------------------------------------------------------- others


@pytest.mark.parametrize("policy", ["scales", "encoder"])
@pytest.mark.parametrize("statistics", ["exact", "lagged"])
def test_complex_parameters_and_masters(policy, statistics):
    """A complex tensor teaches as the real one on its memory, a master as the parameter that it stands for."""
    runs = []
    for kind in ("complex", "real"):
        params = [noise((3, 4), 0), noise((4, 2), 1)]
        params = [
            nn.Parameter(torch.view_as_complex(params[1])) if kind == "complex" else nn.Parameter(params[1]),
            nn.Parameter(params[0]),
        ]
        opt = MetaAdamW([("a", params[0]), ("b", params[1])], grouping=name_of, statistics=statistics, lr=0.1, head_init="xavier")
        learner = OnlineLearner(opt, policy=policy, gradient="loss")
        for step in range(5):
            for i, p in enumerate(params):
                g = noise((4, 2) if i == 0 else p.shape, 10 * step + i)
                p.grad = torch.view_as_complex(g) if p.is_complex() else g
            opt.step()
        runs.append((opt._scales.clone(), learner._log_scales.clone()))
    for x, y in zip(*runs, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("policy", ["scales", "encoder"])
@pytest.mark.parametrize("statistics", ["exact", "lagged"])
def test_fake_tensors(policy, statistics):
    with FakeTensorMode():
        model = nn.Linear(3, 4)
        opt = MetaAdamW(model.parameters(), statistics=statistics, ema_decay=0.9)
        OnlineLearner(opt, policy=policy)
        for _ in range(3):
            for p in model.parameters():
                p.grad = torch.empty_like(p)
            opt.step()
        with opt.ema_params():
            pass


def test_a_step_under_inference_mode_and_lazy_states():
    runs = [Run({"policy": policy}, allocate=allocate) for policy in ("scales", "encoder") for allocate in ("eager", "lazy")]
    for run in runs:
        run.to(2)
        with torch.inference_mode():
            for i, p in enumerate(run.model.parameters()):
                p.grad.copy_(noise(p.shape, 50 + i))
            run.opt.step()
        run.to(5)
    runs[0].assert_same(runs[1])
    runs[2].assert_same(runs[3])


def sharded(rank, policy, statistics):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 2))
    if rank is not None:
        for layer in (model[0], model[2]):
            fully_shard(layer)
        fully_shard(model)
    opt = MetaAdamW(model.named_parameters(), model=model, lr=0.05, head_init="xavier", statistics=statistics, max_grad_norm=1.0)
    OnlineLearner(opt, policy=policy, lr=0.05, gradient="loss" if policy == "encoder" else "cosine")
    for step in range(8):
        if step == 4:
            opt.load_state_dict(opt.state_dict())
            with opt.ema_params():
                model(noise((4, 5), 1))
        opt.zero_grad()
        (model(noise((4, 5), step)) - noise((4, 2), 50 + step)).square().mean().backward()
        opt.step()
    assert not torch.equal(opt.lr_scale, torch.ones_like(opt.lr_scale))
    whole = [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]
    return [p.detach().clone() for p in whole], opt._scales.clone()


def all_sharded(rank):
    return [sharded(rank, policy, statistics) for policy in ("scales", "encoder") for statistics in ("exact", "lagged")]


@ranks.needs_gloo
def test_ranks_learn_the_same(tmp_path):
    """Bitwise equal scales on both ranks, and those of one process."""
    first, second = ranks.run(all_sharded, 2, tmp_path)
    assert not dist.is_initialized()
    for (params, scales), (others, theirs), (expected, own) in zip(first, second, all_sharded(None), strict=True):
        assert same_bits(scales, theirs)
        torch.testing.assert_close(scales, own, rtol=1e-4, atol=1e-5)
        for p, q, r in zip(params, others, expected, strict=True):
            assert same_bits(p, q)
            torch.testing.assert_close(p, r, rtol=1e-4, atol=1e-5)
