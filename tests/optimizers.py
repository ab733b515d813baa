"""The optimizers as specs: what every optimizer must do is tested once for each of them."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch

from metaadamw_fast import MADA, AVGrad, MetaAdamW, OnlineLearner


class EagerAVGrad(torch.optim.Optimizer):
    """docs/algorithm.md, section 12, in torch's own operations."""

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.99), eps=1e-6, weight_decay=0.0, maximize=False):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "maximize": maximize})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                (beta1, beta2), state = group["betas"], self.state[p]
                if not state:
                    state.update(step=torch.tensor(0.0), **{name: torch.zeros_like(p) for name in AVGrad.rule.names})
                state["step"] += 1
                k, g, operands = float(state["step"]), -p.grad if group["maximize"] else p.grad, [p]
                operands += [state[name] for name in AVGrad.rule.names]
                p, m, v, a, g = (torch.view_as_real(x) if x.is_complex() else x for x in (*operands, g))
                m.lerp_(g.to(m), 1 - beta1)
                v.mul_(beta2).add_((1 - beta2) * g.to(v).square())
                a.add_((v - a) / k)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(group["lr"] * (m / (1 - beta1**k)) / ((a / (1 - beta2**k)).sqrt() + group["eps"]))


class EagerMADA(torch.optim.Optimizer):
    """docs/mada.md, section 3, at the default coefficients, before they learn: AdamW, with the states of all the others."""

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.95), eps=1e-6, weight_decay=0.0, maximize=False):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "maximize": maximize})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                (beta1, beta2), state = group["betas"], self.state[p]
                if not state:
                    state.update(step=torch.tensor(0.0), **{name: torch.zeros_like(p) for name in MADA_STATES})
                state["step"] += 1
                k, grad = float(state["step"]), -p.grad if group["maximize"] else p.grad
                operands = [p, grad, p.grad, *(state[name] for name in MADA_STATES)]
                p, g, raw, m, v, a, n, lion, last, previous = (torch.view_as_real(x) if x.is_complex() else x for x in operands)
                g, falls = g.to(m), g.to(v).square() < v
                n.copy_(torch.zeros_like(g) if k == 1 else g - (-last if group["maximize"] else last))
                m.lerp_(g, 1 - beta1)
                v.mul_(beta2).add_((1 - beta2) * g.to(v).square())
                mean = a.abs() + (v - a.abs()) / k
                a.copy_(torch.where(falls, -mean, mean))
                lion.lerp_(g, 1 - 0.98)
                previous.copy_(last)
                last.copy_(raw)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(group["lr"] * (m / (1 - beta1**k)) / ((v / (1 - beta2**k)).sqrt() + group["eps"]))


class Online(MetaAdamW):
    """Whose encoder learns in every step."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        OnlineLearner(self, policy="encoder", gradient="loss", trace=0)


class Spec(NamedTuple):
    """What a test must know of an optimizer.

    Attributes:
        kind: its class.
        eager: the same in torch's own operations.
        plain: options with which the two are the same.
        tuned: options with which all that is the optimizer's own has a part in a step.
        states: those that every updated parameter has, besides its step count.
        shown: what can be read of the last step.
        encodes: whether it groups the parameters and scales each group. It then sums in every step, and takes a ``model``.
        raw: states that keep gradients as they were given: with the loss scale, unclipped.
        still: options with which nothing is learned from gradients before they are clipped.
    """

    kind: Any
    eager: Any
    plain: dict
    tuned: dict
    states: tuple
    shown: tuple
    encodes: bool
    raw: tuple = ()
    still: dict = {}  # noqa: RUF012

    def __repr__(self):
        return self.kind.__name__

    def __call__(self, params, **options):
        return self.kind(params, **{**self.tuned, **options})

    def of_model(self, model, **options):
        return self(model.named_parameters(), **({"model": model} if self.encodes else {}), **options)

    @property
    def key(self):
        return self.kind.checkpoint_key


SCALES = ("lr_scale", "wd_scale", "flatness_weight", "alignment_weight", "features")
OFF = {"lr_scale_range": 0.0, "wd_scale_range": 0.0}  # all scales are 1: AdamW
MOMENTS = ("exp_avg", "exp_avg_sq")
SUMS = ("statistics", "grad_norm")
META = Spec(MetaAdamW, torch.optim.AdamW, OFF, {"head_init": "xavier"}, MOMENTS, (*SCALES, *SUMS), encodes=True)
ONLINE = Spec(Online, torch.optim.AdamW, OFF, {"head_init": "xavier"}, MOMENTS, (*SCALES, *SUMS), encodes=True, still=OFF)
AVGRAD = Spec(AVGrad, EagerAVGrad, {}, {}, AVGrad.rule.names, SUMS, encodes=False)
MADA_STATES = (*AVGrad.rule.names, "exp_avg_diff", "lion_exp_avg", "last_grad", "previous_grad")
LEARNING = {"beta3": 0.1, "rho": 0.6, "c": 0.9, "gamma": 0.9, "freeze_steps": 0}  # from the second step on, all six inside
LEARNED = ("coefficients", "hyper_gradient", "hyper_sums")
AS_ADAMW = {"beta3": 0.0, "rho": 1.0, "c": 1.0, "gamma": 1.0, "freeze_steps": 99}  # the defaults, long before they learn
MADA_ = Spec(
    MADA,
    EagerMADA,
    AS_ADAMW,
    LEARNING,
    MADA_STATES,
    (*SUMS, *LEARNED),
    encodes=False,
    raw=MADA_STATES[-2:],
    still={"freeze_steps": 99},
)
OPTIMIZERS = {spec.kind.__name__: spec for spec in (META, ONLINE, AVGRAD, MADA_)}

every = pytest.mark.parametrize("spec", OPTIMIZERS.values(), ids=OPTIMIZERS)


def spec_of(opt):
    return OPTIMIZERS[type(opt).__name__]


def every_with(*options, **own):
    """Parametrizes ``spec`` and ``options``: those of all optimizers, then those of the one of that name."""
    cases = [(spec, x) for name, spec in OPTIMIZERS.items() for x in (*options, *own.get(name, ()))]
    return pytest.mark.parametrize(
        ("spec", "options"), cases, ids=[f"{spec}-{x[-1] if isinstance(x, tuple) else x}" for spec, x in cases]
    )
