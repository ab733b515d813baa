"""What both kernels share: where the elements of a chunk lie, how they are read and written, and how sums are finished.

Every program takes one chunk of one tensor and walks it in blocks of BLOCK lanes. Names and order of the arithmetic are those of
csrc/adamw.h and csrc/sums.h; the kernels are compiled without contraction of a*b+c (``enable_fp_fusion=False``).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

LEVELS = tl.constexpr(10)
BLOCK = tl.constexpr(2**10)  # lanes: 8 for each of 128 threads, so that float32 moves in two accesses of 16 bytes
# Elements: 16 of them share the lane of an accumulator, and reading the table and folding the hyper-parameters, about 2 us of
# latency, is paid once for 64 KiB of each operand. 11.7 million elements still make 700 programs.
CHUNK = tl.constexpr(16 * 2**10)
WARPS = 4

# The table: int64. First these fields, T entries each; then the row of each chunk; then the layouts.
ADDRESSES = tl.constexpr(0)  # five fields, in the order of the operands; 0: the row has no such operand
GRAD, EXP_AVG, PARAM, EXP_AVG_SQ, MAXIMUM = (tl.constexpr(i) for i in range(5))
NUMEL = tl.constexpr(5)
FIRST_CHUNK = tl.constexpr(6)  # the number of chunks before the row; an empty row has one, too, which writes its sums
CODES = tl.constexpr(7)  # four bits for the dtype of each operand, then IS_DOUBLE and IS_STRIDED
LAYOUT = tl.constexpr(8)  # where in the table the row's layout lies: dims, then for each, innermost first, size and five strides
FIELDS = tl.constexpr(9)
IS_DOUBLE = tl.constexpr(1 << 20)
IS_STRIDED = tl.constexpr(1 << 21)

# Dtypes of an operand. As compile-time constants, they may also be MIXED: not the same in all rows, so look at the row's.
NO_DTYPE, FP32, BF16, FP16, FP64, MIXED = (tl.constexpr(i) for i in (0, 1, 2, 3, 4, 15))
DTYPE_CODES = {torch.float32: 1, torch.bfloat16: 2, torch.float16: 3, torch.float64: 4}
# Rows that are computed in float64.
NO_ROW, EVERY_ROW, SOME_ROWS = (tl.constexpr(i) for i in range(3))


@triton.jit
def _nothing():
    pass


# Decided by TRITON_INTERPRET when Triton was imported.
INTERPRETED = tl.constexpr(isinstance(_nothing, InterpretedFunction))


# ----------------------------------------------------------------------------------------------------------------- reading


@triton.jit
def chunk_bounds(table, tensors, chunk, row):
    """First element of the chunk and number of elements in it; first chunk of the row and number of its chunks."""
    numel = tl.load(table + NUMEL * tensors + row)
    first_chunk = tl.load(table + FIRST_CHUNK * tensors + row)
    begin = (chunk - first_chunk) * CHUNK
    count = tl.minimum(numel - begin, CHUNK).to(tl.int32)
    chunks_of_row = tl.maximum((numel + CHUNK - 1) // CHUNK, 1).to(tl.int32)
    return begin, count, first_chunk.to(tl.int32), chunks_of_row


@triton.jit
def operand_offsets(layout, begin, offsets, strided: tl.constexpr):
    """Where the elements begin + offsets of the row lie in each of the five operands, in elements after its element ``begin``.

    For rows that are walked flat that is ``offsets`` itself; others go through ``layout`` in 64 bits, dimension by dimension.
    """
    if not strided:
        return offsets, offsets, offsets, offsets, offsets
    else:
        index = begin + offsets
        grad = offsets * 0 - begin
        exp_avg = grad
        param = grad
        exp_avg_sq = grad
        maximum = grad
        for _ in range(tl.load(layout)):
            size = tl.load(layout + 1)
            coordinate = index % size
            grad += coordinate * tl.load(layout + 2)
            exp_avg += coordinate * tl.load(layout + 3)
            param += coordinate * tl.load(layout + 4)
            exp_avg_sq += coordinate * tl.load(layout + 5)
            maximum += coordinate * tl.load(layout + 6)
            index = index // size
            layout += 6
        return grad, exp_avg, param, exp_avg_sq, maximum


@triton.jit
def _pointers(address, begin, offsets, storage: tl.constexpr, aligned: tl.constexpr):
    first = address.to(tl.pointer_type(storage)) + begin
    if aligned:  # an address from memory tells the compiler nothing; the hint makes it access 16 bytes at once
        first = tl.multiple_of(first, 16)
    return first + offsets


@triton.jit
def _load_as(address, begin, offsets, mask, storage: tl.constexpr, arithmetic: tl.constexpr, aligned: tl.constexpr):
    pointers = _pointers(address, begin, offsets, storage, aligned)
    if mask is None:
        return tl.load(pointers).to(arithmetic)
    return tl.load(pointers, mask=mask, other=0.0).to(arithmetic)


@triton.constexpr_function
def storage_type(dtypes, operand):
    """The dtype that an operand has in every row, MIXED, or None where no row has it. ``dtypes`` packs five codes."""
    codes = (None, tl.float32, tl.bfloat16, tl.float16, tl.float64)
    code = (dtypes >> (4 * operand)) & 15
    return code if code >= len(codes) else codes[code]


@triton.jit
def load(
    address, begin, offsets, mask, operand: tl.constexpr, codes, dtypes: tl.constexpr, arithmetic: tl.constexpr, aligned: tl.constexpr
):
    """Elements begin + offsets of an operand in the type of the arithmetic; 0 where the mask is off or no row has the operand."""
    storage: tl.constexpr = storage_type(dtypes, operand)
    if storage is None:
        x = tl.zeros([BLOCK], arithmetic)
    elif storage == MIXED:
        code = (codes >> (4 * operand)) & 15
        if code == BF16:
            x = _load_as(address, begin, offsets, mask, tl.bfloat16, arithmetic, aligned)
        elif code == FP16:
            x = _load_as(address, begin, offsets, mask, tl.float16, arithmetic, aligned)
        elif code == FP32:
            x = _load_as(address, begin, offsets, mask, tl.float32, arithmetic, aligned)
        else:
            if arithmetic == tl.float64:
                x = _load_as(address, begin, offsets, mask, tl.float64, arithmetic, aligned)
            else:  # this row has no such operand
                x = tl.zeros([BLOCK], arithmetic)
    else:
        x = _load_as(address, begin, offsets, mask, storage, arithmetic, aligned)
    return x


# ----------------------------------------------------------------------------------------------------------------- writing


@triton.jit
def _round_to_bfloat16(x):
    """float32 to the nearest bfloat16, ties to even, kept in float32. Only the interpreter needs it: its own cast truncates."""
    bits = x.to(tl.uint32, bitcast=True)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return tl.where(x == x, bits.to(tl.float32, bitcast=True), float("nan"))


@triton.jit
def _store_as(address, begin, offsets, mask, x, storage: tl.constexpr, aligned: tl.constexpr):
    arithmetic: tl.constexpr = x.dtype
    if storage == tl.bfloat16 or storage == tl.float16:  # float64 goes through float32, as in torch
        x = x.to(tl.float32)
        if storage == tl.bfloat16 and INTERPRETED:
            x = _round_to_bfloat16(x)
    stored = x.to(storage)
    tl.store(_pointers(address, begin, offsets, storage, aligned), stored, mask=mask)
    return stored.to(arithmetic)


@triton.jit
def store(address, begin, offsets, mask, x, operand: tl.constexpr, codes, dtypes: tl.constexpr, aligned: tl.constexpr):
    """Writes elements begin + offsets of an operand; returns them as a later load will see them."""
    storage: tl.constexpr = storage_type(dtypes, operand)
    if storage is None:
        y = x
    elif storage == MIXED:
        code = (codes >> (4 * operand)) & 15
        if code == BF16:
            y = _store_as(address, begin, offsets, mask, x, tl.bfloat16, aligned)
        elif code == FP16:
            y = _store_as(address, begin, offsets, mask, x, tl.float16, aligned)
        elif code == FP32:
            y = _store_as(address, begin, offsets, mask, x, tl.float32, aligned)
        else:
            if x.dtype == tl.float64:
                y = _store_as(address, begin, offsets, mask, x, tl.float64, aligned)
            else:  # this row has no such operand
                y = x
    else:
        y = _store_as(address, begin, offsets, mask, x, storage, aligned)
    return y


# -------------------------------------------------------------------------------------------------------------------- sums


@triton.jit
def pairwise_sum(lanes):
    """The sum of BLOCK lanes in float64.

    Each level adds neighbours, two at a time. A plain ``tl.sum`` adds in an order that depends on how the compiler laid the lanes
    over threads, which may differ between two kernels; with two terms there is only one order.
    """
    x = lanes.to(tl.float64)
    for level in tl.static_range(LEVELS):
        x = tl.sum(tl.reshape(x, [BLOCK >> (level + 1), 2]), axis=1)
    return tl.sum(x, axis=0)


@triton.jit
def store_sum(lanes, column, width, row, chunk, chunks, chunks_of_row, partials, out):
    """The sum of one chunk: into the result [T, width] if it is the whole row, else into partials [width, chunks]."""
    total = pairwise_sum(lanes)
    if chunks_of_row == 1:
        tl.store(out + row * width + column, total)
    else:
        tl.store(partials + column * chunks + chunk, total)


@triton.jit
def finish_sums(width, row, chunks, first_chunk, chunks_of_row, partials, tickets, out):
    """The program that finishes last among those of a row adds their partial sums, in chunk order whichever it is."""
    if chunks_of_row > 1:
        tl.debug_barrier()  # all threads have stored before one takes the ticket: its release covers the whole program
        if tl.atomic_add(tickets + row, 1, sem="acq_rel", scope="gpu") == chunks_of_row - 1:
            tl.debug_barrier()
            lane = tl.arange(0, BLOCK)
            for column in range(width):
                lanes = tl.zeros([BLOCK], tl.float64)
                for i in range(0, chunks_of_row, BLOCK):
                    # .cg: from the second-level cache, which all programs share
                    pointers = partials + column * chunks + first_chunk + i + lane
                    lanes += tl.load(pointers, mask=i + lane < chunks_of_row, other=0.0, cache_modifier=".cg")
                tl.store(out + row * width + column, pairwise_sum(lanes))
            tl.store(tickets + row, 0)  # for the next launch
