"""With both ranges 0, from the identity start, and with one group: torch.optim.AdamW after 100 steps."""

import functools
import math

import pytest
import torch
from torch.optim import lr_scheduler

from metaadamw_fast import MetaAdamW

from .models import (
    batch,
    conv_net,
    mse,
    one_thread,  # noqa: F401
    perceptron,
    relative,
)
from .optimizers import OFF
from .tolerances import REDUCTION

BACKENDS = ("cpp", "reference")


def entries(model):
    """Param groups with hyper-parameters of their own."""
    named = list(model.named_parameters())
    return [
        {"params": named[:2], "lr": 1e-3, "weight_decay": 0.3},
        {"params": named[2:3], "betas": (0.5, 0.9), "eps": 1e-4},
        {"params": named[3:5], "lr": torch.tensor(5e-3, dtype=named[0][1].dtype), "weight_decay": 0.0, "betas": (0.0, 0.95)},
        {"params": named[5:], "amsgrad": True, "eps": 1e-6},
    ]


def some_missing(step, params):
    for i, p in enumerate(params):
        if step % 7 == 3 or (i + step) % 3 == 0:  # in every seventh step all of them
            p.grad = None


def transposed(_, params):
    for p in params:
        if p.dim() > 1:
            p.grad = p.grad.transpose(0, 1).contiguous().transpose(0, 1)
        if p.dim() == 1:
            p.grad = torch.stack([p.grad, p.grad], 1)[:, 0]


REDUCTIONS = {  # options of both optimizers; also: model, params, scheduler, what happens to the gradients
    "plain": {},
    "no decay": {"weight_decay": 0.0},
    "StepLR": {"scheduler": lambda opt: lr_scheduler.StepLR(opt, 20, 0.5)},
    "cosine": {"scheduler": lambda opt: lr_scheduler.CosineAnnealingLR(opt, 60)},
    "one cycle": {"scheduler": lambda opt: lr_scheduler.OneCycleLR(opt, 1e-2, 100, cycle_momentum=True)},
    "groups, one cycle": {"params": entries, "scheduler": lambda opt: lr_scheduler.OneCycleLR(opt, [1e-2, 5e-3, 2e-3, 8e-3], 100)},
    "amsgrad": {"amsgrad": True},
    "amsgrad, maximize": {"amsgrad": True, "maximize": True, "lr": 1e-3},
    "maximize": {"maximize": True, "lr": 1e-3},
    "groups": {"params": entries},
    "tensors": {
        "lr": lambda dtype: torch.tensor(2e-3, dtype=dtype),
        "weight_decay": lambda dtype: torch.tensor([0.2], dtype=dtype),
    },
    "tensor lr, cosine": {
        "lr": lambda dtype: torch.tensor(4e-3, dtype=dtype),
        "scheduler": lambda opt: lr_scheduler.CosineAnnealingLR(opt, 60),
    },
    "missing gradients": {"gradients": some_missing},
    "groups, missing gradients": {"params": entries, "gradients": some_missing, "maximize": True, "lr": 1e-3},
    "transposed gradients": {"gradients": transposed},
    "channels_last": {"model": lambda dtype: conv_net(dtype).to(memory_format=torch.channels_last)},
    "channels_last, transposed gradients": {
        "model": lambda dtype: conv_net(dtype).to(memory_format=torch.channels_last),
        "gradients": transposed,
        "amsgrad": True,
    },
}


def hundred_steps(kind, dtype, *, model=perceptron, params=None, scheduler=None, gradients=None, **options):
    model = model(dtype)
    options = {name: value(dtype) if callable(value) else value for name, value in options.items()}
    opt = kind(params(model) if params else model.named_parameters(), **{"lr": 3e-3, "weight_decay": 0.1, **options})
    scheduler = scheduler(opt) if scheduler else None
    for step in range(100):
        opt.zero_grad()
        mse(model, batch(model, step)).backward()
        if gradients:
            gradients(step, list(model.parameters()))
        opt.step()
        if scheduler:
            scheduler.step()
    return model, opt


def assert_same_training(actual, expected, dtype):
    (model, opt), (reference_model, reference) = actual, expected
    for (name, p), q in zip(model.named_parameters(), reference_model.parameters(), strict=True):
        assert relative(p, q) < REDUCTION[dtype], name
        assert opt.state[p]["step"] == reference.state[q]["step"] > 50
        assert ("max_exp_avg_sq" in opt.state[p]) == ("max_exp_avg_sq" in reference.state[q])


@functools.cache
def adamw(case, dtype):
    return hundred_steps(lambda params, **kw: torch.optim.AdamW(params, foreach=False, **kw), dtype, **REDUCTIONS[case])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", REDUCTIONS)
def test_both_ranges_0_is_adamw(case, dtype, backend):
    options, expected = REDUCTIONS[case], adamw(case, dtype)
    actual = hundred_steps(
        lambda params, **kw: MetaAdamW(params, head_init="xavier", backend=backend, **OFF, **kw), dtype, **options
    )
    assert_same_training(actual, expected, dtype)


def test_the_identity_start_is_adamw():
    trained = [list(hundred_steps(MetaAdamW, torch.float32, **options)[0].parameters()) for options in ({}, OFF)]
    assert all(torch.equal(p, q) for p, q in zip(*trained, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_group_is_adamw_with_that_lr_and_decay(dtype):
    a, b = 1.5, -0.7

    def build(params, **kw):
        opt = MetaAdamW(params, grouping="param_groups", **kw)
        opt.encoder.double()
        with torch.no_grad():
            opt.encoder.head.bias.copy_(torch.tensor([a, b, 0, 0], dtype=torch.float64))
        return opt

    scales = [0.5 + 1 / (1 + math.exp(-x)) for x in (a, b)]
    actual = hundred_steps(build, dtype)
    expected = hundred_steps(torch.optim.AdamW, dtype, lr=3e-3 * scales[0], weight_decay=0.1 * scales[1])
    assert_same_training(actual, expected, dtype)
    assert [actual[1].lr_scale.item(), actual[1].wd_scale.item()] == pytest.approx(scales, rel=1e-15)
