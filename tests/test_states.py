"""Which parameters have a state, when they get it, whose memory it holds, and what it counts: beside torch.optim.AdamW."""

import copy
import functools
import gc
import io
import pickle
import sys
import weakref

import pytest
import torch
from torch import nn

from metaadamw_fast import FeatureConfig, MetaAdamW, MetaLearner

from .models import noise, one_thread  # noqa: F401
from .optimizers import META, MOMENTS, every, every_with

BACKENDS = ["cpp", "reference"]


def parameter(shape, seed, *, trained=True, dtype=torch.float32):
    return nn.Parameter(noise(shape, seed).to(dtype), requires_grad=trained)


def give_gradients(params, seed):
    for i, p in enumerate(params):
        p.grad = noise(p.shape, 100 * seed + i, p.dtype)


def same_as_torch(spec, scenario, **tolerance):
    """Runs ``scenario(make)``, which returns tensors, with both optimizers."""
    expected, found = (
        scenario(functools.partial(kind, **options)) for kind, options in ((spec.eager, {}), (spec.kind, spec.plain))
    )
    torch.testing.assert_close(found, expected, **{"rtol": 1e-6, "atol": 1e-7, **tolerance})


# ------------------------------------------------------------------------------------------------------- frozen parameters


@every
@pytest.mark.parametrize("backend", BACKENDS)
def test_frozen_parameters_have_no_state(backend, spec):
    frozen, trained = parameter((4, 3), 0, trained=False), parameter((5,), 1)
    opt = spec.kind([frozen, trained], backend=backend, **({} if spec.encodes else {"max_grad_norm": 1e9}))
    before = frozen.detach().clone(), frozen._version
    for step in range(3):
        give_gradients([trained], step)
        opt.step()
    assert list(opt.state) == [trained]
    assert list(opt.state_dict()["state"]) == [1]
    assert torch.equal(frozen, before[0])
    assert frozen._version == before[1]
    assert opt.steps_done == 3
    expected = torch.zeros_like(opt.statistics[0])
    if spec.encodes:
        expected[3] = frozen.square().sum()
    torch.testing.assert_close(opt.statistics[0], expected)
    torch.testing.assert_close(opt.grad_norm.float(), trained.grad.norm())


@pytest.mark.parametrize("statistics", ["exact", "lagged"])
@pytest.mark.parametrize("version", ["basic", "enhanced"])
def test_scales_are_those_of_a_frozen_parameter_with_zero_moments(statistics, version):
    """The same numbers as when the frozen parameter has moments of zeros, which it had in earlier versions."""
    options = {"features": FeatureConfig(version), "head_init": "xavier", "statistics": statistics}
    runs = []
    for with_state in (False, True):
        params = [parameter((4, 3), 0, trained=False), parameter((5,), 1), parameter((2, 2), 2)]
        names = [("embed.weight", params[0]), ("mlp.0.bias", params[1]), ("attn.1.weight", params[2])]
        opt = MetaAdamW(names, **options)
        if with_state:
            opt.state[params[0]] = {name: torch.zeros(4, 3) for name in MOMENTS}
        for step in range(4):
            give_gradients(params[1:], step)
            opt.step()
        assert (params[0] in opt.state) == with_state
        runs.append([*params, opt.features, opt.lr_scale, opt.wd_scale, opt.statistics])
    torch.testing.assert_close(runs[0], runs[1], rtol=1e-6, atol=1e-7)


def test_the_norm_of_a_frozen_parameter_is_read_again_only_when_it_changes(monkeypatch):
    frozen, trained = parameter((4, 3), 0, trained=False), parameter((5,), 1)
    opt = MetaAdamW([frozen, trained])
    launched = []
    kind = opt._backend.launch
    original = kind.__init__

    def counted(self, *args, **options):
        launched.append(options["written"])
        original(self, *args, **options)

    monkeypatch.setattr(kind, "__init__", counted)

    def norm():
        give_gradients([trained], len(launched))
        opt.step()
        return opt.statistics[0, 3].item()

    first = norm()
    reads = len(launched)
    assert norm() == first
    assert len(launched) == reads
    with torch.no_grad():
        frozen.mul_(2)
    assert norm() == pytest.approx(4 * first)
    frozen.data = frozen.data * 2
    assert norm() == pytest.approx(16 * first)
    frozen.data.mul_(2)  # which nothing shows
    assert norm() == pytest.approx(16 * first)
    opt.invalidate_statistics()
    assert norm() == pytest.approx(64 * first)


@every
def test_a_frozen_parameter_is_trained_from_its_first_gradient_on(spec):
    def scenario(make):
        late, trained = parameter((4, 3), 0, trained=False), parameter((5,), 1)
        opt = make([late, trained], lr=0.1)
        for step in range(6):
            if step == 3:
                late.requires_grad_(True)
            give_gradients([trained, *([late] if step >= 4 else [])], step)
            opt.step()
        assert opt.state[late]["step"] == 2
        return [late, trained, opt.state[late]["exp_avg"]]

    same_as_torch(spec, scenario)


@every
def test_a_parameter_frozen_after_training_keeps_its_state(spec):
    def scenario(make):
        params = [parameter((4, 3), 0), parameter((5,), 1)]
        opt = make(params, lr=0.1)
        for step in range(6):
            params[0].requires_grad_(step not in (2, 3))
            give_gradients(params, step)
            if not params[0].requires_grad:
                params[0].grad = None
            opt.step()
        assert opt.state[params[0]]["step"] == 4
        return params

    same_as_torch(spec, scenario)


@every
def test_checkpoints_of_earlier_versions_had_states_of_frozen_parameters(spec):
    frozen, trained = parameter((4, 3), 0, trained=False), parameter((5,), 1)
    opt = spec.kind([frozen, trained])
    give_gradients([trained], 0)
    opt.step()
    checkpoint = copy.deepcopy(opt.state_dict())
    zeros = {"step": torch.tensor(0.0), **{name: torch.zeros(4, 3) for name in MOMENTS}, "slow": torch.ones(2)}
    checkpoint["state"][0] = zeros
    fresh = spec.kind([parameter((4, 3), 0, trained=False), parameter((5,), 1)])
    fresh.load_state_dict(checkpoint)
    of_frozen, of_trained = (fresh.state[p] for p in fresh.param_groups[0]["params"])
    assert list(of_frozen) == ["slow"]
    assert of_trained["step"] == 1
    trained_once = copy.deepcopy(checkpoint)
    trained_once["state"][0]["step"] = torch.tensor(1.0)
    fresh.load_state_dict(trained_once)
    assert {*spec.states, "step"} <= fresh.state[fresh.param_groups[0]["params"][0]].keys()


@every
def test_all_parameters_frozen(spec):
    def scenario(make):
        p = parameter((4, 3), 0, trained=False)
        opt = make([p])
        opt.step()
        opt.load_state_dict(opt.state_dict())
        p.grad = torch.ones(4, 3)
        opt.step()
        return p

    same_as_torch(spec, scenario)


# ----------------------------------------------------------------------------------------------------- parameters of any kind


def exotic():
    shared = torch.zeros(6)
    return {
        "integer": nn.Parameter(torch.arange(5), requires_grad=False),
        "bool": nn.Parameter(torch.ones(2) > 0, requires_grad=False),
        "complex": nn.Parameter(torch.ones(3, dtype=torch.complex64), requires_grad=False),
        "sparse": nn.Parameter(torch.eye(3).to_sparse(), requires_grad=False),
        "expanded": nn.Parameter(torch.ones(1).expand(4), requires_grad=False),
        "meta": nn.Parameter(torch.ones(3, device="meta"), requires_grad=False),
        "float8": nn.Parameter(torch.ones(4).to(torch.float8_e4m3fn), requires_grad=False),
        "empty": nn.Parameter(torch.empty(0), requires_grad=False),
        "tied": nn.Parameter(shared[:4], requires_grad=False),
        "tied again": nn.Parameter(shared[2:], requires_grad=False),
        "lazy": nn.parameter.UninitializedParameter(requires_grad=False),
    }


@every_with(MetaAdamW=[{"grouping": "param_groups"}, {"grouping": "fine_grained"}], AVGrad=[{}])
@pytest.mark.parametrize("backend", BACKENDS)
def test_frozen_parameters_of_any_kind_are_left_alone(backend, spec, options):
    kinds, trained = exotic(), parameter((5,), 1)
    opt = spec.kind([*kinds.items(), ("w", trained)], backend=backend, **options)
    for step in range(2):
        give_gradients([trained], step)
        opt.step()
        opt.load_state_dict(opt.state_dict())
    assert list(opt.state) == [trained]
    assert opt.statistics.isfinite().all()
    if not spec.encodes:
        return
    sums = dict(zip([*kinds, "w"], opt.statistics[:, 3].tolist(), strict=True))
    assert sums["complex"] == 3
    assert sums["expanded"] == 4
    assert sums["float8"] == 4
    assert sums["integer"] == sums["sparse"] == sums["meta"] == sums["lazy"] == 0


@every
@pytest.mark.parametrize("kind", ["sparse", "expanded"])
def test_the_gradient_of_what_cannot_be_updated_is_refused(kind, spec):
    p, trained = exotic()[kind], parameter((5,), 1)
    opt = spec.kind([p, trained])
    before = trained.detach().clone()
    p.requires_grad_(True)
    p.grad = p.detach().clone()
    give_gradients([trained], 0)
    with pytest.raises(ValueError, match=r"dense|expanded"):
        opt.step()
    assert torch.equal(trained, before)
    assert p not in opt.state
    assert opt.steps_done == 0
    p.grad = None
    opt.step()
    assert opt.steps_done == 1


@every
def test_what_is_trained_and_cannot_be_updated_is_refused_at_once(spec):
    for p in (nn.Parameter(torch.eye(3).to_sparse()), nn.Parameter(torch.ones(1).expand(4))):
        with pytest.raises(ValueError, match=r"dense|expanded"):
            spec.kind([p])
    with pytest.raises(ValueError, match="on one device"):
        spec.kind([parameter((2,), 0), nn.Parameter(torch.ones(3, device="meta"))])


@every
def test_conjugated_gradients(spec):
    """Autograd hands out views that are conjugated when they are read."""
    runs = []
    for conjugate in (torch.conj, torch.conj_physical):
        p = parameter((4, 3), 0, dtype=torch.complex64)
        opt = spec.kind([p])
        for step in range(2):
            p.grad = conjugate(noise((4, 3), step, torch.complex64) * (1 + 2j))
            opt.step()
        runs.append(p)
    assert torch.equal(*runs)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
@every_with({}, {"maximize": True}, MetaAdamW=[{"amsgrad": True}])
def test_complex_parameters_are_trained_as_in_torch(dtype, spec, options):
    def scenario(make):
        params = [parameter((4, 3), 0, dtype=dtype), parameter((5,), 1, dtype=torch.float64)]
        opt = make(params, lr=0.1, **options)
        for step in range(3):
            give_gradients(params, step)
            params[0].grad = params[0].grad * (1 + 2j)
            opt.step()
        loaded = make(params, lr=0.1, **options)
        loaded.load_state_dict(copy.deepcopy(opt.state_dict()))
        give_gradients(params, 3)
        loaded.step()
        return [*params, *(loaded.state[params[0]][name] for name in spec.states)]

    same_as_torch(spec, scenario, rtol=1e-5, atol=1e-6)


def test_the_statistics_of_a_complex_parameter_are_those_of_its_real_view():
    runs = []
    for as_real in (False, True):
        p = parameter((4, 3), 0, dtype=torch.complex64)
        grad = noise((4, 3), 1, torch.complex64)
        if as_real:
            p, grad = nn.Parameter(torch.view_as_real(p.detach())), torch.view_as_real(grad)
        opt = MetaAdamW([("w", p)], head_init="xavier", features="enhanced")
        p.grad = grad
        opt.step()
        runs.append([opt.statistics, opt.features, opt.lr_scale, torch.view_as_real(p.detach()) if p.is_complex() else p.detach()])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@every
def test_lazy_modules(spec):
    def scenario(make):
        model = nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 2))
        opt = make(model.parameters(), lr=0.1)
        model(noise((4, 5), 0))
        with torch.no_grad():
            for i, p in enumerate(model.parameters()):
                p.copy_(noise(p.shape, i))
        for step in range(2):
            opt.zero_grad()
            model(noise((4, 5), step)).square().sum().backward()
            opt.step()
        return list(model.parameters())

    same_as_torch(spec, scenario)


# ------------------------------------------------------------------------------------------------------ when they are allocated


@every
def test_states_are_allocated_in_the_constructor_or_at_the_first_step(spec):
    for allocate in ("eager", "lazy"):
        params = [parameter((4, 3), 0), parameter((5,), 1), parameter((2,), 2, trained=False)]
        opt = spec.kind(params, allocate=allocate)
        assert len(opt.state) == (2 if allocate == "eager" else 0)
        give_gradients(params[:1], 0)
        opt.step()
        assert list(opt.state) == params[:2]  # also of a trained parameter that had no gradient yet
        assert opt.state[params[1]]["step"] == 0
    with pytest.raises(ValueError, match="Invalid allocate: 'never'"):
        spec.kind(params, allocate="never")


@every
def test_checkpoints_load_before_a_lazy_first_step(spec):
    params = [parameter((4, 3), 0), parameter((5,), 1)]
    opt = spec.kind(params)
    for step in range(3):
        give_gradients(params, step)
        opt.step()
    saved = copy.deepcopy(opt.state_dict())
    others = copy.deepcopy(params)
    lazy = spec.kind(others, allocate="lazy")
    lazy.load_state_dict(saved)
    for run, ps in ((opt, params), (lazy, others)):
        give_gradients(ps, 3)
        run.step()
    assert all(torch.equal(a, b) for a, b in zip(params, others, strict=True))
    assert lazy.steps_done == 4
    assert [s["step"].item() for s in lazy.state.values()] == [4, 4]


@every_with(MetaAdamW=[{"features": "enhanced"}], AVGrad=[{}])
def test_a_group_that_is_refused_leaves_nothing_behind(spec, options):
    memory = torch.zeros(8)
    first, overlapping = nn.Parameter(memory[:6]), nn.Parameter(memory[4:])
    opt = spec.kind([("a", first)], **options)
    before = copy.deepcopy(opt.state_dict())
    with pytest.raises(RuntimeError, match="share memory"):
        opt.add_param_group({"params": [("b", overlapping)]})
    assert len(opt.param_groups) == len(opt.statistics) == 1
    if spec.encodes:
        assert len(opt.groups) == 1
    assert list(opt.state) == [first]
    assert str(opt.state_dict()) == str(before)
    first.grad = torch.ones(6)
    opt.step()
    opt.add_param_group({"params": [("b", parameter((2,), 0))]})
    if spec.encodes:
        assert len(opt.groups) == len(opt.encoder.group_embeddings)
    opt.step()
    assert opt.steps_done == 2


# -------------------------------------------------------------------------------------------------- whose memory they hold


@every
@pytest.mark.parametrize("backend", BACKENDS)
def test_replaced_memory_is_free_at_once(backend, spec):
    params = [parameter((64, 3), 0), parameter((5,), 1)]
    opt = spec.kind(params, backend=backend, **({"amsgrad": True} if spec is META else {}))
    give_gradients(params, 0)
    opt.step()
    opt.zero_grad()
    if backend == "reference":
        opt.step()  # whose launch holds the gradients of the last step
    tensors = [x for s in opt.state.values() for name, x in s.items() if name != "step"]
    alive = [weakref.ref(x) for x in tensors] + [weakref.ref(x.untyped_storage()) for x in tensors]
    alive += [weakref.ref(p.data.untyped_storage()) for p in params]
    del tensors
    for p in params:
        for name in opt.state[p].keys() - {"step"}:
            opt.state[p][name] = opt.state[p][name].clone()
        p.data = p.data.clone()
    gc.collect()
    assert [reference() for reference in alive] == [None] * len(alive)
    give_gradients(params, 1)
    opt.step()
    assert opt.steps_done == (2 if backend == "cpp" else 3)


@every
def test_memory_that_comes_back_at_the_same_address_is_noticed(spec):
    """An allocator gives the memory of a freed tensor to the next one of its size."""

    def scenario(make):
        p = parameter((1000,), 0)
        opt = make([p], lr=0.1)
        for step in range(6):
            give_gradients([p], step)
            opt.step()
            opt.state[p]["exp_avg"] = None
            opt.state[p]["exp_avg"] = torch.full((1000,), 0.1 * step)
        return [p.detach(), opt.state[p]["exp_avg"]]

    same_as_torch(spec, scenario)


@every
def test_release(spec):
    params = [parameter((64, 3), 0), parameter((5,), 1)]
    opt = spec.kind(params, **({"encoder_graph": True} if spec.encodes else {}))
    give_gradients(params, 0)
    opt.step()
    kept = [weakref.ref(x) for x in (opt._states, opt._states.launch, *([opt._table] if spec.encodes else []))]
    opt.release()
    gc.collect()
    assert [reference() for reference in kept] == [None] * len(kept)
    other = copy.deepcopy(opt)
    for run in (opt, other):
        ps = run.param_groups[0]["params"]
        give_gradients(ps, 1)
        run.step()
        run.release()
        run.step()
    assert opt.steps_done == other.steps_done == 3
    assert all(torch.equal(a, b) for a, b in zip(params, other.param_groups[0]["params"], strict=True))


@every
def test_states_of_parameters_that_left_go(spec):
    for leave in (lambda opt: opt.step(), lambda opt: opt.state_dict(), lambda opt: opt.release()):
        params = [parameter((4,), i) for i in range(3)]
        opt = spec.kind(params)
        give_gradients(params, 0)
        opt.step()
        del opt.param_groups[0]["params"][1]
        opt.zero_grad()
        leave(opt)
        assert list(opt.state) == [params[0], params[2]]


# ------------------------------------------------------------------------------------------------------------------- counts


@every
def test_a_count_is_a_small_tensor_of_its_own(spec):
    params = [parameter((1,), i) for i in range(200)]
    opt = spec.kind(params)
    give_gradients(params, 0)
    opt.step()
    step = opt.state[params[0]]["step"]
    assert (step.dtype, step.shape, step.item()) == (torch.float32, (), 1)
    sizes = []
    for x in (step, torch.tensor(1.0)):
        file = io.BytesIO()
        torch.save(x, file)
        sizes.append(file.tell())
    assert sizes[0] == pytest.approx(sizes[1], abs=64)


@every
@pytest.mark.parametrize("allocate", ["eager", "lazy"])
def test_counts_beyond_float32(allocate, spec):
    """One is exact, whatever what is shown can hold."""
    params = [parameter((3,), 0), parameter((5,), 1)]
    opt = spec.kind(params, allocate=allocate)
    give_gradients(params, 0)
    opt.step()
    for p in params:
        opt.state[p]["step"].fill_(2.0**24)
    opt.steps_done = 2**24
    for _ in range(3):
        opt.step()
    assert opt.steps_done == 2**24 + 3
    assert opt._counts.tolist() == [2**24 + 3.0] * 3
    fresh = spec.kind(copy.deepcopy(params), allocate=allocate)
    fresh.load_state_dict(opt.state_dict())
    fresh.step()
    assert fresh._counts.tolist()[2] == 2**24 + 3.0 + 1
    for p in fresh.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    fresh.step()
    assert fresh._counts.tolist() == [2**24 + 4.0, 2**24 + 4.0, 2**24 + 5.0]
    for copied in (copy.deepcopy(fresh), pickle.loads(pickle.dumps(fresh))):
        assert copied._counts.tolist() == fresh._counts.tolist()


@every
def test_checkpoints_without_exact_counts_load(spec):
    params = [parameter((3,), 0)]
    opt = spec.kind(params)
    give_gradients(params, 0)
    opt.step()
    saved = copy.deepcopy(opt.state_dict())
    for extra in (saved[spec.key], saved["param_groups"][0][spec.key]):
        extra.pop("steps", None)
    fresh = spec.kind(copy.deepcopy(params))
    fresh.load_state_dict(saved)
    assert fresh._counts.tolist() == [1, 1]


def written_in_place(opt, p):
    opt.state[p]["step"].fill_(7)


def replaced(opt, p):
    opt.state[p]["step"] = torch.tensor(7.0)


def replaced_by_float64(opt, p):
    opt.state[p]["step"] = torch.tensor(7.0, dtype=torch.float64)


def replaced_by_a_view(opt, p):
    opt.state[p]["step"] = torch.full((3,), 7.0)[1]


def loaded_by_hand(opt, p):
    opt.state[p].update(copy.deepcopy({**opt.state[p], "step": torch.tensor(7.0)}))


@every
@pytest.mark.parametrize("write", [written_in_place, replaced, replaced_by_float64, replaced_by_a_view, loaded_by_hand])
def test_counts_that_users_write_are_the_counts(write, spec):
    def scenario(make):
        params = [parameter((4, 3), 0), parameter((5,), 1)]
        opt = make(params, lr=0.1)
        for step in range(6):
            if step == 3:
                write(opt, params[0])
            give_gradients(params, step)
            opt.step()
        assert [opt.state[p]["step"].item() for p in params] == [10, 6]
        return params

    same_as_torch(spec, scenario)


@every
def test_a_count_of_the_users_own_stays_the_object_that_it_was(spec):
    p, step = parameter((3,), 0), torch.tensor(4.0)
    opt = spec.kind([p])
    opt.state[p]["step"] = step
    for _ in range(2):
        give_gradients([p], 0)
        opt.step()
    assert opt.state[p]["step"] is step
    assert step == 6


@every
def test_optimizers_that_share_their_states_share_the_counts(spec):
    """As processes do that step one shared model: what one counts, the other goes on from."""

    def scenario(make):
        p = parameter((4, 3), 0)
        runs = [make([p], lr=0.1) for _ in range(2)]
        give_gradients([p], 0)
        runs[0].step()
        state = {name: x.clone().share_memory_() for name, x in runs[0].state[p].items()}
        for opt in runs:
            opt.state[p] = dict(state)
        for turn in range(6):
            give_gradients([p], turn)
            runs[turn % 2].step()
        assert state["step"] == 7
        assert all(opt.state[p]["step"] is state["step"] for opt in runs)
        return p

    same_as_torch(spec, scenario)


@every
def test_shared_states_without_a_copy_of_the_count(spec):
    def scenario(make):
        p = parameter((4, 3), 0)
        opt = make([p], lr=0.1)
        give_gradients([p], 0)
        opt.step()
        for x in opt.state[p].values():
            x.share_memory_()
        step = opt.state[p]["step"]
        for turn in range(3):
            step += 1  # another process
            give_gradients([p], turn)
            opt.step()
        assert step == 7
        return p

    same_as_torch(spec, scenario)


# ------------------------------------------------------------------------------------- param groups that others change


def resume_fine_tuning(make):
    head, backbone = nn.Linear(2, 2), nn.Linear(2, 2)
    with torch.no_grad():
        for i, p in enumerate([*head.parameters(), *backbone.parameters()]):
            p.copy_(noise(p.shape, i))
    first = make(head.parameters(), lr=0.1)
    first.add_param_group({"params": list(backbone.parameters()), "lr": 0.01})
    params = [*head.parameters(), *backbone.parameters()]
    for step in range(2):
        give_gradients(params, step)
        first.step()
    saved, groups = copy.deepcopy(first.state_dict()), [dict(g) for g in first.param_groups]
    second = make(head.parameters(), lr=0.1)
    second.param_groups = groups
    second.load_state_dict(saved)
    for step in range(2, 4):
        give_gradients(params, step)
        second.step()
    return params


def shortened(make):
    params = [parameter((3,), i) for i in range(4)]
    opt = make([{"params": params[:2]}, {"params": params[2:], "lr": 0.5}], lr=0.1)
    for step in range(4):
        if step == 2:
            del opt.param_groups[0]
        give_gradients(params, step)
        opt.step()
    return params


def reordered_and_lengthened(make):
    params = [parameter((2 + i,), i) for i in range(5)]
    opt = make(params[:3], lr=0.1)
    for step in range(6):
        if step == 2:
            opt.param_groups[0]["params"] = [params[3], params[2], params[0]]
        if step == 4:
            opt.param_groups.append({**opt.param_groups[0], "params": [params[4]], "lr": 0.3})
        give_gradients(params, step)
        opt.step()
    return params


@every
@pytest.mark.parametrize("scenario", [resume_fine_tuning, shortened, reordered_and_lengthened])
def test_param_groups_that_others_change_are_taken_up_as_in_torch(scenario, spec):
    same_as_torch(spec, scenario)


@pytest.mark.parametrize("grouping", ["param_groups", "fine_grained"])
def test_groups_follow_what_joins_and_leaves(grouping):
    params = {
        "embed.weight": parameter((3, 2), 0),
        "layers.0.mlp.weight": parameter((2, 2), 1),
        "layers.1.attn.weight": parameter((4, 2), 2),
        "head.bias": parameter((2,), 3),
    }
    named = list(params.items())
    opt = MetaAdamW([{"params": [pair]} for pair in named[:3]], grouping=grouping, features="enhanced", head_init="xavier")
    give_gradients(params.values(), 0)
    opt.step()
    kept = [list(opt.encoder.group_embeddings)[g] for g in (1, 2)]
    scales, statistics = opt.lr_scale.clone(), opt.statistics.clone()
    del opt.param_groups[0]
    opt.state_dict()
    assert [group.names for group in opt.groups] == [[name] for name, _ in named[1:3]]
    assert [group.members for group in opt.groups] == [[0], [1]]
    assert all(a is b for a, b in zip(opt.encoder.group_embeddings, kept, strict=True))
    assert torch.equal(opt.lr_scale, scales[1:])
    assert torch.equal(opt.statistics, statistics[1:])
    opt.param_groups.append({**opt.param_groups[0], "params": [params["head.bias"]], "param_names": ["head.bias"]})
    give_gradients(params.values(), 1)
    opt.step()
    assert [group.names for group in opt.groups] == [[name] for name, _ in named[1:]]
    assert opt.features.shape[0] == opt.lr_scale.shape[0] == 3
    assert opt.features.isfinite().all()
    assert params["embed.weight"] not in opt.state


@every
def test_a_parameter_listed_twice(spec):
    p, q = parameter((3,), 0), parameter((2,), 1)
    opt = spec.kind([p, q])
    opt.param_groups.append({**opt.param_groups[0], "params": [p]})
    saved = opt.state_dict()
    assert [group["params"] for group in saved["param_groups"]] == [[0, 1], [0]]
    give_gradients([p, q], 0)
    with pytest.raises(ValueError, match="duplicate"):
        opt.step()
    del opt.param_groups[1]
    opt.step()
    assert opt.steps_done == 1


def test_meta_updates_with_frozen_and_late_parameters():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    for p in model[0].parameters():
        p.requires_grad_(False)
    opt = MetaAdamW(model.named_parameters(), lr=0.05)

    def loss_fn(model, batch):
        return model(batch).square().mean()

    learner = MetaLearner(opt, model, loss_fn)
    for step in range(4):
        opt.zero_grad()
        loss_fn(model, noise((5, 3), step)).backward()
        opt.step()
        if step == 2:
            model[0].weight.requires_grad_(True)
        before = [p.detach().clone() for p in model.parameters()]
        report = learner.update(noise((5, 3), 10), noise((5, 3), 11), noise((5, 3), 12))
        assert report.total.isfinite()
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
    assert opt.state.keys() == {model[0].weight, *model[2].parameters()}


@every
def test_the_optimizer_counts_no_references_of_its_own(spec):
    p = parameter((3,), 0)
    opt = spec.kind([p])
    give_gradients([p], 0)
    opt.step()
    state = opt.state[p]["exp_avg"]
    before = sys.getrefcount(state)
    for step in range(5):
        give_gradients([p], step)
        opt.step()
    assert sys.getrefcount(state) == before
