"""The modulated AdamW update of all tensors in one launch: the arithmetic of csrc/adamw.h, operation by operation."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .elements import (
    BLOCK,
    EXP_AVG,
    EXP_AVG_SQ,
    FIELDS,
    GRAD,
    KIND,
    LAYOUT,
    LOW_PRECISION,
    MAXIMUM,
    NUMEL,
    PARAM,
    WARPS,
    arithmetic_type,
    chunk_bounds,
    element,
    finish_sums,
    is_strided,
    length,
    load,
    operand_offsets,
    round_stochastically,
    rounding_key,
    start_of_update,
    storage_type,
    store,
    store_sum,
)
from .table import LaunchTable


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
def square_root(x):
    """Correctly rounded."""
    if x.dtype == tl.float64:  # always correctly rounded; sqrt_rn and div_rn exist for float32 only
        return tl.sqrt(x)
    else:
        return tl.sqrt_rn(x)


@triton.jit
def _quotient(x, y):
    if x.dtype == tl.float64:
        return x / y
    else:
        return tl.div_rn(x, y)


@triton.jit
def _update_block(
    gg, gm, mm, pp, vv, grad, exp_avg, param, exp_avg_sq, maximum, low_precision, begin, offsets, mask, layout,
    grad_scale, momentum_weight, lerp_from_grad, beta2, beta2_complement, step_size, decay_factor,
    inverse_sqrt_bias_correction2, eps, key, sums: tl.constexpr, found: tl.constexpr,
    kind: tl.constexpr, strided: tl.constexpr, aligned: tl.constexpr,
):  # fmt: skip
    """Updates one block, and adds what it finds in g and m and what it stores in p and v to the lanes of the sums."""
    g_offsets, m_offsets, p_offsets, v_offsets, max_offsets, low_offsets = operand_offsets(layout, begin, offsets, strided)
    unscaled = load(grad, begin, g_offsets, mask, GRAD, kind, aligned)
    m = load(exp_avg, begin, m_offsets, mask, EXP_AVG, kind, aligned)
    v = load(exp_avg_sq, begin, v_offsets, mask, EXP_AVG_SQ, kind, aligned)
    p = load(param, begin, p_offsets, mask, PARAM, kind, aligned)
    has_master: tl.constexpr = storage_type(kind, LOW_PRECISION) is not None
    if has_master:
        p = start_of_update(p, load(low_precision, begin, low_offsets, mask, LOW_PRECISION, kind, aligned), kind)

    if found:
        gg += unscaled * unscaled
        gm += unscaled * m
        mm += m * m
    g = unscaled * grad_scale
    start = tl.where(lerp_from_grad, g, m)
    end = tl.where(lerp_from_grad, m, g)
    m = start + momentum_weight * (end - start)
    v = beta2 * v + beta2_complement * g * g
    largest = v
    amsgrad: tl.constexpr = storage_type(kind, MAXIMUM) is not None
    if amsgrad:
        old = load(maximum, begin, max_offsets, mask, MAXIMUM, kind, aligned)
        largest = tl.where((old >= v) | (old != old), old, v)  # NaN if either is, as torch.maximum
    denominator = square_root(largest) * inverse_sqrt_bias_correction2 + eps
    p = decay_factor * p - _quotient(step_size * m, denominator)

    if key is not None:
        m = round_stochastically(m, key, begin, offsets, EXP_AVG, kind)
        v = round_stochastically(v, key, begin, offsets, EXP_AVG_SQ, kind)
        p = round_stochastically(p, key, begin, offsets, PARAM, kind)
    if amsgrad:
        store(maximum, begin, max_offsets, mask, largest, MAXIMUM, kind, aligned)
    store(exp_avg, begin, m_offsets, mask, m, EXP_AVG, kind, aligned)
    v = store(exp_avg_sq, begin, v_offsets, mask, v, EXP_AVG_SQ, kind, aligned)
    p = store(param, begin, p_offsets, mask, p, PARAM, kind, aligned)
    if has_master:
        store(low_precision, begin, low_offsets, mask, p, LOW_PRECISION, kind, aligned)
    if sums:
        if mask is not None:
            v = tl.where(mask, v, 0.0)
            p = tl.where(mask, p, 0.0)
        pp += p * p
        vv += v * v
    return gg, gm, mm, pp, vv


@triton.jit
def _update_chunk(
    table, tensors, chunk, chunks, row, partials, tickets, new_sums, vectors, rounding_seed, found: tl.constexpr,
    kind: tl.constexpr,
):  # fmt: skip
    arithmetic: tl.constexpr = arithmetic_type(kind)
    begin, count, first_chunk, chunks_of_row = chunk_bounds(table, tensors, chunk, row)
    grad = tl.load(table + GRAD * tensors + row)
    exp_avg = tl.load(table + EXP_AVG * tensors + row)
    param = tl.load(table + PARAM * tensors + row)
    exp_avg_sq = tl.load(table + EXP_AVG_SQ * tensors + row)
    maximum = tl.load(table + MAXIMUM * tensors + row)
    low_precision = tl.load(table + LOW_PRECISION * tensors + row)
    lane = tl.arange(0, BLOCK)
    gg = tl.zeros([BLOCK], arithmetic)
    gm = gg
    mm = gg
    pp = gg
    vv = gg

    # Rounded once, as `scalars_of` in csrc/adamw.h.
    column = vectors + row
    rows = tensors.to(tl.int64)
    step_size = tl.load(column).to(arithmetic)
    decay_factor = tl.load(column + rows).to(arithmetic)
    beta1 = tl.load(column + 3 * rows)
    beta2 = tl.load(column + 4 * rows)
    lerp_from_grad = beta1 < 0.5
    momentum_weight = tl.where(lerp_from_grad, beta1, 1.0 - beta1).to(arithmetic)
    beta2_complement = (1.0 - beta2).to(arithmetic)
    beta2 = beta2.to(arithmetic)
    inverse_sqrt_bias_correction2 = tl.load(column + 5 * rows).to(arithmetic)
    eps = tl.load(column + 6 * rows).to(arithmetic)
    scale = tl.load(column + 7 * rows).to(arithmetic)
    if rounding_seed is None:
        key = None
    else:
        key = rounding_key(rounding_seed, tl.load(column + 2 * rows), row)

    sums: tl.constexpr = new_sums is not None
    layout = table + tl.load(table + LAYOUT * tensors + row)
    strided: tl.constexpr = is_strided(kind)
    done = 0
    if ((grad | exp_avg | param | exp_avg_sq | maximum | low_precision) % 16 == 0) & (not strided):
        done = count // BLOCK * BLOCK
        for i in range(0, done, BLOCK):
            gg, gm, mm, pp, vv = _update_block(
                gg, gm, mm, pp, vv, grad, exp_avg, param, exp_avg_sq, maximum, low_precision, begin, i + lane, None, layout,
                scale, momentum_weight, lerp_from_grad, beta2, beta2_complement, step_size, decay_factor,
                inverse_sqrt_bias_correction2, eps, key, sums, found, kind, False, True,
            )  # fmt: skip
    for i in range(done, count, BLOCK):
        mask = i + lane < count
        gg, gm, mm, pp, vv = _update_block(
            gg, gm, mm, pp, vv, grad, exp_avg, param, exp_avg_sq, maximum, low_precision, begin, i + lane, mask, layout,
            scale, momentum_weight, lerp_from_grad, beta2, beta2_complement, step_size, decay_factor,
            inverse_sqrt_bias_correction2, eps, key, sums, found, kind, strided, False,
        )  # fmt: skip

    if sums:
        width: tl.constexpr = 2 + 3 * found
        if found:
            store_sum(gg, 0, width, row, chunk, chunks, chunks_of_row, partials, new_sums)
            store_sum(gm, 1, width, row, chunk, chunks, chunks_of_row, partials, new_sums)
            store_sum(mm, 2, width, row, chunk, chunks, chunks_of_row, partials, new_sums)
        store_sum(pp, width - 2, width, row, chunk, chunks, chunks_of_row, partials, new_sums)
        store_sum(vv, width - 1, width, row, chunk, chunks, chunks_of_row, partials, new_sums)
        finish_sums(width, row, chunks, first_chunk, chunks_of_row, partials, tickets, new_sums)


@triton.jit(
    do_not_specialize=["tensors", "chunks", "rounding_seed"],
    do_not_specialize_on_alignment=["new_sums", "vectors"],
)
def adamw_update_kernel(
    table, tensors, chunks, partials, tickets, new_sums, vectors, rounding_seed, found: tl.constexpr, kinds: tl.constexpr,
):  # fmt: skip
    """One program per chunk; see `LaunchTable` for the table and the kinds."""
    # Backward through what the statistics went through forward: the first programs find the end of it in the cache.
    chunk = tl.num_programs(0) - 1 - tl.program_id(0)
    row = tl.load(table + FIELDS * tensors + chunk)
    kind_of_row = tl.load(table + KIND * tensors + row)
    has_gradient = (tl.load(table + GRAD * tensors + row) != 0) | (tl.load(table + NUMEL * tensors + row) == 0)
    wanted = has_gradient & (tl.load(vectors + 2 * tensors.to(tl.int64) + row) != 0)
    for i in tl.static_range(length(kinds)):
        if wanted & (kind_of_row == i):
            _update_chunk(
                table, tensors, chunk, chunks, row, partials, tickets, new_sums,
                vectors, rounding_seed, found, element(kinds, i),
            )  # fmt: skip


def register_limit(kinds: tuple[int, ...], found: bool, stochastic: bool) -> dict[str, int]:
    """Triton's option that makes one more program fit a multiprocessor: 5 of 96 registers a thread, or 4 of 128.

    Only where nothing spills then, which the tests read from ptxas for sm_80, sm_90 and sm_100: rows of one kind, in float32
    arithmetic, walked flat, without a maximum and a master. AMD's compiler knows no such option.
    """
    (kind, *others) = kinds
    has_more = kind >> (4 * MAXIMUM.value) != 0  # a maximum, a master, a layout
    is_double = any(kind >> (4 * operand) & 15 == 4 for operand in range(4))
    if others or has_more or is_double or (found and stochastic) or torch.version.hip is not None:
        return {}
    return {"maxnreg": 128 if found or stochastic else 96}


def adamw_update_(
    launch: LaunchTable,
    vectors: Tensor,
    new_sums: Tensor | None = None,
    rounding_seed: int | None = None,
) -> None:
    """AdamW with per-tensor hyper-parameters, in place; rows without a gradient, or whose step is 0, stay as they are.

    Args:
        launch: the T tensors, built with ``written=True``.
        vectors: contiguous float64 [8, T] on the tensors' device, made by `kernels.policy`.
        new_sums: contiguous float64 [T, 2] or None; receives Σp², Σv² as stored, in the bits of a later pass of `tensor_stats`;
            with [T, 5], before them Σg², Σg·m, Σm² as found, in the bits of an earlier pass. Rows that stay as they are keep
            what it holds.
        rounding_seed: of stochastic rounding; None rounds to the nearest.

    Raises:
        RuntimeError: vectors or new_sums of another dtype, shape, layout or device; a launch that is not to be written.
    """
    if not launch.written:
        raise RuntimeError("the launch was not made for updates: written=False")
    launch.check_vector("vectors", vectors, (8, launch.tensors))
    found = new_sums is not None and new_sums.dim() == 2 and new_sums.shape[1] == 5
    launch.check_vector("new_sums", new_sums, (launch.tensors, 5 if found else 2))
    if launch.tensors:
        with launch.device_guard():
            adamw_update_kernel[(launch.chunks,)](
                launch.table, launch.tensors, launch.chunks, launch.partials, launch.tickets, new_sums, vectors,
                rounding_seed, found, launch.kinds, num_warps=WARPS, enable_fp_fusion=False,
                **register_limit(launch.kinds, found, rounding_seed is not None),
            )  # fmt: skip
