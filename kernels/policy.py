"""What stands on both sides of the encoder, one launch each: the arithmetic of csrc/policy.h, in its order of operations.

A step has a few numbers per tensor and group here. In eager PyTorch that is 22 launches, 36 with clipping, and each takes longer to
launch than to run. Longer than 300 lines: four such ops, one after the other, each a kernel and its launch.
"""

from __future__ import annotations

import contextlib
import struct
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from .elements import square_root

if TYPE_CHECKING:
    from metaadamw_fast.features import FeatureTable

ROWS = tl.constexpr(256)  # tensors at a time
NORM_FLOOR = tl.constexpr(1e-8)  # below it a norm counts as this in a cosine
WARPS = 4


# ----------------------------------------------------------------------------------------------------------------- features


@triton.jit
def _at_least(x, floor):
    """A NaN stays one."""
    return tl.where(x < floor, floor, x)


@triton.jit
def _column(statistics, width, tensor, column: tl.constexpr, mask):
    return tl.load(statistics + tensor * width + column, mask=mask, other=0.0)


@triton.jit
def _tensor_values(statistics, width, tensor, numel, mask, enhanced: tl.constexpr, v_norm: tl.constexpr):
    """What is averaged over the tensors of a group, in float64; zeros where the mask is off."""
    g_norm = square_root(_column(statistics, width, tensor, 0, mask))
    m_norm = square_root(_column(statistics, width, tensor, 2, mask))
    fifth = g_norm * 0
    if enhanced:
        count = _at_least(numel, 1.0)  # an empty tensor has no zeros
        third = tl.where(mask, (numel - _column(statistics, width, tensor, 5, mask)) / count, 0.0)
        fourth = tl.where(mask, (numel - _column(statistics, width, tensor, 6, mask)) / count, 0.0)
    else:
        third = square_root(_column(statistics, width, tensor, 3, mask))
        floor = tl.full([], NORM_FLOOR, g_norm.dtype)
        fourth = _column(statistics, width, tensor, 1, mask) / (_at_least(g_norm, floor) * _at_least(m_norm, floor))
        if v_norm:
            fifth = square_root(_column(statistics, width, tensor, 4, mask))
    return g_norm.to(tl.float64), m_norm.to(tl.float64), third.to(tl.float64), fourth.to(tl.float64), fifth.to(tl.float64)


@triton.jit
def _squared_difference(x, mean, mask):
    return tl.where(mask, (x - mean) * (x - mean), 0.0)


@triton.jit(do_not_specialize=["width", "ahead", "total_steps", "dim"], do_not_specialize_on_alignment=["statistics", "features"])
def group_features_kernel(
    statistics, width, order, begin, numel, done, ahead, total_steps, template, features, dim,
    enhanced: tl.constexpr, v_norm: tl.constexpr, deviations: tl.constexpr, time: tl.constexpr, lanes: tl.constexpr,
):  # fmt: skip
    """One program per group: its row [dim] of the features; ``time`` is the column of the progress, -1 for none."""
    group = tl.program_id(0).to(tl.int64)
    first = tl.load(begin + group)
    last = tl.load(begin + group + 1)
    count = (last - first).to(tl.float64)
    row = tl.arange(0, ROWS)
    sum0 = tl.zeros([ROWS], tl.float64)
    sum1 = sum0
    sum2 = sum0
    sum3 = sum0
    sum4 = sum0
    for i in range(first, last, ROWS):
        mask = i + row < last
        tensor = tl.load(order + i + row, mask=mask, other=0)
        size = tl.load(numel + i + row, mask=mask, other=0.0)
        x0, x1, x2, x3, x4 = _tensor_values(statistics, width, tensor, size, mask, enhanced, v_norm)
        sum0 += x0
        sum1 += x1
        sum2 += x2
        sum3 += x3
        sum4 += x4
    mean0 = tl.sum(sum0, axis=0) / count
    mean1 = tl.sum(sum1, axis=0) / count
    mean2 = tl.sum(sum2, axis=0) / count
    mean3 = tl.sum(sum3, axis=0) / count
    mean4 = tl.sum(sum4, axis=0) / count
    lane = tl.arange(0, lanes)
    out = tl.load(template + group * dim + lane, mask=lane < dim, other=0.0).to(tl.float64)
    if enhanced or deviations:
        sum0 = tl.zeros([ROWS], tl.float64)
        sum1 = sum0
        sum2 = sum0
        sum3 = sum0
        sum4 = sum0
        for i in range(first, last, ROWS):
            mask = i + row < last
            tensor = tl.load(order + i + row, mask=mask, other=0)
            size = tl.load(numel + i + row, mask=mask, other=0.0)
            x0, x1, x2, x3, x4 = _tensor_values(statistics, width, tensor, size, mask, enhanced, v_norm)
            sum0 += _squared_difference(x0, mean0, mask)
            sum1 += _squared_difference(x1, mean1, mask)
            sum2 += _squared_difference(x2, mean2, mask)
            sum3 += _squared_difference(x3, mean3, mask)
            sum4 += _squared_difference(x4, mean4, mask)
        if enhanced:
            out = tl.where(lane == 1, tl.sum(sum0, axis=0) / count, out)
            out = tl.where(lane == 3, tl.sum(sum1, axis=0) / count, out)
        else:
            values: tl.constexpr = 4 + v_norm
            out = tl.where(lane == values, tl.sqrt(tl.sum(sum0, axis=0) / count), out)
            out = tl.where(lane == values + 1, tl.sqrt(tl.sum(sum1, axis=0) / count), out)
            out = tl.where(lane == values + 2, tl.sqrt(tl.sum(sum2, axis=0) / count), out)
            out = tl.where(lane == values + 3, tl.sqrt(tl.sum(sum3, axis=0) / count), out)
            if v_norm:
                out = tl.where(lane == values + 4, tl.sqrt(tl.sum(sum4, axis=0) / count), out)
    if enhanced:  # a mean and a variance of each norm, then the sparsities
        out = tl.where(lane == 0, mean0, out)
        out = tl.where(lane == 2, mean1, out)
        out = tl.where(lane == 4, mean2, out)
        out = tl.where(lane == 5, mean3, out)
    else:
        out = tl.where(lane == 0, mean0, out)
        out = tl.where(lane == 1, mean1, out)
        out = tl.where(lane == 2, mean2, out)
        out = tl.where(lane == 3, mean3, out)
        if v_norm:
            out = tl.where(lane == 4, mean4, out)
    if time >= 0:
        step = tl.load(done).to(tl.float64) + ahead
        if total_steps > 0:
            progress = step / total_steps
        else:
            progress = 2.0 / (1.0 + tl.exp(-step / 1000.0)) - 1.0
        out = tl.where(lane == time, progress, out)
    tl.store(features + group * dim + lane, out, mask=lane < dim)


def group_features(statistics: Tensor, table: FeatureTable, done: Tensor, ahead: int, total_steps: int | None) -> Tensor:
    """As ``metaadamw_fast.reference.group_features``; the means are accumulated in float64.

    Raises:
        RuntimeError: statistics of another dtype or shape than the table's.
    """
    config = table.config
    groups, dim = table.template.shape
    check("statistics", statistics, table.template.dtype, (len(table.order), 7 if config.enhanced else 5), at_least=True)
    check_counts("done", done, ())
    features = torch.empty_like(table.template)
    with device_guard(statistics):
        group_features_kernel[(groups,)](
            statistics, statistics.shape[1], table.order, table.begin, table.numel, done, ahead, total_steps or 0, table.template,
            features, dim, config.enhanced, config.v_norm and not config.enhanced, config.deviations,
            -1 if config.time_column is None else config.time_column, triton.next_power_of_2(dim), num_warps=WARPS,
            enable_fp_fusion=False,
        )  # fmt: skip
    return features


# ---------------------------------------------------------------------------------------------------- clipping, unscaling


@triton.jit(do_not_specialize=["tensors", "width", "max_norm_bits"], do_not_specialize_on_alignment=["statistics", "scaled"])
def scaled_gradients_kernel(
    statistics, tensors, width, sign, loss_scale, max_norm_bits, factors, norm, scaled, clips: tl.constexpr
):
    """One program: there are as many rows as tensors."""
    row = tl.arange(0, ROWS)
    squares = tl.zeros([ROWS], tl.float64)
    for i in range(0, tensors, ROWS):
        squares += tl.load(statistics + (i + row).to(tl.int64) * width, mask=i + row < tensors, other=0.0).to(tl.float64)
    total = tl.sum(squares, axis=0)
    number = statistics.dtype.element_ty
    unscale = tl.full([], 1.0, tl.float64)
    if loss_scale is not None:
        unscale = 1.0 / tl.load(loss_scale).to(tl.float64)
    # Rounded as torch rounds them: where the sum of squares overflows, the norm is infinite and clipping multiplies with 0.
    root = tl.sqrt(total.to(number).to(tl.float64)).to(number).to(tl.float64)
    length = (root * unscale).to(number).to(tl.float64)
    factor = unscale
    if clips:
        # In bits, since Triton would round a float to 32 of them.
        clip = max_norm_bits.to(tl.int64).to(tl.float64, bitcast=True) / (length + 1e-6)
        factor = tl.where(clip > 1.0, unscale, unscale * clip)  # a clip of NaN is one
    tl.store(norm, length)
    for i in range(0, tensors, ROWS):
        mask = i + row < tensors
        own = tl.zeros([ROWS], tl.float64) + factor
        if sign is not None:
            own = own * tl.load(sign + i + row, mask=mask, other=1.0)
        tl.store(factors + i + row, own, mask=mask)
        first = (i + row).to(tl.int64) * width
        has_momentum = mask & (width > 1)
        with_momentum = (tl.load(statistics + first + 1, mask=has_momentum, other=0.0) * own).to(number)
        squared = (own * own * tl.load(statistics + first, mask=mask, other=0.0)).to(number)
        # Clipping multiplies with 0 where the sum overflows: whether the gradient is finite then shows in its product with m.
        tl.store(scaled + first, tl.where((own == 0.0) & has_momentum, with_momentum, squared), mask=mask)
        tl.store(scaled + first + 1, with_momentum, mask=has_momentum)
        for column in range(2, width):
            tl.store(scaled + first + column, tl.load(statistics + first + column, mask=mask), mask=mask)


def scaled_gradients(
    statistics: Tensor, sign: Tensor | None, loss_scale: Tensor | None, max_norm: float
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``metaadamw_fast.reference.scaled_gradients``.

    Raises:
        RuntimeError: an argument of another dtype or shape.
    """
    tensors, width = statistics.shape
    dtype = statistics.dtype if statistics.dtype == torch.float64 else torch.float32
    check("statistics", statistics, dtype, (tensors, 1), at_least=True)
    check("sign", sign, torch.float64, (tensors,))
    factors = torch.empty(tensors, dtype=torch.float64, device=statistics.device)
    norm, scaled = statistics.new_empty(()), torch.empty_like(statistics)
    (bits,) = struct.unpack("<q", struct.pack("<d", max_norm))
    with device_guard(statistics):
        scaled_gradients_kernel[(1,)](
            statistics, tensors, width, sign, loss_scale, bits, factors, norm, scaled, max_norm > 0.0, num_warps=WARPS,
            enable_fp_fusion=False,
        )  # fmt: skip
    return factors, norm, scaled


# ---------------------------------------------------------------------------------------- the vectors of an update, [8, T]


@triton.jit
def integer_power(base, exponent):
    """base^exponent by repeated squaring in float64: the same bits as on every other machine, which no library's pow promises.

    Of numbers, or of lanes: then until the largest exponent is done.
    """
    result = base * 0 + 1.0
    bits = exponent.to(tl.int64)
    while _largest(bits) > 0:  # not `!= 0`: a step that is NaN or negative must not run forever
        result = tl.where(bits & 1 != 0, result * base, result)
        base *= base
        bits >>= 1
    return result


@triton.jit
def _largest(x):
    if x.type.is_block():
        return tl.max(x, axis=0)
    else:
        return x


@triton.jit
def _store_vectors(vectors, tensors, tensor, mask, step_size, decay_factor, step, beta1, beta2, eps, grad_scale):
    """What an update reads of each tensor, in the rows and bits of csrc/adamw.h: the powers are taken once, not by each program."""
    column = vectors + tensor
    rows = tensors.to(tl.int64)
    beta1 = tl.load(beta1 + tensor, mask=mask, other=0.0)
    beta2 = tl.load(beta2 + tensor, mask=mask, other=0.0)
    scale = tl.full([ROWS], 1.0, tl.float64)
    if grad_scale is not None:
        scale = tl.load(grad_scale + tensor, mask=mask, other=1.0)
    tl.store(column, step_size / (1.0 - integer_power(beta1, step)), mask=mask)
    tl.store(column + rows, decay_factor, mask=mask)
    tl.store(column + 2 * rows, step, mask=mask)
    tl.store(column + 3 * rows, beta1, mask=mask)
    tl.store(column + 4 * rows, beta2, mask=mask)
    tl.store(column + 5 * rows, 1.0 / tl.sqrt(1.0 - integer_power(beta2, step)), mask=mask)
    tl.store(column + 6 * rows, tl.load(eps + tensor, mask=mask, other=0.0), mask=mask)
    tl.store(column + 7 * rows, scale, mask=mask)


@triton.jit(do_not_specialize=["tensors"])
def update_vectors_kernel(vectors, tensors, step_size, decay_factor, step, beta1, beta2, eps, grad_scale):
    """A lane per tensor."""
    tensor = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    mask = tensor < tensors
    step_size = tl.load(step_size + tensor, mask=mask, other=0.0)
    decay_factor = tl.load(decay_factor + tensor, mask=mask, other=0.0)
    step = tl.load(step + tensor, mask=mask, other=0.0)
    _store_vectors(vectors, tensors, tensor, mask, step_size, decay_factor, step, beta1, beta2, eps, grad_scale)


@triton.jit(do_not_specialize=["tensors", "row_stride", "group_stride"], do_not_specialize_on_alignment=["scales"])
def modulation_kernel(
    vectors, tensors, scales, row_stride, group_stride, group_of, lr, weight_decay, beta1, beta2, eps, grad_scale, steps, go,
    released: tl.constexpr,
):  # fmt: skip
    """A lane per tensor."""
    tensor = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    mask = tensor < tensors
    place = tl.load(group_of + tensor, mask=mask, other=0) * group_stride
    lr_scale = tl.load(scales + place, mask=mask, other=1.0).to(tl.float64)
    wd_scale = tl.load(scales + row_stride + place, mask=mask, other=1.0).to(tl.float64)
    step = tl.load(steps + tensor, mask=mask, other=0.0).to(tl.float64) + 1.0
    if go is not None:
        step = tl.where(tl.load(go) != 0, step, 0.0)
    step_size = tl.load(lr + tensor, mask=mask, other=0.0) * lr_scale
    decay = step_size * wd_scale * tl.load(weight_decay + tensor, mask=mask, other=0.0)
    if released:
        decay = decay / (1.0 - integer_power(tl.load(beta1 + tensor, mask=mask, other=0.0), step))
    _store_vectors(vectors, tensors, tensor, mask, step_size, 1.0 - decay, step, beta1, beta2, eps, grad_scale)


def update_vectors(
    step_size: Tensor, decay_factor: Tensor, step: Tensor, beta1: Tensor, beta2: Tensor, eps: Tensor, grad_scale: Tensor | None
) -> Tensor:
    """The vectors that an update takes, float64 [8, T], from hyper-parameters, float64 [T] each; ``grad_scale`` None for 1.

    Raises:
        RuntimeError: an argument of another dtype or shape.
    """
    tensors = len(step_size)
    hyper = {
        "step_size": step_size, "decay_factor": decay_factor, "step": step, "beta1": beta1, "beta2": beta2, "eps": eps,
        "grad_scale": grad_scale,
    }  # fmt: skip
    for name, x in hyper.items():
        check(name, x, torch.float64, (tensors,))
    vectors = torch.empty(8, tensors, dtype=torch.float64, device=step_size.device)
    if tensors:
        with device_guard(vectors):
            update_vectors_kernel[(triton.cdiv(tensors, ROWS.value),)](
                vectors, tensors, *hyper.values(), num_warps=WARPS, enable_fp_fusion=False
            )
    return vectors


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
    """:func:`update_vectors` of what ``metaadamw_fast.reference.modulation`` makes of the scales [4, G], in one launch.

    Raises:
        RuntimeError: an argument of another dtype or shape.
    """
    tensors = len(group_of)
    if scales.dtype not in (torch.float32, torch.float64) or scales.dim() != 2 or scales.shape[0] != 4:
        raise RuntimeError("scales must be [4, G], float32 or float64")
    check("group_of", group_of, torch.int64, (tensors,))
    numbers = {"lr": lr, "weight_decay": weight_decay, "beta1": beta1, "beta2": beta2, "eps": eps, "grad_scale": grad_scale}
    for name, x in numbers.items():
        check(name, x, torch.float64, (tensors,))
    check_counts("steps", steps, (tensors,))
    vectors = torch.empty(8, tensors, dtype=torch.float64, device=scales.device)
    if tensors:
        with device_guard(scales):
            modulation_kernel[(triton.cdiv(tensors, ROWS.value),)](
                vectors, tensors, scales, *scales.stride(), group_of, *numbers.values(), steps, go, released, num_warps=WARPS,
                enable_fp_fusion=False,
            )  # fmt: skip
    return vectors


def check(name: str, x: Tensor | None, dtype: torch.dtype, shape: tuple[int, ...], *, at_least: bool = False) -> None:
    """Contiguous, of this dtype and shape; ``at_least``: the last size may be larger."""
    if x is None:
        return
    fits = x.shape == shape or (at_least and x.dim() == len(shape) and x.shape[:-1] == shape[:-1] and x.shape[-1] >= shape[-1])
    if x.dtype != dtype or not fits or not x.is_contiguous():
        kind = str(dtype).removeprefix("torch.")
        raise RuntimeError(f"{name} must be a contiguous {kind} tensor of shape {list(shape)}, not {x.dtype} {list(x.shape)}")


def check_counts(name: str, x: Tensor, shape: tuple[int, ...]) -> None:
    """Counts of steps: float64, or float32 as torch's optimizers keep them."""
    check(name, x, torch.float64 if x.dtype == torch.float64 else torch.float32, shape)


def device_guard(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
