"""Sums that describe each tensor, one launch for all: MetaAdamW section 3.2. The columns are those of csrc/sums.h."""

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
    store_sum,
)
from .table import LaunchTable


@triton.jit
def _accumulate(
    gg, gm, mm, pp, vv, g_count, m_count, grad, exp_avg, param, exp_avg_sq,
    begin, offsets, g_mask, mask, layout,
    parameters: tl.constexpr, squares: tl.constexpr, counts: tl.constexpr,
    kind: tl.constexpr, strided: tl.constexpr, aligned: tl.constexpr,
):  # fmt: skip
    """Adds one block to the lanes of every sum."""
    g_offsets, m_offsets, p_offsets, v_offsets, _, _ = operand_offsets(layout, begin, offsets, strided)
    g = load(grad, begin, g_offsets, g_mask, GRAD, kind, aligned)
    m = load(exp_avg, begin, m_offsets, mask, EXP_AVG, kind, aligned)
    gg += g * g
    gm += g * m
    mm += m * m
    if parameters:
        p = load(param, begin, p_offsets, mask, PARAM, kind, aligned)
        pp += p * p
    if squares:
        v = load(exp_avg_sq, begin, v_offsets, mask, EXP_AVG_SQ, kind, aligned)
        vv += v * v
    if counts:
        g_count += (g != 0).to(gg.dtype)
        m_count += (m != 0).to(gg.dtype)
    return gg, gm, mm, pp, vv, g_count, m_count


@triton.jit
def _sum_chunk(
    table, tensors, chunk, chunks, row, partials, tickets, out,
    parameters: tl.constexpr, squares: tl.constexpr, counts: tl.constexpr, kind: tl.constexpr,
):  # fmt: skip
    begin, count, first_chunk, chunks_of_row = chunk_bounds(table, tensors, chunk, row)
    grad = tl.load(table + GRAD * tensors + row)
    exp_avg = tl.load(table + EXP_AVG * tensors + row)
    param = tl.load(table + PARAM * tensors + row)
    exp_avg_sq = tl.load(table + EXP_AVG_SQ * tensors + row)
    lane = tl.arange(0, BLOCK)
    gg = tl.zeros([BLOCK], arithmetic_type(kind))
    gm = gg
    mm = gg
    pp = gg
    vv = gg
    g_count = gg
    m_count = gg

    addresses = grad | exp_avg
    if parameters:
        addresses |= param
    if squares:
        addresses |= exp_avg_sq
    layout = table + tl.load(table + LAYOUT * tensors + row)
    strided: tl.constexpr = is_strided(kind)
    done = 0
    if (addresses % 16 == 0) & (grad != 0) & (not strided):
        done = count // BLOCK * BLOCK
        for i in range(0, done, BLOCK):
            gg, gm, mm, pp, vv, g_count, m_count = _accumulate(
                gg, gm, mm, pp, vv, g_count, m_count, grad, exp_avg, param, exp_avg_sq,
                begin, i + lane, None, None, layout, parameters, squares, counts, kind, False, True,
            )  # fmt: skip
    for i in range(done, count, BLOCK):
        mask = i + lane < count
        gg, gm, mm, pp, vv, g_count, m_count = _accumulate(
            gg, gm, mm, pp, vv, g_count, m_count, grad, exp_avg, param, exp_avg_sq,
            begin, i + lane, mask & (grad != 0), mask, layout, parameters, squares, counts, kind, strided, False,
        )  # fmt: skip

    width: tl.constexpr = 3 + parameters + squares + 2 * counts
    store_sum(gg, 0, width, row, chunk, chunks, chunks_of_row, partials, out)
    store_sum(gm, 1, width, row, chunk, chunks, chunks_of_row, partials, out)
    store_sum(mm, 2, width, row, chunk, chunks, chunks_of_row, partials, out)
    if parameters:
        store_sum(pp, 3, width, row, chunk, chunks, chunks_of_row, partials, out)
    if squares:
        store_sum(vv, 3 + parameters, width, row, chunk, chunks, chunks_of_row, partials, out)
    if counts:
        store_sum(g_count, width - 2, width, row, chunk, chunks, chunks_of_row, partials, out)
        store_sum(m_count, width - 1, width, row, chunk, chunks, chunks_of_row, partials, out)
    finish_sums(width, row, chunks, first_chunk, chunks_of_row, partials, tickets, out)


@triton.jit(do_not_specialize=["tensors", "chunks"], do_not_specialize_on_alignment=["out"])
def tensor_stats_kernel(
    table, tensors, chunks, partials, tickets, out,
    parameters: tl.constexpr, squares: tl.constexpr, counts: tl.constexpr, kinds: tl.constexpr,
):  # fmt: skip
    """One program per chunk; see `LaunchTable` for the table and the kinds."""
    chunk = tl.program_id(0)
    row = tl.load(table + FIELDS * tensors + chunk)
    kind_of_row = tl.load(table + KIND * tensors + row)
    for i in tl.static_range(length(kinds)):
        if kind_of_row == i:
            _sum_chunk(table, tensors, chunk, chunks, row, partials, tickets, out, parameters, squares, counts, element(kinds, i))


def tensor_stats(
    launch: LaunchTable,
    params: bool,
    exp_avg_sqs: bool,
    count_nonzero: bool,
    dtype: torch.dtype,
    carried: Tensor | None = None,
) -> Tensor:
    """Sums per tensor, [T, S]: Σg², Σg·m, Σm², then Σp², Σv² and the non-zeros of g and m where asked for.

    Args:
        launch: the T tensors.
        params, exp_avg_sqs: compute their column, and read them.
        count_nonzero: append the two counts.
        dtype: of the result, float32 or float64.
        carried: float64 [T, 2], the columns Σp² and Σv² where neither is to be read.

    A lane adds at most CHUNK / BLOCK products in the type of the arithmetic; everything after that is float64, in a fixed order.

    Raises:
        RuntimeError: another dtype, or a column of a list that the launch does not have.
    """
    if dtype not in (torch.float32, torch.float64):
        raise RuntimeError(f"the statistics are float32 or float64, not {dtype}")
    if (params and not launch.with_params) or (exp_avg_sqs and not launch.with_squares):
        raise RuntimeError("the launch was made without the lists of these columns")
    out = torch.empty(launch.tensors, 3 + params + exp_avg_sqs + 2 * count_nonzero, dtype=dtype, device=launch.device)
    if launch.tensors:
        with launch.device_guard():
            tensor_stats_kernel[(launch.chunks,)](
                launch.table, launch.tensors, launch.chunks, launch.partials, launch.tickets, out,
                params, exp_avg_sqs, count_nonzero, launch.kinds, num_warps=WARPS, enable_fp_fusion=False,
            )  # fmt: skip
    return out if carried is None else torch.cat([out[:, :3], carried.to(dtype), out[:, 3:]], dim=1)
