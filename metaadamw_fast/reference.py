"""The ops in plain eager PyTorch: oracle, documentation, and the fallback where nothing faster runs.

The signatures are those of the C++ ops. Every line here is a line of the paper: MetaAdamW section 3.2 for the sums,
algorithm 1 for the update.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import features, rounding
from .checks import check_distinct, check_stats, check_update, update_lists
from .core import devices
from .core.rule import of_multiplied_gradient

Tensors = Sequence[Tensor]


def arithmetic_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any tensor is, else float32: what bfloat16, float16 and float32 are computed in."""
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def tensor_stats(
    grads: Tensors,
    exp_avgs: Tensors,
    params: Tensors | None,
    exp_avg_sqs: Tensors | None,
    count_nonzero: bool,
    dtype: torch.dtype,
    arithmetic: Sequence[torch.dtype] | None = None,
) -> Tensor:
    """Sums per tensor; see :func:`metaadamw_fast.ops.tensor_stats`. ``arithmetic``: of each row, where the lists do not show it."""
    check_stats(grads, exp_avgs, params, exp_avg_sqs, dtype)
    rows = []
    for t, (grad, exp_avg) in enumerate(zip(grads, exp_avgs, strict=True)):
        operands = [grad, exp_avg, *(x[t] for x in (params, exp_avg_sqs) if x is not None)]
        computed = arithmetic_dtype(*operands) if arithmetic is None else arithmetic[t]
        m = exp_avg.to(computed)
        g = grad.to(computed) if grad.numel() else torch.zeros_like(m)
        sums = [_sum(g * g), _sum(g * m), _sum(m * m)]
        sums += [_sum(x.to(computed).square()) for x in operands[2:]]
        if count_nonzero:
            sums += [_sum((g != 0).float()), _sum((m != 0).float())]
        rows.append(torch.stack(sums))
    width = 3 + (params is not None) + (exp_avg_sqs is not None) + 2 * count_nonzero
    return torch.stack(rows).to(dtype) if rows else torch.zeros(0, width, dtype=dtype)


def _sum(x: Tensor) -> Tensor:
    return x.sum(dtype=torch.float64)


def beside(read: Tensor, carried: Tensor | None) -> Tensor:
    """Sums [T, 3 or 5] that were read, with the columns Σp², Σv² ``carried`` from elsewhere, float64 [T, 2], in their place."""
    return read if carried is None else torch.cat([read[:, :3], carried.to(read.dtype), read[:, 3:]], dim=1)


def group_features(statistics: Tensor, table: features.FeatureTable, done: Tensor, ahead: int, total_steps: int | None) -> Tensor:
    """Features [G, D] when ``ahead`` more steps than ``done`` (0-dim) will have been taken; see ``features.group_features``.

    The host does not wait for a device to know how many are done.
    """
    progress: float | Tensor
    if devices.readable(done):
        progress = features.training_progress(float(done) + ahead, total_steps)
    else:
        progress = features.training_progress(done.double() + ahead, total_steps)
    return features.group_features(statistics, table, progress)


def gradient_factor(
    tensors: int, sign: Tensor | None, loss_scale: Tensor | None, max_norm: float = 0.0, statistics: Tensor | None = None
) -> tuple[Tensor | None, Tensor | None]:
    """What unscaling (by 0-dim ``loss_scale``), clipping and maximizing (``sign`` [T]) multiply the gradients with.

    Clipping needs the ``statistics`` of the gradients as they are: Σ(cg)² = c²·Σg², so the gradients are not read for it. The
    coefficient is that of ``torch.nn.utils.clip_grad_norm_``.

    Returns:
        The factors, float64 [T] (None if 1), and the norm of the unscaled gradients before clipping (None without statistics).
    """
    factor = norm = None
    if loss_scale is not None:
        factor = loss_scale.double().reciprocal()
    if statistics is not None:
        norm = statistics[:, 0].sum().sqrt()
        if factor is not None:
            norm = (norm * factor).to(statistics.dtype)
        if max_norm:
            clip = (max_norm / (norm.double() + 1e-6)).clamp(max=1.0)
            factor = clip if factor is None else factor * clip
    if factor is None:
        return sign, norm
    return (factor.expand(tensors) if sign is None else sign * factor).contiguous(), norm


def scaled_gradients(
    statistics: Tensor, sign: Tensor | None, loss_scale: Tensor | None, max_norm: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients that are multiplied by unscaling, clipping (``max_norm`` 0 does not) and maximizing.

    Args:
        statistics: [T, S] of the gradients as they are.
        sign: float64 [T], loss_scale: float32, 0-dim, max_norm: see :func:`gradient_factor`.

    Returns:
        Factors, float64 [T], the norm of the unscaled gradients, 0-dim, and the statistics [T, S] of the multiplied gradients.
    """
    factors, norm = gradient_factor(len(statistics), sign, loss_scale, max_norm, statistics)
    if factors is None:
        factors = statistics.new_ones(len(statistics), dtype=torch.float64)
    assert norm is not None
    return factors, norm, of_multiplied_gradient(statistics, factors, (2, 1)[: statistics.shape[1]])


def modulation(
    scales: Tensor,
    group_of: Tensor,
    lr: Tensor,
    weight_decay: Tensor,
    beta1: Tensor,
    beta2: Tensor,
    eps: Tensor,
    grad_scale: Tensor | None,
    steps: Tensor,
    go: Tensor | None,
    released: bool,
) -> Tensor:
    """What the update takes of each tensor, from the scales of its group: algorithm 1, lines of the parameter.

    Args:
        scales: [4, G], of which lr_scale and wd_scale are used.
        group_of: int64 [T].
        lr, weight_decay, beta1, beta2, eps, grad_scale: float64 [T]; grad_scale None for 1.
        steps: float64 or float32 [T], the step counts so far.
        go: 0-dim bool, whether this step counts; None if it does.
        released: divide the decay, too, by the bias correction 1 - beta1^k, as the authors' code.

    Returns:
        :func:`update_vectors` of the step size lr·lr_scale, the decay factor 1 - lr·lr_scale·wd_scale·λ and the step count: 0 for a
        step that does not count.
    """
    lr_scale, wd_scale, *_ = scales.index_select(1, group_of).double().unbind()
    step = steps.double() + 1
    if go is not None:
        step = step * go
    step_size = lr * lr_scale
    decay = step_size * wd_scale * weight_decay
    if released:
        decay = decay / (1 - beta1**step)
    return update_vectors(step_size, 1 - decay, step, beta1, beta2, eps, grad_scale)


def update_vectors(
    step_size: Tensor, decay_factor: Tensor, step: Tensor, beta1: Tensor, beta2: Tensor, eps: Tensor, grad_scale: Tensor | None
) -> Tensor:
    """The arguments of :func:`adamw_update_`, [T] each, as one float64 tensor [7, T]: what a launch takes."""
    scale = torch.ones_like(step_size) if grad_scale is None else grad_scale
    return torch.stack([step_size, decay_factor, step, beta1, beta2, eps, scale])


def running_maximum(maximum: Tensor, v: Tensor, _: Tensor) -> Tensor:
    """Amsgrad's v_hat, before the bias correction."""
    return torch.maximum(maximum, v)


def running_mean(average: Tensor, v: Tensor, step: Tensor) -> Tensor:
    """AVGrad's: A ← A + (v - A)/step, the mean of v over all steps. Ozkara et al., *MADA*, arXiv 2401.08893 (2024)."""
    return average + (v - average) / step


def adamw_update_(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    max_exp_avg_sqs: Tensors | None,
    step_size: Tensor,
    decay_factor: Tensor,
    step: Tensor,
    beta1: Tensor,
    beta2: Tensor,
    eps: Tensor,
    grad_scale: Tensor | None,
    new_sums: Tensor | None = None,
    rounding_seed: int | None = None,
    low_precision_params: Tensors | None = None,
    of_v_hat: Callable[[Tensor, Tensor, Tensor], Tensor] = running_maximum,
) -> None:
    """The modulated AdamW update; see :func:`metaadamw_fast.ops.adamw_update_`.

    ``of_v_hat(state, v, step)`` takes v's place in the denominator of rows that have such a state, in ``max_exp_avg_sqs``. With
    :func:`running_mean` this is AVGrad's update.
    """
    hyperparameters = (step_size, decay_factor, step, beta1, beta2, eps, grad_scale)
    check_update(params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, *hyperparameters, low_precision_params=low_precision_params)
    check_distinct(*update_lists(params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, low_precision_params))
    if new_sums is not None and new_sums.shape[1] == 5:
        new_sums.copy_(tensor_stats(grads, exp_avgs, params, exp_avg_sqs, False, torch.float64))
    bias_correction1 = 1 - beta1**step
    bias_correction2 = 1 - beta2**step
    for t, (param, grad, exp_avg, exp_avg_sq) in enumerate(zip(params, grads, exp_avgs, exp_avg_sqs, strict=True)):
        if not grad.numel():  # absent, or of a tensor without elements: the row stays as it is
            if new_sums is not None and not param.numel():
                new_sums[t] = 0
            continue
        arithmetic = arithmetic_dtype(param, grad, exp_avg, exp_avg_sq)
        g = grad.to(arithmetic)
        skip = step[t] == 0
        if grad_scale is not None:
            g = g * grad_scale[t]
        m = beta1[t] * exp_avg.to(arithmetic) + (1 - beta1[t]) * g
        v = beta2[t] * exp_avg_sq.to(arithmetic) + (1 - beta2[t]) * g * g
        write = _Writer(skip, None if rounding_seed is None else (rounding_seed, step[t], t), param)
        write(exp_avg, m, rounding.MOMENTUM)
        write(exp_avg_sq, v, rounding.SECOND_MOMENT)
        if max_exp_avg_sqs is not None and max_exp_avg_sqs[t].numel():
            v = of_v_hat(max_exp_avg_sqs[t].to(arithmetic), v, step[t])
            _write(max_exp_avg_sqs[t], v, skip)
        m_hat = m / bias_correction1[t]
        v_hat = v / bias_correction2[t]
        low = None if low_precision_params is None or not low_precision_params[t].numel() else low_precision_params[t]
        start = param if low is None else start_of_update(param, low)
        p = decay_factor[t] * start.to(arithmetic) - step_size[t] * m_hat / (v_hat.sqrt() + eps[t])
        write(param, p, rounding.PARAM)
        if low is not None:
            low.copy_(torch.where(skip, low, param.to(low.dtype)))
        if new_sums is not None and new_sums.shape[1] == 2:
            left = [_sum(x.to(arithmetic).square()) for x in (param, exp_avg_sq)]
            _write(new_sums[t], torch.stack(left), skip)


def start_of_update(master: Tensor, low: Tensor) -> Tensor:
    """What the update of a bfloat16 or float16 parameter ``low`` starts from: its float32 master, or what others wrote since.

    The master counts where the parameter is its rounding to nearest. Versions do not tell, since ``p.data`` has a counter of its
    own: the numbers are compared.
    """
    rounded = master.to(low.dtype)
    return torch.where((rounded == low) | (rounded.isnan() & low.isnan()), master, low.to(master.dtype))


class _Writer:
    """Writes what is updated of one tensor, by chance up or down if there is a ``key``: seed, step, number of the tensor."""

    def __init__(self, skip: Tensor, key: tuple[int, Tensor, int] | None, leader: Tensor) -> None:
        self._skip, self._key = skip, key
        self._element = None if key is None else rounding.walked(leader)

    def __call__(self, x: Tensor, value: Tensor, operand: int) -> None:
        if self._key is not None and self._element is not None:
            value = rounding.round_stochastically(value, x.dtype, rounding.random_bits(*self._key, operand, self._element))
        _write(x, value, self._skip)


def _write(x: Tensor, value: Tensor, skip: Tensor) -> None:
    """``x = value``, unless ``skip``; decided where the tensors are."""
    x.copy_(torch.where(skip, x.to(value.dtype), value))
