"""Unscaling and clipping in the step, and steps that a GradScaler calls off."""

import pytest
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_

from metaadamw_fast.core import devices

from .cases import everything, same, set_gradients, two_layers
from .models import noise
from .optimizers import every, every_with, spec_of

HUGE = 1e4  # a threshold that no gradient here reaches


def scaled_by(opt, scale):
    for group in opt.param_groups:
        for p in group["params"]:
            p.grad.mul_(scale)


def norm_of(opt):
    return torch.stack([p.grad.norm() for group in opt.param_groups for p in group["params"]]).norm()


def of_any_scale(opt):
    """All that an optimizer holds and shows, but what keeps gradients as they were given."""
    spec, parts = spec_of(opt), everything(opt)
    if spec.raw:
        for state in parts["state"].values():
            for name in spec.raw:
                del state[name]
        for extra in (parts[spec.key], parts["param_groups"][0][spec.key]):
            for name in ("last", "sums"):  # with the scales of these gradients, and of these gradients
                extra.pop(name, None)
    return parts


def new_scaler(**options):
    scaler = torch.amp.GradScaler("cpu", **{"init_scale": 1024.0, **options})
    scaler.scale(torch.ones(()))  # allocates the scale
    return scaler


@pytest.fixture(params=["host", "device"])
def who_decides(request, monkeypatch):
    """Where it is found out that a step does not count: on a GPU the host never waits to know."""
    if request.param == "device":
        monkeypatch.setattr(devices, "readable", lambda x: False)


MODES = every_with({}, {"maximize": True}, MetaAdamW=[{"statistics": "lagged"}, {"features": "enhanced"}, {"amsgrad": True}])


@MODES
@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("max_grad_norm", [None, 0.3, HUGE])
@pytest.mark.parametrize("unscales", ["the step", "the user"])
def test_a_scaled_loss_gives_the_same_steps(unscales, max_grad_norm, backend, spec, options, who_decides):
    """A scale that is a power of two changes no bit: every sum, product and quotient is the same times it."""
    pairs = [two_layers(spec, backend=backend, max_grad_norm=max_grad_norm, **options) for _ in range(2)]
    scaler = new_scaler()
    for step in range(5):
        for (_, opt), scaled in zip(pairs, (False, True), strict=True):
            set_gradients(opt, step)
            if not scaled:
                opt.step()
                continue
            scaled_by(opt, scaler.get_scale())
            if unscales == "the user":
                scaler.unscale_(opt)
            scaler.step(opt)
            scaler.update()
            if unscales == "the step":
                scaled_by(opt, 1 / scaler.get_scale())  # the step leaves .grad as it was
        plain, scaled = (of_any_scale(opt) for _, opt in pairs)
        different = [key for key in plain if not same(plain[key], scaled[key])]
        assert not different, (step, different)


@MODES
@pytest.mark.parametrize("max_grad_norm", [None, 0.3])
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize("unscales", ["the step", "the user"])
def test_after_an_overflow_nothing_has_moved(unscales, bad, max_grad_norm, spec, options, who_decides):
    """And the next step is that of an optimizer that never saw it."""
    (_, opt), (_, twin) = (two_layers(spec, max_grad_norm=max_grad_norm, **options) for _ in range(2))
    scaler = new_scaler()
    for step in range(6):
        set_gradients(opt, step)
        set_gradients(twin, step)
        if step in (0, 3, 4):
            opt.param_groups[0]["params"][1].grad[2] = bad
            before = everything(opt)
        scaled_by(opt, scaler.get_scale())
        if unscales == "the user":
            scaler.unscale_(opt)
        scaler.step(opt)
        scaler.update(1024.0)
        if step in (0, 3, 4):
            after = everything(opt)
            changed = [key for key in before if key != "grads" and not same(before[key], after[key])]
            assert not changed, (step, changed)
        else:
            twin.step()
            ours, theirs = of_any_scale(opt), of_any_scale(twin)
            different = [key for key in ours if key != "grads" and not same(ours[key], theirs[key])]
            assert not different, (step, different)


@every_with({}, {"max_grad_norm": 1.0}, MetaAdamW=[{"statistics": "lagged"}])
def test_an_overflow_in_the_very_first_step(spec, options, who_decides):
    (_, opt), (_, twin) = (fresh(spec, **options) for _ in range(2))
    scaler = new_scaler()
    set_gradients(opt, 0)
    opt.param_groups[0]["params"][0].grad[0, 0] = float("inf")
    scaler.step(opt)
    scaler.update(1024.0)
    assert opt.steps_done == 0
    for step in range(3):
        for each in (opt, twin):
            set_gradients(each, step)
            each.step()
        assert_same_optimizers(opt, twin)


def fresh(spec, **options):
    """As two_layers, without its step."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    return model, spec(model.named_parameters(), lr=0.1, **options)


def assert_same_optimizers(opt, twin):
    ours, theirs = everything(opt), everything(twin)
    different = [key for key in ours if not same(ours[key], theirs[key])]
    assert not different, different


# ------------------------------------------------------------------------------------------------------------------ clipping


@pytest.mark.parametrize("factor", [0.1, 1.0, 3.0], ids=["above", "at the threshold", "below"])
@every_with({}, {"maximize": True}, MetaAdamW=[{"statistics": "lagged"}])
def test_clipping_in_the_step_is_clipping_before_it(spec, options, factor):
    """50 steps, within 1e-6 of the largest element: one rounds the gradient once more, the other the square of the norm."""
    (_, folded), (_, plain) = (two_layers(spec, **spec.still, **options, **clips) for clips in ({"max_grad_norm": 1.0}, {}))
    folded.load_state_dict(plain.state_dict())
    for p, q in zip(folded.param_groups[0]["params"], plain.param_groups[0]["params"], strict=True):
        p.data.copy_(q)
    for step in range(50):
        for opt in (folded, plain):
            set_gradients(opt, step)
        max_norm = float(norm_of(plain)) * factor
        folded.max_grad_norm = max_norm
        before = norm_of(folded)
        clip_grad_norm_(plain.param_groups[0]["params"], max_norm)
        folded.step()
        plain.step()
        torch.testing.assert_close(folded.grad_norm, before.to(folded.sums_dtype()), rtol=1e-6, atol=0)
    for p, q in zip(folded.param_groups[0]["params"], plain.param_groups[0]["params"], strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6 * float(q.detach().abs().max()))


@every
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_clipping_of_what_is_not_finite(bad, spec):
    """One NaN makes a clipped step NaN everywhere, one infinity makes every other gradient 0: as clip_grad_norm_ does."""
    (_, folded), (_, plain) = (two_layers(spec, **spec.still, **clips) for clips in ({"max_grad_norm": 1.0}, {}))
    folded.load_state_dict(plain.state_dict())
    for p, q in zip(folded.param_groups[0]["params"], plain.param_groups[0]["params"], strict=True):
        p.data.copy_(q)
    for opt in (folded, plain):
        set_gradients(opt, 5)
        opt.param_groups[0]["params"][0].grad[1, 2] = bad
    clip_grad_norm_(plain.param_groups[0]["params"], 1.0)
    folded.step()
    plain.step()
    for p, q in zip(folded.param_groups[0]["params"], plain.param_groups[0]["params"], strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7, equal_nan=True)
        for key in {*spec.states} - {*spec.raw}:
            torch.testing.assert_close(folded.state[p][key], plain.state[q][key], rtol=1e-6, atol=1e-9, equal_nan=True)


# ------------------------------------------------------------------------------------------------------------- skip_nonfinite


@every_with({}, {"max_grad_norm": 0.5}, MetaAdamW=[{"statistics": "lagged"}, {"statistics": "lagged", "max_grad_norm": 0.5}])
@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("on_device", [False, True])
def test_a_step_with_gradients_that_are_not_finite_is_left_out(spec, options, backend, on_device, monkeypatch):
    """It is as if it had never been, also where the host does not look; and it is counted, in checkpoints too."""
    runs = []
    for bad in (True, False):
        p, q = nn.Parameter(noise((40, 30), 0)), nn.Parameter(noise((7,), 1))
        opt = spec([p, q], skip_nonfinite=True, backend=backend, **options)
        if on_device:
            monkeypatch.setattr(devices, "readable", lambda x: False)
        for step in range(8):
            poison = {2: float("nan"), 5: float("inf"), 6: 1e30}.get(step)
            if poison is not None and not bad:
                continue
            for i, x in enumerate((p, q)):
                x.grad = noise(x.shape, 10 * step + i)
            if poison is not None:
                p.grad[3, 4] = poison
            opt.step()
        monkeypatch.undo()
        assert opt.skipped_steps == (3 if bad else 0)
        assert opt.steps_done == 5
        fresh = spec.kind([nn.Parameter(p.detach().clone()), nn.Parameter(q.detach().clone())], skip_nonfinite=True)
        fresh.load_state_dict(opt.state_dict())
        assert fresh.skipped_steps == opt.skipped_steps
        tensors = [*(x for y in (p, q) for x in (y, *opt.state[y].values())), *(getattr(opt, name) for name in spec.shown)]
        runs.append([x.detach().clone() for x in tensors])
    assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))
