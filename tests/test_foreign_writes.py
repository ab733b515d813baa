"""What others do to parameters and states between two steps is taken up as torch's own optimizers take it up."""

import copy
import pickle
import random
import sys
import weakref

import pytest
import torch
from torch import nn

from metaadamw_fast import MetaAdamW, MetaLearner, ops
from metaadamw_fast.core import devices

from .models import noise
from .optimizers import AVGRAD, META, every, every_with


def assign_data_twice(p, opt):
    """The second tensor would get the address of the first if the optimizer did not hold it."""
    version = p._version
    p.data = p.data * 1.5
    p.data = p.data * 1.5
    assert p._version == version


def behind_the_back(p, opt):
    p.data.mul_(2)
    opt.invalidate_statistics()


def fused_step(p, opt):
    """Of another optimizer on the same parameter. Should torch raise its version one day, the documented call is one too many."""
    p.grad = torch.ones_like(p)
    torch.optim.SGD([p], lr=0.1, fused=True).step()
    opt.invalidate_statistics()


WRITES = {
    "in place": lambda p, opt: p.detach().mul_(2),
    "data": lambda p, opt: setattr(p, "data", p.data * 2),
    "data, twice": assign_data_twice,
    "data, transposed": lambda p, opt: setattr(p, "data", p.data.t()),
    "behind the back": behind_the_back,
    "another optimizer's fused step": fused_step,
    "second moment": lambda p, opt: opt.state[p]["exp_avg_sq"].add_(1),
    "momentum": lambda p, opt: opt.state[p]["exp_avg"].mul_(2),
    "data of the momentum": lambda p, opt: setattr(opt.state[p]["exp_avg"], "data", torch.ones_like(p)),
    "assigned state": lambda p, opt: opt.state[p].update(exp_avg_sq=torch.ones_like(p)),
    "replaced state": lambda p, opt: opt.state.update({p: {name: x.clone() for name, x in opt.state[p].items()}}),
    "load_state_dict": lambda p, opt: opt.load_state_dict(MetaAdamW([torch.ones_like(p)]).state_dict()),
}


@pytest.mark.parametrize("kind", WRITES)
def test_what_others_write_between_steps_is_seen(kind):
    p = nn.Parameter(noise((40, 40), 0))
    opt = MetaAdamW([p])
    for step in range(3):
        if step == 2:
            WRITES[kind](p, opt)
        p.grad = noise(p.shape, 10 + step)
        m, v = opt.state[p]["exp_avg"], opt.state[p]["exp_avg_sq"]
        expected = [
            (x.detach().double() * y.detach().double()).sum() for x, y in ((p.grad, p.grad), (p.grad, m), (m, m), (p, p), (v, v))
        ]
        opt.step()
        torch.testing.assert_close(opt.statistics[0], torch.stack(expected).float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("kind", WRITES)
def test_avgrad_goes_on_from_what_others_write(kind, backend):
    """It takes up the numbers that are there: those of a new optimizer with the same parameters and states."""
    p = nn.Parameter(noise((40, 40), 0))
    opt = AVGRAD([p], backend=backend)
    write = {"load_state_dict": lambda p, opt: opt.load_state_dict(AVGRAD([torch.ones_like(p)]).state_dict())}.get(
        kind, WRITES[kind]
    )
    for step in range(4):
        if step == 2:
            write(p, opt)
            q = nn.Parameter(p.detach().clone())
            fresh = AVGRAD([q], backend=backend)
            fresh.state[q] = {name: x.clone() for name, x in opt.state[p].items()}
        p.grad = noise(p.shape, 10 + step)
        opt.step()
        if step >= 2:
            q.grad = noise(p.shape, 10 + step)
            fresh.step()
            assert torch.equal(p, q)
            assert all(torch.equal(x, fresh.state[q][name]) for name, x in opt.state[p].items())


@every_with({}, MetaAdamW=[{"amsgrad": True}])
def test_state_and_parameters_exchanged_by_hand_as_in_torch(spec, options):
    """What torch's own optimizers take up in the next step: a cleared state, a state of one's own, another parameter."""
    weights = [nn.Parameter(noise((5, 4), i)) for i in range(3)]
    runs = []
    for make in (spec.eager, lambda ps, **kw: spec.kind(ps, **kw, **spec.plain)):
        ps = copy.deepcopy(weights)
        opt = make(ps[:2], lr=0.1, **options)
        joining = nn.Parameter(noise((2, 3), 9))
        for step in range(10):
            if step == 2:
                opt.state.clear()
            if step == 4:
                opt.state[ps[0]]["exp_avg"] = torch.full((5, 4), 0.5)
                opt.state[ps[0]]["step"] = torch.tensor(7.0)
            if step == 6:
                opt.param_groups[0]["params"][1] = ps[2]
            if step == 8:
                opt.param_groups[0]["params"].append(joining)
            for i, p in enumerate([*ps, joining]):
                p.grad = noise(p.shape, 10 * step + i)
            opt.step()
        assert opt.state[ps[2]]["step"] == 4
        assert opt.state[joining]["step"] == 2
        runs.append([*ps, joining, *(opt.state[p][name] for p in (ps[0], ps[2]) for name in spec.states)])
    torch.testing.assert_close(runs[0], runs[1], rtol=1e-6, atol=1e-7)


def moved_to_the_end(groups):
    groups[1]["params"].append(groups[0]["params"].pop())


def moved_to_the_front(groups):
    groups[1]["params"].insert(0, groups[0]["params"].pop(0))


@every
@pytest.mark.parametrize("move", [moved_to_the_end, moved_to_the_front, list.reverse])
def test_parameters_in_another_entry_have_its_hyper_parameters_as_in_torch(move, spec):
    runs = []
    for make in (spec.eager, lambda ps, **kw: spec.kind(ps, **kw, **spec.plain)):
        ps = [nn.Parameter(noise((5, 4), i)) for i in range(4)]
        opt = make([{"params": ps[:3], "lr": 0.1}, {"params": ps[3:], "lr": 1e-3, "weight_decay": 0.5}])
        for step in range(6):
            if step == 2:
                move(opt.param_groups)
            for i, p in enumerate(ps):
                p.grad = noise(p.shape, 10 * step + i)
            opt.step()
        runs.append(ps)
    torch.testing.assert_close(runs[0], runs[1], rtol=1e-6, atol=1e-7)


def test_what_is_saved_after_a_move_resumes_in_the_new_order():
    """The lagged statistics, the groups and the random bits follow the parameters to their places."""

    def make(params):
        return MetaAdamW(
            [{"params": [(f"w{x.numel()}", x)]} for x in params], head_init="xavier", statistics="lagged", grouping=lambda *_: 0,
            state_dtype=torch.float32, stochastic_rounding=True,
        )  # fmt: skip

    def step(opt, params, seed):
        for i, p in enumerate(params):
            p.grad = noise(p.shape, seed + i).to(p.dtype)
        opt.step()

    ps = [nn.Parameter(noise((n,), n).bfloat16()) for n in (5, 9)]
    opt = make(ps)
    step(opt, ps, 1)
    opt.param_groups.reverse()
    saved = copy.deepcopy(opt.state_dict())  # before the next step notices
    assert ["metaadamw" in group for group in saved["param_groups"]] == [True, False]
    assert [x.tolist() for x in opt.groups[0].params] == [x.tolist() for x in reversed(ps)]
    others = [nn.Parameter(p.detach().clone()) for p in ps]
    resumed = make(others[::-1])
    resumed.load_state_dict(saved)
    for _ in range(2):
        step(opt, ps, 7)
        step(resumed, others, 7)
    assert torch.equal(opt.lr_scale, resumed.lr_scale)
    assert torch.equal(opt.statistics, resumed.statistics)
    for p, q in zip(ps, others, strict=True):
        assert torch.equal(p, q)
    opt.param_groups.reverse()  # and back, with a checkpoint taken and loaded in between
    opt.load_state_dict(opt.state_dict())
    step(opt, ps, 11)
    step(resumed, others, 11)
    for p, q in zip(ps, others, strict=True):
        assert not torch.equal(p, q)  # other random bits: they depend on the place
        assert torch.allclose(p, q, rtol=2e-2)


@every
def test_a_removed_entry_leaves_and_another_one_joins(spec):
    a, b, c = (nn.Parameter(torch.ones(3)) for _ in range(3))
    opt = spec.kind([{"params": [a]}, {"params": [b]}])
    del opt.param_groups[0]
    opt.add_param_group({"params": [c]})
    assert not spec.encodes or [group.params for group in opt.groups] == [[b], [c]]
    assert len(opt.statistics) == 2
    a.grad, b.grad, c.grad = torch.ones(3), torch.ones(3), torch.ones(3)
    opt.step()
    assert torch.equal(a, torch.ones(3))
    assert (b < 1).all()
    assert list(opt.state) == [b, c]
    assert (c < 1).all()


@every
def test_entries_of_users_in_state_and_param_groups_are_left_alone(spec):
    p, q = nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(3))
    opt = spec.kind([p, q], lr=0.1)
    opt.state["note"], opt.state["count"] = {"a": 1}, 3
    opt.state[p]["ema"] = torch.zeros(5)
    for params in ([p, q], (p, q), nn.ParameterList([p, q])):
        opt.param_groups[0]["params"] = params
        p.grad, q.grad = torch.ones(5), torch.ones(3)
        opt.step()
    assert (p < 0.8).all()
    assert (q < 0.8).all()
    opt.param_groups[0]["params"] = [p, q]
    saved = opt.state_dict()
    other = spec.kind([nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(3))], lr=0.1)
    other.load_state_dict(saved)
    assert other.state["note"] == {"a": 1}
    assert other.state["count"] == 3
    assert other.state["note"] is not saved["state"]["note"]


def test_a_write_after_a_step_that_was_left_out_is_seen_whatever_the_encoder_s_dtype():
    """The versions that a step without an update has read are not those that the next one begins with."""
    seen = []
    for forget in (False, True):
        p = nn.Parameter(noise((40,), 0))
        opt = MetaAdamW([p], lr=1e-2, skip_nonfinite=True, head_init="xavier")
        for step in range(6):
            p.grad = torch.full((40,), float("nan")) if step == 0 else noise((40,), step)
            if step == 1:
                opt.encoder.double()
            if step in (1, 3):
                with torch.no_grad():
                    p.mul_(3.0)
            if forget:
                opt.invalidate_statistics()
            opt.step()
            seen.append(opt.statistics[0, 3].item())
    assert seen[:6] == seen[6:]


class TwoHeads(nn.Module):
    """A trunk, of which one weight is frozen, with two heads; and a teacher that is no part of it."""

    def __init__(self, dtype):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.trunk, self.heads = nn.Linear(4, 3), nn.ModuleList([nn.Linear(3, 2), nn.Linear(3, 2)])
            self.teacher = nn.Linear(4, 3).requires_grad_(False)
        self.to(dtype)

    def forward(self, x, head):
        return self.heads[head](torch.tanh(self.trunk(x) + self.teacher(x).square())).square().mean()


ROWS = {
    "exact": {},
    "lagged": {"statistics": "lagged"},
    "clipped": {"max_grad_norm": 0.5, "amsgrad": True},
    "masters": {"master_weights": True, "state_dtype": torch.float32},
    "masters, lagged": {"master_weights": True, "statistics": "lagged"},
    "AVGrad": {"spec": AVGRAD},
    "AVGrad, clipped": {"spec": AVGRAD, "max_grad_norm": 0.5},
    "AVGrad, masters": {"spec": AVGRAD, "master_weights": True},
}


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("name", ROWS)
def test_a_step_leaves_alone_what_has_no_gradient(name, backend):
    """In no sense written: a backward pass that waits, through the other head and the teacher, finds what it has saved."""
    dtype = torch.bfloat16 if "masters" in name else torch.float32
    model = TwoHeads(dtype)
    options = dict(ROWS[name])
    opt = options.pop("spec", META)(model.parameters(), backend=backend, **options)
    written_by = {p: [p, *(x for key, x in opt.state[p].items() if key != "step")] for p in model.parameters()}
    opt.step()  # the first one looks through all masters
    for step in range(5):
        used, other = step % 2, 1 - step % 2
        if step == 3:
            with torch.no_grad():
                model.heads[other].weight.mul_(0.5)  # its master follows, and no other one
        waiting = model(noise((5, 4), step).to(dtype), other)
        opt.zero_grad()
        torch.autograd.backward(model(noise((5, 4), 9).to(dtype), used), inputs=list(model.heads[used].parameters()))
        before = {p: [x._version for x in xs] for p, xs in written_by.items()}
        opt.step()
        for p, xs in written_by.items():
            rises = [x._version - y for x, y in zip(xs, before[p], strict=True)]
            if p.grad is not None:
                assert all(rises)
            elif step == 3 and p is model.heads[other].weight:
                assert not any(rises[: 1 + len(opt.rule.always)])
            else:
                assert not any(rises)
        waiting.backward()


def test_the_op_marks_what_it_writes():
    lists = [[torch.ones(3), torch.ones(2), torch.ones(0)] for _ in range(5)]
    lists[1][1] = torch.ones(0)
    params, grads, *states = lists
    ops.adamw_update_(params, grads, *states[:2], 0.1, 1.0, step=1, max_exp_avg_sqs=states[2])
    assert [[x._version for x in xs] for xs in (params, *states)] == [[1, 0, 1]] * 4


@every
def test_memory_that_was_freed_is_refused(spec):
    for freed in ("param", "exp_avg", spec.states[-1], "grad"):
        p = nn.Parameter(torch.ones(3))
        opt = spec.kind([p], backend="cpp")
        p.grad = torch.ones(3)
        opt.step()
        {"param": p, "grad": p.grad}.get(freed, opt.state[p].get(freed)).untyped_storage().resize_(0)
        with pytest.raises(RuntimeError, match="its storage was freed"):
            opt.step()


def test_a_model_on_the_meta_device_gets_its_states_in_the_first_step():
    def train(build):
        torch.manual_seed(0)
        model, opt = build()
        for step in range(3):
            for i, p in enumerate(model.parameters()):
                p.grad = noise(p.shape, 10 * step + i)
            opt.step()
        return [*model.parameters(), *(x for p in model.parameters() for x in opt.state[p].values())]

    def materialised_later():
        with torch.device("meta"):
            model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
        opt = MetaAdamW(model.named_parameters(), model=model)
        assert not opt.state
        assert opt.lr_scale.device.type == "cpu"
        with pytest.raises(RuntimeError, match="meta device"):
            opt.step()
        with pytest.raises(RuntimeError, match="meta device"):
            opt.load_state_dict(copy.deepcopy(opt).state_dict())
        swap = torch.__future__.get_swap_module_params_on_conversion()
        torch.__future__.set_swap_module_params_on_conversion(True)  # so that the parameters stay the same objects
        try:
            model.to_empty(device="cpu")
        finally:
            torch.__future__.set_swap_module_params_on_conversion(swap)
        for layer in model:
            layer.reset_parameters()
        return model, opt

    def at_once():
        model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
        torch.manual_seed(0)
        for layer in model:
            layer.reset_parameters()
        return model, MetaAdamW(model.named_parameters(), model=model)

    torch.testing.assert_close(train(materialised_later), train(at_once), rtol=0, atol=0)


@pytest.mark.parametrize("transfer", [copy.deepcopy, lambda opt: pickle.loads(pickle.dumps(opt))], ids=["copy", "pickle"])
def test_parameters_are_added_to_a_copy_that_knows_no_model(transfer):
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    opt = transfer(MetaAdamW(model.parameters(), model=model))
    groups = [(group.name, group.names) for group in opt.groups]
    opt.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    assert [(group.name, group.names) for group in opt.groups[: len(groups)]] == groups
    assert opt.groups[-1].names == ["parameter 4"]


# ----------------------------------------------------------------------------------------------- all of it at random moments


def through_one_vector(ps, opt):
    whole = [ps[0], ps[5]]
    nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(whole).detach() * 0.9, whole)


class Owner(nn.Module):
    """A model of these very parameters."""

    def __init__(self, ps):
        super().__init__()
        self.ps = nn.ParameterList(ps)


def meta_update(ps, opt):
    def loss(model, batch):
        return sum(((p * (batch + i)).double().square().sum() for i, p in enumerate(model.ps)), torch.zeros(()))

    MetaLearner(opt, Owner(ps), loss, objective="gradient").update(0.1, 0.2)


def called_off(ps, opt):
    """By a GradScaler that found an infinite gradient."""
    for p in ps:
        p.grad = torch.full_like(p, float("inf"))
    opt.found_inf = torch.ones(1)
    opt.step()
    del opt.found_inf


EVENTS = {
    "nothing": lambda ps, opt: None,
    "in place": lambda ps, opt: [p.detach().mul_(0.9) for p in ps],
    "data": lambda ps, opt: [setattr(p, "data", p.data * 0.9) for p in ps],
    "data twice": lambda ps, opt: [setattr(p, "data", p.data * 0.9) for _ in range(2) for p in ps],
    "vector_to_parameters": through_one_vector,
    "transposed": lambda ps, opt: setattr(ps[1], "data", ps[1].data.t().contiguous().t()),
    "load_state_dict": lambda ps, opt: opt.load_state_dict(copy.deepcopy(opt.state_dict())),
    "second moments": lambda ps, opt: opt.state[ps[0]]["exp_avg_sq"].mul_(1.1),
    "new second moments": lambda ps, opt: opt.state[ps[0]].update(exp_avg_sq=opt.state[ps[0]]["exp_avg_sq"] * 1.1),
    "cleared": lambda ps, opt: opt.state.pop(ps[2], None),
    "amsgrad": lambda ps, opt: opt.param_groups[0].update(amsgrad=not opt.param_groups[0]["amsgrad"]),
    "behind the back": lambda ps, opt: (ps[0].data.mul_(0.9), opt.invalidate_statistics()),
    "double precision": lambda ps, opt: setattr(ps[3], "data", ps[3].data.double()),
    "a meta-update": meta_update,
    "a step called off": called_off,
}


CASES = [
    *(("cpp", seed, {}) for seed in range(3)),
    ("reference", 0, {}),
    *(("cpp", seed, {"statistics": "lagged"}) for seed in range(2)),
    ("reference", 0, {"statistics": "lagged"}),
    ("cpp", 0, {"statistics": "lagged", "max_grad_norm": 1.0}),
    ("cpp", 0, {"max_grad_norm": 1.0}),
]


@pytest.mark.parametrize(("backend", "seed", "options"), CASES, ids=str)
@pytest.mark.parametrize("decides", ["host", "device"])
def test_carried_sums_are_those_of_a_full_pass_whatever_happens_between_steps(decides, backend, seed, options, monkeypatch):
    """200 steps with an event at every other, bitwise: against an optimizer that forgets its sums before every step."""
    if decides == "device":
        monkeypatch.setattr(devices, "readable", lambda x: False)
    runs = []
    for forget in (False, True):
        rng = random.Random(seed)
        ps = [nn.Parameter(noise(shape, i)) for i, shape in enumerate([(70, 30), (9, 9), (), (5,), (0, 3), (40_000,)])]
        opt = MetaAdamW(ps, lr=1e-3, backend=backend, grouping="param_groups", head_init="xavier", amsgrad=seed == 1, **options)
        history = []
        for step in range(200):
            EVENTS[rng.choice(list(EVENTS)) if step % 2 else "nothing"](ps, opt)
            for i, p in enumerate(ps):
                p.grad = None if step > 100 and rng.random() < 0.2 else noise(p.shape, 10 * step + i).to(p.dtype)
            if forget:
                opt.invalidate_statistics()
            opt.step()
            history.append(opt.statistics)
        runs.append([torch.stack(history), *ps, *(x for p in ps for x in opt.state[p].values())])
    assert torch.isfinite(runs[0][0]).all()
    torch.testing.assert_close(runs[0], runs[1], rtol=0, atol=0)


@pytest.mark.parametrize("expected_objects", [ops.expected_objects, ops._expected_objects])
def test_expected_objects_are_told_by_identity_in_their_order(expected_objects):
    a, b, c = torch.ones(2), torch.ones(2), 1.0
    expected = ops.addresses_of([a, b, c])
    found = expected_objects([[a], {"x": b, "y": c}, [], {}], expected)
    assert all(x is y for x, y in zip(found, [a, b, c], strict=True))
    assert expected_objects([], ops.addresses_of([])) == []
    for containers in ([[b], {"x": a}, [c]], [[a, b]], [[a], [b], [c], [c]], [[a.clone()], [b], [c]], [{"x": a, "y": b, "z": 2.0}]):
        assert expected_objects(containers, expected) is None


@pytest.mark.parametrize("expected_objects", [ops.expected_objects, ops._expected_objects])
def test_expected_objects_hold_nothing_alive(expected_objects):
    a = torch.ones(2)
    alive, before = weakref.ref(a), sys.getrefcount(a)
    expected = ops.addresses_of([a])
    for _ in range(10):
        expected_objects([[a]], expected)
        expected_objects([[a, 1]], expected)
    assert sys.getrefcount(a) == before
    del a
    assert alive() is None
