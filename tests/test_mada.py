"""MADA: what is its own beside the numbers: states, names, checkpoints of others, sets of coefficients, errors."""

import copy
import functools
import pickle
import warnings

import pytest
import torch
from torch import nn

from metaadamw_fast import MADA, AVGrad, MetaAdamW
from metaadamw_fast.core import devices
from metaadamw_fast.mada import COEFFICIENTS, Semantics
from tests.optimizers import LEARNING, MADA_STATES


def params_of(*shapes, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for shape in shapes]


def give_gradients(params, step, missing=()):
    generator = torch.Generator().manual_seed(1000 + step)
    for i, p in enumerate(params):
        grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
        p.grad = None if i in missing else grad


def train(opt, params, steps, first=0, missing=()):
    for step in range(first, first + steps):
        give_gradients(params, step, missing)
        opt.step()


SHAPES = ((7, 5), (11,), (3, 4))
FIXED = dict.fromkeys(COEFFICIENTS, 0.0)
HYPER_ADAM = {**FIXED, "beta1": 5e-4, "beta2": 5e-4}


# ------------------------------------------------------------------------------------------------------- states and their names


@pytest.mark.parametrize(
    ("options", "states"),
    [
        ({}, MADA_STATES),
        ({"variant": "released"}, MADA_STATES[:-1]),
        ({"hyper_lr": 0.0}, MADA_STATES[:2]),
        ({"hyper_lr": 0.0, "rho": 0.0}, MADA_STATES[:3]),
        ({"hyper_lr": 0.0, "c": 0.5}, MADA_STATES[:2]),
        ({"hyper_lr": 0.0, "gamma": 0.5}, ("exp_avg", "exp_avg_sq", "lion_exp_avg")),
        ({"hyper_lr": 0.0, "beta3": 0.5}, ("exp_avg", "exp_avg_sq", "exp_avg_diff", "last_grad")),
        ({"hyper_lr": 0.0, "beta3": 0.5, "variant": "released"}, ("exp_avg", "exp_avg_sq", "exp_avg_diff")),
        ({"hyper_lr": HYPER_ADAM}, ("exp_avg", "exp_avg_sq", "last_grad")),
        ({"hyper_lr": {**HYPER_ADAM, "gamma": 0.1}}, ("exp_avg", "exp_avg_sq", "lion_exp_avg", "last_grad")),
        ({"hyper_lr": {**HYPER_ADAM, "rho": 0.1}}, ("exp_avg", "exp_avg_sq", "average_sq", "last_grad")),
    ],
    ids=str,
)
def test_what_is_fixed_where_its_part_vanishes_takes_its_states_along(options, states):
    params = params_of(*SHAPES)
    opt = MADA(params, **options)
    train(opt, params, 3)
    assert all(opt.state[p].keys() == {"step", *states} for p in params)


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.1}, {"statistics": "lagged"}], ids=str)
def test_the_last_gradients_bear_the_right_names_after_every_step(options, backend):
    params = params_of(*SHAPES)
    opt = MADA(params, backend=backend, **LEARNING, **options)
    last, previous = ({p: torch.zeros_like(p) for p in params} for _ in range(2))
    for step in range(7):
        give_gradients(params, step, missing=[1] if step in (2, 3, 5) else [])
        opt.step()
        for p in params:
            if p.grad is not None:
                last[p], previous[p] = p.grad.clone(), last[p]
            assert torch.equal(opt.state[p]["last_grad"], last[p])
            assert torch.equal(opt.state[p]["previous_grad"], previous[p])


@pytest.mark.parametrize("change", ["pickle", "deepcopy", "checkpoint", "release", "added group", "replaced state"])
@pytest.mark.parametrize("steps", [3, 4])
def test_whatever_lists_the_states_anew_keeps_what_is_known(change, steps):
    """Also between an odd number of steps and an even one: which buffer has the last gradient must not get lost."""
    runs = []
    for changes in (False, True):
        params = params_of(*SHAPES)
        opt = MADA(params, lr=1e-2, **LEARNING)
        train(opt, params, steps)
        if changes and change in ("pickle", "deepcopy"):
            both = [opt, params]
            opt, params = copy.deepcopy(both) if change == "deepcopy" else pickle.loads(pickle.dumps(both))
        elif changes and change == "checkpoint":
            twin = MADA(params, lr=1e-2, **LEARNING)
            twin.load_state_dict(opt.state_dict())
            opt = twin
        elif changes and change == "release":
            opt.release()
        elif changes and change == "added group":
            opt.add_param_group({"params": params_of((2,), seed=5)})
        elif changes and change == "replaced state":
            opt.state[params[0]]["last_grad"] = opt.state[params[0]]["last_grad"].clone()
        train(opt, params, 5, first=steps)
        runs.append([*params, *(opt.state[p][name] for p in params for name in MADA_STATES), opt.coefficients, opt.hyper_gradient])
    for x, y in zip(*runs, strict=True):
        assert torch.equal(x, y)


def test_gradients_are_kept_as_they_are_in_the_dtype_of_the_parameter():
    params = params_of(*SHAPES, dtype=torch.bfloat16)
    opt = MADA(params, state_dtype=torch.float32, max_grad_norm=1e-3, **LEARNING)
    train(opt, params, 3)
    for p in params:
        assert opt.state[p]["last_grad"].dtype == torch.bfloat16
        assert torch.equal(opt.state[p]["last_grad"], p.grad)
        assert opt.state[p]["exp_avg"].dtype == torch.float32


# --------------------------------------------------------------------------------------------------------- checkpoints of others


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("options", [{}, {"hyper_lr": 0.0}, {"hyper_lr": HYPER_ADAM}], ids=str)
def test_a_checkpoint_of_adam_goes_on_as_adam(kind, options):
    ours, theirs = params_of(*SHAPES, dtype=torch.float64), params_of(*SHAPES, dtype=torch.float64)
    common = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-6, "weight_decay": 0.0}
    adam = kind(theirs, **common)
    train(adam, theirs, 6)
    opt = MADA(ours, **common, **options)
    with torch.no_grad():
        for p, q in zip(ours, theirs, strict=True):
            p.copy_(q)
    with pytest.warns(UserWarning, match="checkpoint of a plain Adam") as told:
        opt.load_state_dict(adam.state_dict())
    assert len(told) == 1
    if not options:
        for p in ours:
            assert torch.equal(opt.state[p]["average_sq"], opt.state[p]["exp_avg_sq"])
    train(opt, ours, 30, first=6)
    train(adam, theirs, 30, first=6)
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-13)
        assert float(opt.state[p]["step"]) == 36


def test_the_first_update_after_adams_checkpoint_teaches_nothing_of_what_was_before():
    ours, theirs = params_of(*SHAPES, dtype=torch.float64), params_of(*SHAPES, dtype=torch.float64)
    adam = torch.optim.Adam(theirs, lr=1e-2)
    train(adam, theirs, 6)
    opt = MADA(ours, lr=1e-2, **LEARNING)
    with pytest.warns(UserWarning, match="plain Adam"):
        opt.load_state_dict(adam.state_dict())
    start = opt.coefficients
    train(opt, ours, 1, first=6)
    assert torch.equal(opt.coefficients, start)
    assert not opt.hyper_gradient.any()
    for p in ours:
        assert not opt.state[p]["exp_avg_diff"].any()  # d = 0
    train(opt, ours, 1, first=7)
    assert not torch.equal(opt.coefficients, start)


@pytest.mark.parametrize("options", [{"hyper_lr": 0.0}, {}, {"hyper_lr": HYPER_ADAM, "freeze_steps": 0}], ids=str)
def test_adamw_loads_what_was_trained_at_adams_corner(options):
    ours, theirs = params_of(*SHAPES, dtype=torch.float64), params_of(*SHAPES, dtype=torch.float64)
    opt = MADA(ours, lr=1e-2, weight_decay=0.1, **options)
    train(opt, ours, 8)
    adam = torch.optim.AdamW(theirs)
    adam.load_state_dict(opt.state_dict())
    assert adam.param_groups[0]["betas"] == tuple(opt.coefficients[0, :2].tolist())
    twin = MADA(ours, lr=1e-2, weight_decay=0.1, hyper_lr=0.0, betas=adam.param_groups[0]["betas"])
    twin.load_state_dict({name: x for name, x in adam.state_dict().items() if name != "mada"})
    with torch.no_grad():
        for p, q in zip(ours, theirs, strict=True):
            q.copy_(p)
    train(twin, ours, 5, first=8)
    train(adam, theirs, 5, first=8)
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-13)


def test_a_checkpoint_of_avgrad_keeps_its_mean():
    ours, theirs = params_of(*SHAPES, dtype=torch.float64), params_of(*SHAPES, dtype=torch.float64)
    common = {"lr": 1e-2, "betas": (0.9, 0.95)}
    other = AVGrad(theirs, **common)
    train(other, theirs, 6)
    opt = MADA(ours, **common, rho=0.0, hyper_lr=0.0)
    with torch.no_grad():
        for p, q in zip(ours, theirs, strict=True):
            p.copy_(q)
    with pytest.warns(UserWarning, match="plain Adam"):
        opt.load_state_dict(other.state_dict())
    train(opt, ours, 5, first=6)
    train(other, theirs, 5, first=6)
    for p, q in zip(ours, theirs, strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("kind", [AVGrad, MetaAdamW, functools.partial(MADA, hyper_lr=0.0, betas=(0.9, 0.9))], ids=str)
@pytest.mark.parametrize("options", [{}, {"hyper_lr": {"rho": 0.0}}], ids=str)
def test_the_sign_that_carries_a_bit_stays_behind(options, kind):
    """Of the mean, or of the second moment where there is no mean."""
    params = params_of(*SHAPES)
    opt = MADA(params, **{**LEARNING, "rho": 1.0}, **options)
    train(opt, params, 5)
    checkpoint = opt.state_dict()
    assert any(
        (state[name] < 0).any() for state in checkpoint["state"].values() for name in ("exp_avg_sq", "average_sq") if name in state
    )
    other = kind(params)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other.load_state_dict(
            {name: x for name, x in checkpoint.items() if name != "mada"}
            | {"param_groups": [{name: x for name, x in group.items() if name != "mada"} for group in checkpoint["param_groups"]]}
        )
    for name in {"exp_avg_sq", "average_sq"} & {*other.rule.names}:
        assert all(
            torch.equal(other.state[p][name], checkpoint["state"][i].get(name, checkpoint["state"][i]["exp_avg_sq"]).abs())
            for i, p in enumerate(params)
        )
    train(other, params, 3, first=5)
    assert all(p.isfinite().all() for p in params)


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("options", [{}, {"statistics": "lagged"}, {"hyper_lr": HYPER_ADAM}], ids=str)
def test_a_second_moment_that_overflows_is_adamws(options, backend):
    ours, theirs = [nn.Parameter(torch.ones(5))], [nn.Parameter(torch.ones(5))]
    opt, adam = MADA(ours, lr=1e-2, backend=backend, **options), torch.optim.AdamW(theirs, lr=1e-2, betas=(0.9, 0.95), eps=1e-6)
    adam.param_groups[0]["weight_decay"] = 0.0
    for value in (1.0, 1e20, 1.0, 2.0):
        for p, each in ((ours[0], opt), (theirs[0], adam)):
            p.grad = torch.full((5,), value)
            each.step()
    assert ours[0].isfinite().all()
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-6, atol=0)


def test_what_is_fixed_must_be_where_a_checkpoint_has_it():
    params = params_of(*SHAPES)
    opt = MADA(params, **LEARNING)
    train(opt, params, 4)
    with pytest.raises(ValueError, match=r"beta3 is .* fixed at 0\.0 here"):
        MADA(params, hyper_lr=0.0).load_state_dict(opt.state_dict())
    broken = copy.deepcopy(opt.state_dict())
    broken["mada"]["coefficients"][0, 5] = float("nan")
    with pytest.raises(ValueError, match="gamma that is not finite"):
        opt.load_state_dict(broken)


def test_what_is_learned_can_be_read_when_a_group_has_gone():
    params = params_of(*SHAPES)
    opt = MADA([{"params": [p]} for p in params], statistics="lagged", **LEARNING)
    train(opt, params, 3)
    before = opt.coefficients
    opt.param_groups.pop(0)
    assert torch.equal(opt.coefficients, before)


def test_own_checkpoints_must_fit():
    params = params_of(*SHAPES)
    opt = MADA(params, **LEARNING)
    train(opt, params, 2)
    with pytest.raises(ValueError, match="coefficients has shape"):
        MADA([{"params": [p]} for p in params], scope="per_group", **LEARNING).load_state_dict(
            MADA([{"params": [p]} for p in params], **LEARNING).state_dict()
        )


# ------------------------------------------------------------------------------------------------------- sets of coefficients


def test_a_set_for_each_group_starts_and_learns_by_itself():
    params = params_of(*SHAPES)
    options = {**LEARNING, "scope": "per_group"}
    opt = MADA([{"params": params[:1]}, {"params": params[1:], "betas": (0.8, 0.9)}], **options)
    assert opt.coefficients[:, :2].tolist() == [[0.9, 0.95], [0.8, 0.9]]
    train(opt, params, 4)
    apart = []
    for group, betas in ((params_of(*SHAPES)[:1], (0.9, 0.95)), (params_of(*SHAPES)[1:], (0.8, 0.9))):
        alone = MADA(group, betas=betas, **LEARNING)
        for step in range(4):
            everyone = params_of(*SHAPES)
            give_gradients(everyone, step)
            for p, q in zip(group, everyone[:1] if len(group) == 1 else everyone[1:], strict=True):
                p.grad = q.grad
            alone.step()
        apart.append((alone.coefficients[0], group))
    assert torch.equal(opt.coefficients, torch.stack([x for x, _ in apart]))
    for p, q in zip(params, [p for _, group in apart for p in group], strict=True):
        assert torch.equal(p, q)


def test_an_added_group_starts_as_the_constructor_said():
    params = params_of(*SHAPES)
    opt = MADA(params, scope="per_group", **LEARNING)
    train(opt, params, 4)
    before, joined = opt.coefficients, params_of((4,), seed=3)
    opt.add_param_group({"params": joined})
    assert torch.equal(opt.coefficients[0], before[0])
    assert opt.coefficients[1].tolist() == [0.9, 0.95, 0.1, 0.6, 0.9, 0.9]
    train(opt, params + joined, 3, first=4)
    assert (opt.coefficients[1] != opt.coefficients[0]).any()


def test_what_is_read_is_a_copy():
    params = params_of(*SHAPES)
    opt = MADA(params, **LEARNING)
    train(opt, params, 3)
    seen = [opt.coefficients, opt.hyper_gradient, opt.hyper_sums]
    before = [x.clone() for x in seen]
    train(opt, params, 1, first=3)
    assert all(torch.equal(x, y) for x, y in zip(seen, before, strict=True))
    assert not torch.equal(opt.coefficients, before[0])


# ------------------------------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    "options",
    [
        {"betas": (0.999, 0.95)},
        {"betas": (0.9, 0.999)},
        {"betas": (0.9, 0.95, 0.99)},
        {"beta3": 1.0},
        {"rho": 1.5},
        {"c": -0.1},
        {"gamma": float("nan")},
        {"lion_betas": (0.95, 1.0)},
        {"hyper_lr": -1.0},
        {"hyper_lr": {"beta4": 0.1}},
        {"hyper_momentum": 1.0},
        {"hyper_clip": -1.0},
        {"freeze_steps": -1},
        {"freeze_steps": 1.5},
        {"bounds": {"beta1": (0.5, 0.4)}},
        {"bounds": {"beta2": (0.0, 0.999)}},
        {"bounds": {"theta": (0.0, 1.0)}},
        {"scope": "local"},
        {"second_moment": "mean"},
        {"statistics": "none"},
        {"variant": "printed"},
        {"variant": Semantics(True, True, 0.5, True)},
    ],
    ids=str,
)
def test_invalid_arguments(options):
    with pytest.raises(ValueError, match=r"Invalid|two are needed"):
        MADA(params_of((3,)), **options)


def test_bounds_make_room_for_other_starts():
    params = params_of(*SHAPES)
    opt = MADA(params, betas=(0.9, 0.999), bounds={"beta2": (0.5, 0.9999)})
    train(opt, params, 2)
    assert opt.coefficients[0, 1] == 0.999


def test_groups_of_one_set_have_one_start():
    params = params_of(*SHAPES)
    with pytest.raises(ValueError, match="scope='global'"):
        MADA([{"params": params[:1]}, {"params": params[1:], "betas": (0.8, 0.9)}])


@pytest.mark.parametrize("taken", [0, 1, 2])
def test_a_checkpoint_loads_as_it_is_whatever_roles_gradients_had(taken, monkeypatch):
    """Also after steps of which only the device knows whether they counted: the names of now are not those of the checkpoint."""
    monkeypatch.setattr(devices, "readable", lambda x: False)
    options = {"skip_nonfinite": True, **LEARNING}
    params = params_of(*SHAPES)
    opt = MADA(params, **options)
    train(opt, params, 3)
    saved = copy.deepcopy(opt.state_dict())
    others = params_of(*SHAPES)
    other = MADA(others, **options)
    train(other, others, taken)
    other.load_state_dict(saved)
    for p, state in zip(others, saved["state"].values(), strict=True):
        assert torch.equal(other.state[p]["last_grad"], state["last_grad"])
        assert torch.equal(other.state[p]["previous_grad"], state["previous_grad"])


def test_nothing_is_told_where_nothing_is_wrong():
    params = params_of(*SHAPES)
    opt = MADA(params, **LEARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(opt, params, 2)
        opt.load_state_dict(opt.state_dict())
