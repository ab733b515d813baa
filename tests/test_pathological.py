"""Gradients that no training should see: the group that has one behaves as in torch's AdamW, the others as if it did not exist."""

import itertools

import pytest
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_

from metaadamw_fast import MetaAdamW
from metaadamw_fast.encoder import GroupEncoder

from .models import noise, perceptron, same

BAD = {"nan": float("nan"), "inf": float("inf"), "-inf": -float("inf"), "1e38": 1e38, "denormal": 1e-41, "zeros": 0.0}
SUMS_OVERFLOW = ("nan", "inf", "-inf", "1e38")  # 1e38² is infinite in float32
LR, DECAY = 1e-2, 0.1


def grads_of(model, step):
    return [noise(p.shape, 50 * step + i) * 0.1 for i, p in enumerate(model.parameters())]


def make(model, **options):
    return MetaAdamW(model.named_parameters(), lr=LR, weight_decay=DECAY, model=model, head_init="xavier", **options)


def spoil(grads, members, bad):
    """The bad value in one element, or, of those that are no accident, everywhere."""
    for t in members:
        if bad in ("denormal", "zeros"):
            grads[t].fill_(BAD[bad])
        else:
            grads[t].view(-1)[-1] = BAD[bad]


def step(model, opt, grads):
    for p, g in zip(model.parameters(), grads, strict=True):
        p.grad = g.clone()
    opt.step()


def state_of(model, opt, members):
    params = list(model.parameters())
    return [(params[t].detach().clone(), {k: x.clone() for k, x in opt.state[params[t]].items()}) for t in members]


@pytest.mark.parametrize("group", range(3))
@pytest.mark.parametrize("when", [0, 3])
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("features", ["basic", "norm_basic_plus", "enhanced"])
def test_the_others_are_updated_as_without_the_group(features, bad, when, group, monkeypatch):
    model, other = perceptron(), perceptron()
    opt, without = make(model, features=features), make(other, features=features)
    members = opt.groups[group].members
    rest = [t for t in range(len(opt.statistics)) if t not in members]
    rows = torch.tensor([g for g in range(len(opt.groups)) if g != group])
    forward = GroupEncoder.forward

    def forward_without_the_row(encoder, x):
        if encoder is not without.encoder or without.steps_done != when:
            return forward(encoder, x)
        scales = torch.cat([torch.ones(2, len(x)), torch.zeros(2, len(x))])
        scales[:, rows] = forward(encoder, x[rows])
        return scales

    masked = bad in SUMS_OVERFLOW
    if masked:
        monkeypatch.setattr(GroupEncoder, "forward", forward_without_the_row)
    for k in range(when + 1):
        grads, clean = grads_of(model, k), grads_of(model, k)
        if k == when:
            before = state_of(model, opt, members)
            spoil(grads, members, bad)
            if not masked:
                clean = grads
        step(model, opt, grads)
        step(other, without, clean)
    assert same(state_of(model, opt, rest), state_of(other, without, rest))
    if not masked:
        assert opt.lr_scale.ne(1).all()
        return
    assert opt.lr_scale[group] == opt.wd_scale[group] == 1
    assert opt.lr_scale[rows].ne(1).all()
    # The group itself: torch.optim.AdamW from where it stood.
    params = [p.clone().requires_grad_() for p, _ in before]
    plain = torch.optim.AdamW(params, lr=LR, weight_decay=DECAY)
    for p, (_, state), t in zip(params, before, members, strict=True):
        p.grad, plain.state[p] = grads[t].clone(), state
    plain.step()
    for (
        p,
        (found, state),
    ) in zip(params, state_of(model, opt, members), strict=True):
        torch.testing.assert_close(found, p.detach(), rtol=2e-6, atol=1e-7, equal_nan=True)
        for name in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(state[name], plain.state[p][name], rtol=1e-6, atol=1e-30, equal_nan=True)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("ranges", [0.0, 1.0])
def test_clipping_is_torch_s(bad, ranges):
    """With ranges 0, against torch's AdamW behind torch's clip_grad_norm_; else against this optimizer behind it."""
    model, other = perceptron(), perceptron()
    opt = make(model, max_grad_norm=0.5, lr_scale_range=ranges, wd_scale_range=ranges)
    plain = torch.optim.AdamW(other.parameters(), lr=LR, weight_decay=DECAY) if ranges == 0 else make(other)
    for k in range(3):
        grads = grads_of(model, k)
        if k == 1:
            spoil(grads, [2], bad)
        step(model, opt, grads)
        for p, g in zip(other.parameters(), grads, strict=True):
            p.grad = g.clone()
        norm = clip_grad_norm_(other.parameters(), 0.5)
        torch.testing.assert_close(opt.grad_norm, norm, rtol=1e-6, atol=0, equal_nan=True)
        plain.step()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7, equal_nan=True)


@pytest.mark.parametrize("bad", SUMS_OVERFLOW)
@pytest.mark.parametrize("options", [{}, {"statistics": "lagged"}, {"max_grad_norm": 0.5}, {"features": "enhanced"}], ids=str)
def test_skipped_steps_leave_no_trace_and_are_counted(bad, options):
    model, other = perceptron(), perceptron()
    opt, calm = make(model, skip_nonfinite=True, **options), make(other, skip_nonfinite=True, **options)
    skipped = 0
    for k, group in zip(range(8), itertools.cycle(range(3)), strict=False):
        grads = grads_of(model, k)
        step(other, calm, grads)
        step(model, opt, grads)
        if k % 2:
            spoil(grads, opt.groups[group].members, bad)
            step(model, opt, grads)
            skipped += 1
        everything = range(len(grads))
        assert same(state_of(model, opt, everything), state_of(other, calm, everything))
        assert same([opt.lr_scale, opt.features, opt.statistics], [calm.lr_scale, calm.features, calm.statistics])
    assert (opt.skipped_steps, calm.skipped_steps, opt.steps_done) == (skipped, 0, 8)


@pytest.mark.parametrize("statistics", ["exact", "lagged"])
def test_an_encoder_in_float64_where_no_group_is_finite(statistics):
    p = nn.Parameter(torch.ones(3))
    opt = MetaAdamW([p], lr=0.1, head_init="xavier", statistics=statistics)
    for step, g in enumerate((1.0, float("nan"), 1.0)):
        if step == 1:
            opt.encoder.double()
        p.grad = torch.full((3,), g)
        opt.step()
        assert opt.lr_scale.isfinite().all()
    assert opt.lr_scale.dtype == torch.float64
