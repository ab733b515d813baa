"""The ops of AdamW with online learning in plain eager PyTorch: docs/algorithm.md section 13, line by line.

The update is AdamW's (reference.py). Here are the moving average of the parameter, and the sums of a new gradient with what the
update before did.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .reference import _sum, _write, adamw_update_, arithmetic_dtype, running_maximum

SUMS = (
    *("grad_sq", "grad_momentum", "momentum_sq", "param_sq", "second_moment_sq"),
    *("grad_direction", "grad_param", "direction_sq", "direction_param", "grad_distance", "distance_sq"),
    *("grad_nonzero", "momentum_nonzero"),
)
FOUND = (5, 7, 9, 11, 13)  # so many of the first ones an update can make of what it finds
CARRIED = (SUMS.index("param_sq"), SUMS.index("second_moment_sq"))
LAST = ("inverse_correction1", "inverse_sqrt_correction2", "eps")  # rows of the vectors, of the update before


class Lists(NamedTuple):
    """The operands, T tensors each, by the numbers that the kernels have for them. A missing average or maximum counts as zeros."""

    grads: Sequence[Tensor]
    exp_avgs: Sequence[Tensor]
    params: Sequence[Tensor] | None = None
    exp_avg_sqs: Sequence[Tensor] | None = None
    ema_params: Sequence[Tensor] | None = None
    max_exp_avg_sqs: Sequence[Tensor] | None = None
    low_precision_params: Sequence[Tensor] | None = None


def online_sums(
    lists: Lists, columns: int, dtype: torch.dtype, carried: Tensor | None = None, last: Tensor | None = None
) -> Tensor:
    """Sums [T, S] of the gradients as they are: the columns of ``SUMS`` that ``columns`` has a bit for.

    Args:
        lists: of the launch.
        columns: bit i: ``SUMS[i]``.
        dtype: of the result.
        carried: float64 [T, 2], the columns ``CARRIED``, which ``columns`` then lacks.
        last: float64 [3, T], the rows ``LAST`` of the update before. A tensor that it did not move has 0 first: its u is 0.
    """
    wanted = [column for column in range(len(SUMS)) if columns >> column & 1]
    if last is None and columns >> FOUND[0]:
        raise RuntimeError("the sums of the update before need its vectors")
    if lists.params is None or lists.exp_avg_sqs is None:
        raise RuntimeError("the launch was made without the lists of these columns")
    rows = []
    for t, (grad, exp_avg, param, exp_avg_sq) in enumerate(
        zip(lists.grads, lists.exp_avgs, lists.params, lists.exp_avg_sqs, strict=True)
    ):
        arithmetic = arithmetic_dtype(*(x for x in (grad, exp_avg, param, exp_avg_sq) if x.numel()))
        m, p, v = (x.to(arithmetic) for x in (exp_avg, param, exp_avg_sq))
        e, largest = (
            torch.zeros_like(p) if xs is None or not xs[t].numel() else xs[t].to(arithmetic)
            for xs in (lists.ema_params, lists.max_exp_avg_sqs)
        )
        g = grad.to(arithmetic) if grad.numel() else torch.zeros_like(m)
        pairs = [(g, g), (g, m), (m, m), (p, p), (v, v)]
        if last is not None:
            inverse_correction1, inverse_sqrt_correction2, eps = last[:, t].to(arithmetic).unbind()
            u = m * inverse_correction1 / (torch.maximum(largest, v).sqrt() * inverse_sqrt_correction2 + eps)
            pairs += [(g, u), (g, p), (u, u), (u, p), (g, p - e), (p - e, p - e)]
            pairs += [((x != 0).to(x), torch.ones_like(x)) for x in (g, m)]
        sums = {column: _sum(pairs[column][0] * pairs[column][1]) for column in wanted}
        sums.update({} if carried is None else dict(zip(CARRIED, carried[t], strict=True)))
        rows.append(torch.stack([sums[column].double() for column in sorted(sums)]))
    width = len(wanted) + (0 if carried is None else len(CARRIED))
    return torch.stack(rows).to(dtype) if rows else torch.zeros(0, width, dtype=dtype)


def online_update_(lists: Lists, vectors: Tensor, new_sums: Tensor | None, rounding_seed: int | None) -> None:
    """AdamW's update, in place, then that of the average: e ← e + (1 - decay)·(p - e) where the tensor moved.

    Args:
        lists: of the launch.
        vectors: float64 [11, T]: AdamW's seven rows, the average's decay, ``LAST``.
        new_sums: None, float64 [T, 2] as AdamW's, or float64 [T, S] with S of ``FOUND``
            for the first of ``SUMS``, of what the update finds.
        rounding_seed: of stochastic rounding, None for rounding to nearest. The average is never rounded by chance.
    """
    assert lists.params is not None
    assert lists.exp_avg_sqs is not None
    step_size, decay_factor, step, beta1, beta2, eps, grad_scale, average_decay = vectors[:8].unbind()
    if new_sums is not None and new_sums.shape[1] in FOUND:
        new_sums.copy_(online_sums(lists, (1 << new_sums.shape[1]) - 1, torch.float64, None, vectors[8:]))
        new_sums = None
    moved = (lists.params, lists.grads, lists.exp_avgs, lists.exp_avg_sqs, lists.max_exp_avg_sqs)
    numbers = (step_size, decay_factor, step, beta1, beta2, eps, grad_scale)
    adamw_update_(*moved, *numbers, new_sums, rounding_seed, lists.low_precision_params, running_maximum)
    for t, (grad, param) in enumerate(zip(lists.grads, lists.params, strict=True)):
        if lists.ema_params is not None and grad.numel():
            e = lists.ema_params[t]
            value = e + (1 - average_decay[t]) * (param.to(e.dtype) - e)
            _write(e, value, step[t] == 0)
