"""The hypothetical step of a meta-update: θ′ as a function of the scales, and the gradient's way back. MetaAdamW algorithm 2."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import ops
from .core.gradients import scale
from .core.hyperparameters import Hyperparameters
from .core.sharding import RankSums
from .core.states import States
from .core.watch import as_real, as_real_gradient
from .optimizer import MetaAdamW


@dataclass
class LookAhead:
    """θ′ = p - lr·lr_scale·(u + wd_scale·λ·p): affine in each scale, so its derivatives are dot products with u and p.

    Attributes:
        scales: [4, G], with the encoder's graph.
        clip: what clipping multiplies the gradient with.
        lr, weight_decay: float64 [T]; the released code's weight_decay is λ/(1-β1^k), and 0 before a tensor's first step.
        directions: u of each tensor, None where it does not move.
        group_of: int64 [T].
        moves_wd_scale: whether θ′ has a gradient to wd_scale; in the released code it has none.
        backend: of the dot products.
        rank_sums: makes the dot products of shards those of whole tensors.
    """

    scales: Tensor
    clip: Tensor | float
    lr: Tensor
    weight_decay: Tensor
    directions: list[Tensor | None]
    group_of: Tensor
    moves_wd_scale: bool
    backend: str
    rank_sums: RankSums

    def _of_tensors(self) -> tuple[Tensor, Tensor]:
        """lr_scale and wd_scale of each tensor, float64 [T]."""
        lr_scale, wd_scale = self.scales[:2].detach().index_select(1, self.group_of).double().unbind()
        return lr_scale, wd_scale

    @torch.no_grad()
    def parameters(self, params: Sequence[Tensor]) -> list[Tensor | None]:
        """θ′ from θ (of DTensors the shards, as everything here); None where a tensor does not move."""
        lr_scale, wd_scale = self._of_tensors()
        size = self.lr * lr_scale
        decay = size * wd_scale * self.weight_decay
        return [
            None if u is None else ((1 - d) * p - s * u).to(p.dtype)
            for p, u, s, d in zip(params, self.directions, size.unbind(), decay.unbind(), strict=True)
        ]

    @torch.no_grad()
    def gradient_of_scales(self, params: Sequence[Tensor], cotangents: Sequence[Tensor | None]) -> Tensor:
        """∂J/∂scales, [4, G], through θ′ alone, for ``cotangents`` c = ∂J/∂θ′ at θ = ``params``.

        ∂J/∂lr_scale = -Σ lr·⟨c, u + wd_scale·λ·p⟩ and ∂J/∂wd_scale = -Σ lr·lr_scale·λ·⟨c, p⟩, over the tensors of each group.
        """
        rows = [t for t, (u, c) in enumerate(zip(self.directions, cotangents, strict=True)) if u is not None and c is not None]
        dots = self.lr.new_zeros(len(self.directions), 2)
        if rows:
            us, ps = ([as_real(x) for t in rows if (x := xs[t]) is not None] for xs in (self.directions, params))
            mine = [as_real_gradient(c) for t in rows if (c := cotangents[t]) is not None]
            for column, others in enumerate((us, ps)):
                dots[rows, column] = ops.tensor_dots(mine, others, dtype=torch.float64, backend=self.backend)
        with_u, with_p = self.rank_sums(dots).unbind(1)
        lr_scale, wd_scale = self._of_tensors()
        gradient = self.lr.new_zeros(4, self.scales.shape[1])
        gradient[0].index_add_(0, self.group_of, -self.lr * (with_u + wd_scale * self.weight_decay * with_p))
        if self.moves_wd_scale:
            gradient[1].index_add_(0, self.group_of, -self.lr * lr_scale * self.weight_decay * with_p)
        return gradient.to(self.scales.dtype)


def look_ahead(opt: MetaAdamW, g1: Sequence[Tensor | None], last_grads: Sequence[Tensor | None]) -> LookAhead:
    """What ``opt.step()`` would do with the gradient ``g1``, without doing it.

    u is m̂′/(√v̂′ + ε) for the moments that the step would leave. The released code takes the features from the ``.grad`` of the last
    training step, and the moments as that step left them.

    Args:
        opt: the optimizer; nothing of it changes.
        g1: T gradients of what is minimized, None where there is none.
        last_grads: T gradients of the last training step, for the released code; empty otherwise.
    """
    states = opt._current_states(g1)
    try:
        return _look_ahead(opt, states, g1, last_grads)
    finally:
        states.let_go()


def _look_ahead(opt: MetaAdamW, states: States, g1: Sequence[Tensor | None], last_grads: Sequence[Tensor | None]) -> LookAhead:
    released = opt.variant == "released"
    opt._record_stream()
    with torch.no_grad():
        states.counts.take_writes()
        hyper = opt._hyperparameters.update(opt.param_groups)
        # A .grad is the gradient of loss_fn, which an optimizer with maximize=True negates. g1 has been negated already.
        grads, sign = (last_grads, hyper.sign) if released else (g1, None)
        states.set_gradients(grads)
        scaled = scale(opt._backend, opt._measure(states)[1], sign, None, opt.max_grad_norm)
        grad_factor = scaled.factor
        step = opt._counts[:-1] + (0 if released else 1)
        if released:
            directions = _stored_directions(states, states.of_rows(torch.stack([step, hyper.beta1, hyper.beta2, hyper.eps])))
            if grad_factor is not None:  # so far by the norm of the last gradients: g1 is clipped by its own
                states.set_gradients(g1)
                grad_factor = scale(opt._backend, opt._measure(states)[1], None, None, opt.max_grad_norm).factor
        else:
            directions = _next_directions(states, g1, step, hyper, grad_factor, opt._backend.update_vectors)
    _, scales = opt._encode(scaled.sums, 0 if released else 1)
    return LookAhead(
        scales=scales,
        clip=1.0 if grad_factor is None else grad_factor[0].to(scales.dtype),
        lr=hyper.lr,
        weight_decay=_released_decay(hyper, step) if released else hyper.weight_decay,
        directions=[
            torch.view_as_complex(u) if u is not None and p.is_complex() else u
            for p, u in zip(states.held.leaves, states.spread(directions), strict=True)
        ],
        group_of=opt._group_of,
        moves_wd_scale=not released,
        backend=opt._backend.name,
        rank_sums=opt._rank_sums,
    )


def _released_decay(hyper: Hyperparameters, step: Tensor) -> Tensor:
    """λ/(1-β1^k); 0 where k = 0: an infinite quotient times the 0 of a tensor that does not move would be NaN."""
    return torch.where(step > 0, hyper.weight_decay / (1 - hyper.beta1**step), 0.0)


def _next_directions(
    states: States,
    g1: Sequence[Tensor | None],
    step: Tensor,
    hyper: Hyperparameters,
    grad_factor: Tensor | None,
    update_vectors: Callable[..., Tensor],
) -> list[Tensor | None]:
    """Returns u of each row in a step with g1, by the update op itself on copies: from p = 0, with step size -1 and no decay."""
    grads = [None if (g := g1[t]) is None else as_real_gradient(g) for t in states.rows]
    if not grads:
        return []
    directions = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in states.held.params]
    copies = {
        name: None if xs is None else [x if g is None else x.clone() for x, g in zip(xs, grads, strict=True)]
        for name, xs in states.held.by_name().items()
    }
    launch = type(states.launch)(grads, copies["exp_avg"], directions, copies["exp_avg_sq"], copies["max_exp_avg_sq"], written=True)
    ones = torch.ones_like(step)
    vectors = update_vectors(-ones, ones, step, hyper.beta1, hyper.beta2, hyper.eps, grad_factor)
    launch.update_(states.of_rows(vectors))
    return [None if g is None else u for g, u in zip(grads, directions, strict=True)]


def _stored_directions(states: States, numbers: Tensor) -> list[Tensor | None]:
    """Returns u of each row in the released code: from the stored moments and counts; None before the first step of a parameter.

    ``numbers`` [4, R]: step, beta1, beta2, eps.
    """
    lists = states.held.by_name()
    exp_avgs, exp_avg_sqs, maxima = lists["exp_avg"] or [], lists["exp_avg_sq"] or [], lists["max_exp_avg_sq"]
    second_moments = exp_avg_sqs if maxima is None else [x if x.numel() else v for x, v in zip(maxima, exp_avg_sqs, strict=True)]
    step, beta1, beta2, eps = numbers.unbind()
    bias_correction1 = (1 - beta1**step).unbind()
    bias_correction2 = (1 - beta2**step).unbind()
    return [
        None if k == 0 else (m / bias_correction1[i]) / ((v / bias_correction2[i]).sqrt() + eps[i])
        for i, (m, v, k) in enumerate(zip(exp_avgs, second_moments, step.tolist(), strict=True))
    ]
