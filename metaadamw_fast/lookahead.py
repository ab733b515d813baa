"""The hypothetical step of a meta-update: θ′ as a function of the scales, and the gradient's way back. MetaAdamW algorithm 2.

``MetaAdamW.look_ahead`` makes it of what it knows. Nothing here knows the optimizer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import ops
from .core.hyperparameters import Hyperparameters
from .core.sharding import RankSums
from .core.states import States
from .core.watch import as_real, as_real_gradient


@dataclass
class LookAhead:
    """θ′ = p - lr·lr_scale·(u + wd_scale·λ·p): affine in each scale, so its derivatives are dot products with u and p.

    Lists have T entries, in the order of ``param_groups``, of DTensors this rank's shards.

    Attributes:
        scales: [4, G], with the encoder's graph.
        clip: what clipping multiplies the gradient with.
        lr, weight_decay: float64 [T]; the released code's weight_decay is λ/(1-β1^k), and 0 before a tensor's first step.
        directions: u of each tensor, None where it does not move.
        group_of: int64 [T], the group of each tensor.
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
        """θ′ from θ; None where a tensor does not move."""
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

    @torch.no_grad()
    def group_sums(self, xs: Sequence[Tensor | None], ys: Sequence[Tensor | None]) -> Tensor:
        """Σx², Σx·y and Σy² over the tensors of each group, [G, 3] in the dtype of the scales; a missing one counts as zeros."""
        sums = self.lr.new_zeros(len(xs), 3)
        xs, ys = ([None if z is None else as_real_gradient(z) for z in zs] for zs in (xs, ys))
        pairs = {t: (x, y) for t, (x, y) in enumerate(zip(xs, ys, strict=True)) if x is not None and y is not None}
        if pairs:
            both = zip(*pairs.values(), strict=True)
            sums[list(pairs)] = ops.tensor_stats(*map(list, both), dtype=torch.float64, backend=self.backend)
        for t, (x, y) in enumerate(zip(xs, ys, strict=True)):
            if (x is None) != (y is None):
                sums[t, 0 if y is None else 2] = torch.stack([z.double().square().sum() for z in (x, y) if z is not None]).sum()
        groups = self.lr.new_zeros(self.scales.shape[1], 3)
        return groups.index_add_(0, self.group_of, self.rank_sums(sums)).to(self.scales.dtype)


def gradients_of_rows(states: States, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The R gradients of the rows among T, complex ones as real ones; a launch knows their addresses only: hold them."""
    return [None if (g := grads[t]) is None else as_real_gradient(g) for t in states.rows]


def sums_beside(
    states: States,
    launch: Callable[..., Any],
    rule: str,
    wanted: int,
    grads: list[Tensor | None],
    dtype: torch.dtype,
    vectors: Tensor | None,
) -> Tensor:
    """The sums [R, S] that ``wanted`` has bits for, of R other gradients and the states, by a launch for this once.

    The optimizer's own table would keep the addresses of gradients that are soon freed.
    """
    beside = launch(grads, *states.held.operands(), written=False, rule=rule)
    of_rows = None if vectors is None else states.of_rows(vectors).contiguous()
    sums: Tensor = beside.measure(wanted, dtype, None, of_rows)
    return sums


def released_decay(hyper: Hyperparameters, step: Tensor) -> Tensor:
    """λ/(1-β1^k); 0 where k = 0: an infinite quotient times the 0 of a tensor that does not move would be NaN."""
    return torch.where(step > 0, hyper.weight_decay / (1 - hyper.beta1**step), 0.0)


def next_directions(states: States, launch: Callable[..., Any], grads: list[Tensor | None], vectors: Tensor) -> list[Tensor | None]:
    """Returns u of each row in a step with R gradients, by the update itself on copies: from p = 0.

    ``vectors`` [V, T] are those of an update with step size -1 and decay factor 1.
    """
    if not grads:
        return []
    directions = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in states.held.params]
    copies = {
        name: None if xs is None else [x if g is None else x.clone() for x, g in zip(xs, grads, strict=True)]
        for name, xs in states.held.by_name().items()
    }
    beside = launch(grads, copies["exp_avg"], directions, copies["exp_avg_sq"], copies["max_exp_avg_sq"], written=True)
    beside.update_(states.of_rows(vectors))
    return [None if g is None else u for g, u in zip(grads, directions, strict=True)]


def stored_directions(states: States, step: Tensor, hyper: Hyperparameters) -> list[Tensor | None]:
    """Returns u of each row in the released code: from the stored moments and counts; None before the first step of a parameter."""
    lists = states.held.by_name()
    exp_avgs, exp_avg_sqs, maxima = lists["exp_avg"] or [], lists["exp_avg_sq"] or [], lists["max_exp_avg_sq"]
    second_moments = exp_avg_sqs if maxima is None else [x if x.numel() else v for x, v in zip(maxima, exp_avg_sqs, strict=True)]
    step, beta1, beta2, eps = states.of_rows(torch.stack([step, hyper.beta1, hyper.beta2, hyper.eps])).unbind()
    bias_correction1 = (1 - beta1**step).unbind()
    bias_correction2 = (1 - beta2**step).unbind()
    return [
        None if k == 0 else (m / bias_correction1[i]) / ((v / bias_correction2[i]).sqrt() + eps[i])
        for i, (m, v, k) in enumerate(zip(exp_avgs, second_moments, step.tolist(), strict=True))
    ]
