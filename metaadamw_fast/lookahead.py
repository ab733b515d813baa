"""The hypothetical step of a meta-update: θ′ as a differentiable function of the scales. MetaAdamW algorithm 2."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .features import of_scaled_gradient, training_progress
from .hyperparameters import Hyperparameters
from .lists import StateLists
from .optimizer import MetaAdamW


def look_ahead(opt: MetaAdamW, g1: Sequence[Tensor | None]) -> tuple[Tensor, Tensor | float, list[Tensor]]:
    """What ``opt.step()`` would do with the gradient ``g1``, without doing it.

    θ′ = p - lr·lr_scale·(u + wd_scale·λ·p) with u = m̂′/(√v̂′ + ε), for the moments that the step would leave. The released code
    takes the features from the ``.grad`` that stands, the moments as they are, λ/(1-β1^k) for λ, and no gradient to wd_scale.

    Args:
        opt: the optimizer; nothing of it changes.
        g1: T gradients of what is minimized, None where there is none.

    Returns:
        The scales [4, G] with their graph, the factor that clipping puts on g1, and θ′, T tensors that carry the graph.
    """
    released = opt.variant == "released"
    lists = opt._current_lists()
    with torch.no_grad():
        hyper = opt._hyperparameters.update(opt.param_groups)
        # g1 is the gradient of what is minimized; a .grad that stands has the sign of loss_fn.
        grads, sign = ([p.grad for p in lists.params], hyper.sign) if released else (g1, None)
        lists.set_gradients(grads)
        statistics = opt._measure(lists)
        grad_scale, _ = opt._gradient_factor(sign, None, statistics)
        statistics = of_scaled_gradient(statistics, grad_scale)
        step = lists.next_steps() - (1 if released else 0)
        if released:
            directions = _stored_directions(lists, step, hyper)
        else:
            directions = _next_directions(lists, g1, step, hyper, grad_scale)
    _, scales = opt._encode(statistics, training_progress(opt.steps_done + (not released), opt.total_steps))
    lr_scale, wd_scale = scales[:2].index_select(1, opt._group_of).double().unbind()
    size = hyper.lr * lr_scale
    if released:
        decay = size / (1 - hyper.beta1**step) * wd_scale.detach() * hyper.weight_decay
    else:
        decay = size * wd_scale * hyper.weight_decay
    theta = [
        p.detach().requires_grad_(p.requires_grad) if u is None else ((1 - d) * p.detach() - s * u).to(p.dtype)
        for p, u, s, d in zip(lists.params, directions, size.unbind(), decay.unbind(), strict=True)
    ]
    return scales, 1.0 if grad_scale is None else grad_scale[0].to(scales.dtype), theta


def _next_directions(
    lists: StateLists, g1: Sequence[Tensor | None], step: Tensor, hyper: Hyperparameters, grad_scale: Tensor | None
) -> list[Tensor | None]:
    """Returns u of a step with g1, by the update op itself on copies: from p = 0, with step size -1 and no decay."""
    directions = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in lists.params]
    moments = [
        None if xs is None else [x if x is None or g is None else x.clone() for x, g in zip(xs, g1, strict=True)]
        for xs in (lists.exp_avgs, lists.exp_avg_sqs, lists.max_exp_avg_sqs)
    ]
    launch = type(lists.launch)(g1, moments[0], directions, *moments[1:], written=True)
    ones = torch.ones_like(step)
    launch.adamw_update_(-ones, ones, step, hyper.beta1, hyper.beta2, hyper.eps, grad_scale)
    return [None if g is None else u for g, u in zip(g1, directions, strict=True)]


def _stored_directions(lists: StateLists, step: Tensor, hyper: Hyperparameters) -> list[Tensor | None]:
    """Returns u of the released code: from the stored moments and counts; None before the first step of a parameter."""
    maxima = lists.max_exp_avg_sqs or lists.exp_avg_sqs
    second_moments = [v if x is None else x for x, v in zip(maxima, lists.exp_avg_sqs, strict=True)]
    bias_correction1 = (1 - hyper.beta1**step).unbind()
    bias_correction2 = (1 - hyper.beta2**step).unbind()
    return [
        None if k == 0 else (m / bias_correction1[i]) / ((v / bias_correction2[i]).sqrt() + hyper.eps[i])
        for i, (m, v, k) in enumerate(zip(lists.exp_avgs, second_moments, step.tolist(), strict=True))
    ]
