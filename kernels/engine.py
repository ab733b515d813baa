"""The two kernels on elements, for every optimizer: one measures, one updates, and each takes all tensors in one launch.

A `Rule` says what is an optimizer's own: its operands, its formula, its sums. The kernels get its functions as compile-time
arguments of their own, since Triton finds changed source text only there and not inside a tuple.

Longer than 300 lines: both kernels walk a chunk in the same way, and are best read side by side.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .elements import (
    BLOCK,
    FIELDS,
    GRAD,
    KIND,
    LAYOUT,
    NUMEL,
    PARAM,
    STEP,
    WARPS,
    addresses_of,
    any_contains,
    arithmetic_type,
    chunk_bounds,
    contains,
    element,
    field,
    is_strided,
    length,
    load,
    operand_offsets,
    round_stochastically,
    rounding_key,
    start_of_update,
    storage_type,
    store,
    write_sums,
)


class Rule(NamedTuple):
    """What the kernels must know of an optimizer.

    An operand's number is its place in ``operands``, a sum's number its place in ``sum_operands``.
    """

    operands: tuple[str, ...]  # names of the lists
    written: tuple[int, ...]  # the operands that the update writes, in rows that have them
    rounded: tuple[int, ...]  # the operands that stochastic rounding is for; their numbers enter the random bits
    vectors: int  # the update reads float64 [vectors, T]
    fold: Any  # (vectors + row, T, type of the arithmetic) -> what the formula takes of the vectors
    formula: Any  # (operands, what `fold` returned, kind) -> operands as the update leaves them; absent ones come as zeros
    sum_operands: tuple[tuple[int, ...], ...]  # what each sum reads; of these a launch may lack those of `zeros`
    term: Any  # (operands, what `fold_measured` returned, number of a sum) -> an element's term of the sum
    found: tuple[int, ...]  # how many sums, the first ones, an update can make of what it finds; several numbers are a choice
    left: tuple[int, ...]  # the sums that an update can make of what it leaves
    zeros: tuple[int, ...] = ()  # the operands that count as zeros in a launch without their list
    plain: int = 0  # so many sums, the first ones, need nothing of the update before
    measured: int = 0  # so many rows, the last ones of the vectors, say of the update before what the sums need
    fold_measured: Any = None  # (these rows + row, T, type of the arithmetic) -> what `term` takes of them
    of_gradient: bool = False  # every sum is one of products with the gradient: 0 where there is none, whatever the others hold
    # Two operands that change places where the update's number is odd, and the row of vectors with that number. It is read on the
    # device, so a CUDA graph changes them at every replay.
    exchanged: tuple[int, ...] = ()


# ----------------------------------------------------------------------------------------------------------- what both kernels do


@triton.jit
def _addresses(table, tensors, row, operands: tl.constexpr, number, exchanged: tl.constexpr, kind: tl.constexpr):
    """Of the row's operands and its low-precision parameter, as the update with this number sees them."""
    addresses = addresses_of(table, tensors, row, operands + 1)
    if number is not None:
        first: tl.constexpr = element(exchanged, 0)
        second: tl.constexpr = element(exchanged, 1)
        if storage_type(kind, first) is not None and storage_type(kind, second) is not None:
            is_odd = (number.to(tl.int64) & 1) != 0
            x = tl.where(is_odd, addresses[second], addresses[first])
            y = tl.where(is_odd, addresses[first], addresses[second])
            changed = addresses[:first]
            changed += (x,)
            changed += addresses[first + 1 : second]
            changed += (y,)
            addresses = changed + addresses[second + 1 :]
    return addresses


@triton.jit
def _masked(of_sum, mask):
    """Without the lanes behind the end, where a rule's term of zeros need not be zero."""
    return of_sum if mask is None else tl.where(mask, of_sum, 0.0)


# ------------------------------------------------------------------------------------------------------------------- measure


@triton.jit
def _zeros(count: tl.constexpr, dtype: tl.constexpr):
    lanes = ()
    for _ in tl.static_range(count):
        lanes += (tl.zeros([BLOCK], dtype),)
    return lanes


@triton.jit
def _measure_block(
    lanes, addresses, begin, offsets, grad_mask, mask, layout, scalars, term: tl.constexpr, columns: tl.constexpr,
    loads: tl.constexpr, kind: tl.constexpr, strided: tl.constexpr, aligned: tl.constexpr,
):  # fmt: skip
    """Adds one block to the lanes of every sum."""
    operands: tl.constexpr = length(addresses) - 1
    places = operand_offsets(layout, begin, offsets, operands + 1, strided)
    x = _zeros(operands, arithmetic_type(kind))
    more = ()
    for i in tl.static_range(length(columns)):
        for k in tl.static_range(operands):
            if contains(element(loads, i), k):
                of_operand = grad_mask if k == GRAD else mask
                up_to_it = x[:k]
                up_to_it += (load(addresses[k], begin, places[k], of_operand, k, kind, aligned),)
                x = up_to_it + x[k + 1 :]
        more += (lanes[i] + _masked(term(x, scalars, element(columns, i)), mask),)
    return more


@triton.jit
def _measure_chunk(
    table, tensors, chunk, chunks, row, partials, tickets, out, number, measured, fold_measured: tl.constexpr, term: tl.constexpr,
    columns: tl.constexpr, loads: tl.constexpr, of_gradient: tl.constexpr, exchanged: tl.constexpr, operands: tl.constexpr,
    kind: tl.constexpr,
):  # fmt: skip
    """``number`` is that of the update to come, ``measured`` points to the vectors of the one before; None where none is needed."""
    begin, count, first_chunk, chunks_of_row = chunk_bounds(table, tensors, chunk, row, operands + 1)
    addresses = _addresses(table, tensors, row, operands, number, exchanged, kind)
    rows = tensors.to(tl.int64)
    needs_none: tl.constexpr = measured is None or fold_measured is None
    scalars = () if needs_none else fold_measured(measured + row, rows, arithmetic_type(kind))
    lanes = _zeros(length(columns), arithmetic_type(kind))
    lane = tl.arange(0, BLOCK)
    grad = addresses[GRAD]
    together = grad
    for k in tl.static_range(operands):
        if any_contains(loads, k):
            together |= addresses[k]
    layout = table + field(table, tensors, row, operands + 1, LAYOUT)
    strided: tl.constexpr = is_strided(kind)
    if of_gradient:
        count = tl.where(grad != 0, count, 0)
    done = 0
    if (together % 16 == 0) & (grad != 0) & (not strided):
        done = count // BLOCK * BLOCK
        for i in range(0, done, BLOCK):
            lanes = _measure_block(
                lanes, addresses, begin, i + lane, None, None, layout, scalars, term, columns, loads, kind, False, True
            )
    for i in range(done, count, BLOCK):
        mask = i + lane < count
        lanes = _measure_block(
            lanes, addresses, begin, i + lane, mask & (grad != 0), mask, layout, scalars, term, columns, loads, kind, strided, False
        )
    write_sums(lanes, row, chunk, chunks, first_chunk, chunks_of_row, partials, tickets, out)


@triton.jit(do_not_specialize=["tensors", "chunks"], do_not_specialize_on_alignment=["out", "vectors"])
def measure_kernel(
    table, tensors, chunks, partials, tickets, out, vectors, fold_measured: tl.constexpr, term: tl.constexpr,
    columns: tl.constexpr, loads: tl.constexpr, of_gradient: tl.constexpr, exchanged: tl.constexpr, operands: tl.constexpr,
    kinds: tl.constexpr,
):  # fmt: skip
    """One program per chunk; see `LaunchTable` for the table and the kinds. ``vectors`` is None where no sum needs them."""
    chunk = tl.program_id(0)
    row = tl.load(table + (operands + 1 + FIELDS) * tensors + chunk)
    kind_of_row = field(table, tensors, row, operands + 1, KIND)
    number = None
    if vectors is not None and length(exchanged) > 0:
        number = tl.load(vectors + element(exchanged, 2) * tensors.to(tl.int64) + row) + 1.0  # after the one that they are of
    for i in tl.static_range(length(kinds)):
        if kind_of_row == i:
            _measure_chunk(
                table, tensors, chunk, chunks, row, partials, tickets, out, number, vectors, fold_measured, term, columns, loads,
                of_gradient, exchanged, operands, element(kinds, i),
            )  # fmt: skip


def measure_constants(rule: Rule, columns: tuple[int, ...], kinds: tuple[int, ...]) -> dict[str, Any]:
    """The compile-time arguments of the measure kernel for these sums of the rule."""
    loads, loaded = [], set()
    for column in columns:
        loads.append(tuple(k for k in rule.sum_operands[column] if k not in loaded))
        loaded.update(loads[-1])
    return {
        "fold_measured": rule.fold_measured,
        "term": rule.term,
        "columns": columns,
        "loads": tuple(loads),
        "of_gradient": rule.of_gradient,
        "exchanged": rule.exchanged,
        "operands": len(rule.operands),
        "kinds": kinds,
    }


# -------------------------------------------------------------------------------------------------------------------- update


@triton.jit
def _with_param(others, param):
    """All operands, from those but the parameter."""
    x = others[:PARAM]
    x += (param,)
    return x + others[PARAM:]


@triton.jit
def _write(
    x, addresses, begin, offsets, places, mask, key, rounded: tl.constexpr, operand: tl.constexpr, kind: tl.constexpr,
    aligned: tl.constexpr,
):  # fmt: skip
    """Rounds and stores an operand; returns it as a later load will see it."""
    if key is not None and contains(rounded, operand):
        x = round_stochastically(x, key, begin, offsets, operand, kind)
    return store(addresses[operand], begin, places[operand], mask, x, operand, kind, aligned)


@triton.jit
def _update_block(
    lanes, addresses, begin, offsets, mask, grad_mask, written_mask, layout, scalars, measured_scalars, key,
    formula: tl.constexpr, term: tl.constexpr, found: tl.constexpr, left: tl.constexpr, written: tl.constexpr,
    rounded: tl.constexpr, kind: tl.constexpr, strided: tl.constexpr, aligned: tl.constexpr,
):  # fmt: skip
    """Updates one block, and adds what it finds and what it leaves to the lanes of the sums.

    The formula needs the parameter last, so it is read and written last: that saves registers.
    """
    operands: tl.constexpr = length(addresses) - 1
    low: tl.constexpr = operands
    has_master: tl.constexpr = storage_type(kind, low) is not None
    places = operand_offsets(layout, begin, offsets, operands + 1, strided)
    others = ()
    for k in tl.static_range(operands):
        if k != PARAM:
            of_operand = grad_mask if k == GRAD else mask
            others += (load(addresses[k], begin, places[k], of_operand, k, kind, aligned),)
    p = load(addresses[PARAM], begin, places[PARAM], mask, PARAM, kind, aligned)
    before = _with_param(others, p)  # of a master itself, as `measure` reads it
    more = ()
    for i in tl.static_range(length(found)):
        more += (lanes[i] + _masked(term(before, measured_scalars, element(found, i)), mask),)

    if has_master:
        p = start_of_update(p, load(addresses[low], begin, places[low], mask, low, kind, aligned), storage_type(kind, low))
    new = formula(_with_param(others, p), scalars, kind)
    stored = ()
    for k in tl.static_range(operands):
        if k != PARAM:
            if contains(written, k) and storage_type(kind, k) is not None:
                stored += (_write(new[k], addresses, begin, offsets, places, written_mask, key, rounded, k, kind, aligned),)
            else:
                stored += (new[k],)
    p = _write(new[PARAM], addresses, begin, offsets, places, written_mask, key, rounded, PARAM, kind, aligned)
    if has_master:
        store(addresses[low], begin, places[low], written_mask, p, low, kind, aligned)
    after = _with_param(stored, p)
    for i in tl.static_range(length(left)):
        more += (lanes[length(found) + i] + _masked(term(after, (), element(left, i)), mask),)
    return more


@triton.jit
def _update_chunk(
    table, tensors, chunk, chunks, row, wanted, partials, tickets, new_sums, vectors, number, measured, rounding_seed,
    fold: tl.constexpr, formula: tl.constexpr, fold_measured: tl.constexpr, term: tl.constexpr, found: tl.constexpr,
    left: tl.constexpr, written: tl.constexpr, rounded: tl.constexpr, of_gradient: tl.constexpr, exchanged: tl.constexpr,
    operands: tl.constexpr, kind: tl.constexpr,
):  # fmt: skip
    """``wanted``: whether the row is updated and not only measured; None where all that come here are."""
    begin, count, first_chunk, chunks_of_row = chunk_bounds(table, tensors, chunk, row, operands + 1)
    addresses = _addresses(table, tensors, row, operands, number, exchanged, kind)
    lanes = _zeros(length(found) + length(left), arithmetic_type(kind))
    lane = tl.arange(0, BLOCK)
    column = vectors + row
    rows = tensors.to(tl.int64)
    scalars = fold(column, rows, arithmetic_type(kind))
    measured_scalars = () if measured is None else fold_measured(measured + row, rows, arithmetic_type(kind))
    if rounding_seed is None:
        key = None
    else:
        key = rounding_key(rounding_seed, tl.load(column + STEP * rows), row)

    grad = addresses[GRAD]
    together = grad
    for k in tl.static_range(1, operands + 1):
        together |= addresses[k]
    layout = table + field(table, tensors, row, operands + 1, LAYOUT)
    strided: tl.constexpr = is_strided(kind)
    has_gradient = grad != 0
    if of_gradient and length(found) > 0:
        count = tl.where(has_gradient, count, 0)
    done = 0
    if (together % 16 == 0) & has_gradient & (not strided):
        done = count // BLOCK * BLOCK
        for i in range(0, done, BLOCK):
            lanes = _update_block(
                lanes, addresses, begin, i + lane, None, None, wanted, layout, scalars, measured_scalars, key, formula, term,
                found, left, written, rounded, kind, False, True,
            )  # fmt: skip
    for i in range(done, count, BLOCK):
        mask = i + lane < count
        grad_mask = mask
        written_mask = mask
        if wanted is not None:
            grad_mask = mask & has_gradient
            written_mask = mask & wanted
        lanes = _update_block(
            lanes, addresses, begin, i + lane, mask, grad_mask, written_mask, layout, scalars, measured_scalars, key, formula,
            term, found, left, written, rounded, kind, strided, False,
        )  # fmt: skip
    if length(lanes) > 0:
        write_sums(lanes, row, chunk, chunks, first_chunk, chunks_of_row, partials, tickets, new_sums)


@triton.jit(
    do_not_specialize=["tensors", "chunks", "rounding_seed"],
    do_not_specialize_on_alignment=["new_sums", "vectors"],
)
def update_kernel(
    table, tensors, chunks, partials, tickets, new_sums, vectors, rounding_seed, fold: tl.constexpr, formula: tl.constexpr,
    measured: tl.constexpr, fold_measured: tl.constexpr, term: tl.constexpr, found: tl.constexpr, left: tl.constexpr,
    written: tl.constexpr, rounded: tl.constexpr, of_gradient: tl.constexpr, exchanged: tl.constexpr, operands: tl.constexpr,
    kinds: tl.constexpr,
):  # fmt: skip
    """One program per chunk; see `LaunchTable` for the table and the kinds.

    ``measured`` is the row of the vectors with which those of the update before begin, None where no sum needs them.
    """
    # Backward through what was measured forward: the first programs find the end of it in the cache.
    chunk = tl.num_programs(0) - 1 - tl.program_id(0)
    row = tl.load(table + (operands + 1 + FIELDS) * tensors + chunk)
    kind_of_row = field(table, tensors, row, operands + 1, KIND)
    has_gradient = (tl.load(table + GRAD * tensors + row) != 0) | (field(table, tensors, row, operands + 1, NUMEL) == 0)
    rows = tensors.to(tl.int64)
    wanted = has_gradient & (tl.load(vectors + STEP * rows + row) != 0)
    number = None
    if length(exchanged) > 0:
        number = tl.load(vectors + element(exchanged, 2) * rows + row)
    of_last = None if measured is None else vectors + measured * rows
    for i in tl.static_range(length(kinds)):
        comes = kind_of_row == i
        if length(found) == 0:
            comes &= wanted
        if comes:
            _update_chunk(
                table, tensors, chunk, chunks, row, None if length(found) == 0 else wanted, partials, tickets, new_sums, vectors,
                number, of_last, rounding_seed, fold, formula, fold_measured, term, found, left, written, rounded, of_gradient,
                exchanged, operands, element(kinds, i),
            )  # fmt: skip


def update_constants(rule: Rule, sums: int, kinds: tuple[int, ...]) -> dict[str, Any]:
    """The compile-time arguments of the update kernel that makes so many sums: of what it finds, or of what it leaves, or none."""
    found = tuple(range(sums)) if sums in rule.found else ()
    return {
        "fold": rule.fold,
        "formula": rule.formula,
        "measured": rule.vectors - rule.measured if found and rule.measured else None,
        "fold_measured": rule.fold_measured,
        "term": rule.term,
        "found": found,
        "left": rule.left if sums and not found else (),
        "written": rule.written,
        "rounded": rule.rounded,
        "of_gradient": rule.of_gradient,
        "exchanged": rule.exchanged,
        "operands": len(rule.operands),
        "kinds": kinds,
    }


def register_limit(kinds: tuple[int, ...], found: bool, stochastic: bool) -> dict[str, int]:
    """Triton's option that makes one more program fit a multiprocessor: 5 of 96 registers a thread, or 4 of 128.

    Only where nothing spills then, which the tests read from ptxas for sm_80, sm_90 and sm_100: rows of one kind, in float32
    arithmetic, walked flat, of four operands and without a master. AMD's compiler knows no such option.
    """
    (kind, *others) = kinds
    has_more = kind >> 16 != 0  # a fifth operand, a master, a layout
    is_double = any(kind >> (4 * operand) & 15 == 4 for operand in range(4))
    if others or has_more or is_double or (found and stochastic) or torch.version.hip is not None:
        return {}
    return {"maxnreg": 128 if found or stochastic else 96}


def update_options(rule: Rule, kinds: tuple[int, ...], found: bool, stochastic: bool) -> dict[str, int]:
    """Triton's options for the update kernel.

    Sums with scalars of their own, beside those of the formula, would spill with 8 elements a thread: so it has 4 of them.
    """
    if rule.measured:
        return {"num_warps": 2 * WARPS if found else WARPS}
    return {"num_warps": WARPS, **register_limit(kinds, found, stochastic)}
