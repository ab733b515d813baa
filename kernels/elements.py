"""What both kernels share: where the elements of a chunk lie, how they are read and written, and how sums are finished.

Every program takes one chunk of one tensor and walks it in blocks of BLOCK lanes. The kernels are compiled without contraction of
a*b+c (``enable_fp_fusion=False``): the C++ is, too, and the bits are the same.

Longer than 300 lines: many short functions that every kernel may need, which are read one at a time.
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

# The table: int64. First the addresses, T entries for each operand and T for the low-precision parameter (0: the row has no such
# operand); then these fields, T entries each; then the row of each chunk; then the layouts.
NUMEL = tl.constexpr(0)
FIRST_CHUNK = tl.constexpr(1)  # the number of chunks before the row; an empty row has one, too, which writes its sums
KIND = tl.constexpr(2)  # which of the kinds of rows it is, see `LaunchTable.kinds`
LAYOUT = tl.constexpr(3)  # where in the table the row's layout lies: dims, then for each, innermost first, size and all strides
FIELDS = tl.constexpr(4)

# Numbers of operands in every rule. Where a row has a low-precision parameter, of bfloat16 or float16, PARAM is its float32 master.
# The low-precision parameter has the number after the rule's last operand.
GRAD, PARAM = tl.constexpr(0), tl.constexpr(2)
STEP = tl.constexpr(
    2
)  # in every rule the row of the vectors with the step count; where that is 0 the update leaves the tensor alone

# A kind says what rows have in common that the kernels are compiled for: four bits for the dtype of each operand (0: none of the
# rows has it), then one for rows that are not walked flat. A kernel has one branch for each kind that occurs, around everything.
DTYPE_CODES = {torch.float32: 1, torch.bfloat16: 2, torch.float16: 3, torch.float64: 4}
MAX_OPERANDS = 15  # the low-precision parameter included
STRIDED_KIND = 1 << (4 * MAX_OPERANDS)


@triton.constexpr_function
def storage_type(kind, operand):
    """The dtype of an operand, or None."""
    return (None, tl.float32, tl.bfloat16, tl.float16, tl.float64)[kind >> (4 * operand) & 15]


@triton.constexpr_function
def arithmetic_type(kind):
    """float64 if any operand is, else float32."""
    return tl.float64 if any(kind >> (4 * operand) & 15 == 4 for operand in range(MAX_OPERANDS)) else tl.float32


@triton.constexpr_function
def vector_bytes(kind, operand):
    """What a thread accesses at once: 16 bytes of the widest operand, as many elements of the others.

    With 16 bytes of bfloat16 a thread would hold more of its elements than of float32, and they would change hands in every block.
    """
    sizes = (0, 4, 2, 2, 8)
    return 16 * sizes[kind >> (4 * operand) & 15] // max(sizes[kind >> (4 * each) & 15] for each in range(MAX_OPERANDS))


@triton.constexpr_function
def is_strided(kind):
    """Whether the elements of these rows are found through their layout."""
    return kind >= STRIDED_KIND


@triton.constexpr_function
def contains(items, item):
    """Whether a compile-time tuple has ``item``."""
    return item in items


@triton.constexpr_function
def any_contains(tuples, item):
    """Whether one of a compile-time tuple of tuples has ``item``."""
    return any(item in items for items in tuples)


@triton.constexpr_function
def element(items, index):
    """items[index] of a compile-time tuple."""
    return items[index]


@triton.constexpr_function
def length(items):
    """Of a compile-time tuple."""
    return len(items)


@triton.jit
def _nothing():
    pass


# Decided by TRITON_INTERPRET when Triton was imported.
INTERPRETED = tl.constexpr(isinstance(_nothing, InterpretedFunction))


# ----------------------------------------------------------------------------------------------------------------- reading


@triton.jit
def field(table, tensors, row, addresses: tl.constexpr, name: tl.constexpr):
    """An entry of the table: NUMEL, FIRST_CHUNK, KIND or LAYOUT of the row."""
    return tl.load(table + (addresses + name) * tensors + row)


@triton.jit
def chunk_bounds(table, tensors, chunk, row, addresses: tl.constexpr):
    """First element of the chunk and number of elements in it; first chunk of the row and number of its chunks."""
    numel = field(table, tensors, row, addresses, NUMEL)
    first_chunk = field(table, tensors, row, addresses, FIRST_CHUNK)
    begin = (chunk - first_chunk) * CHUNK
    count = tl.minimum(numel - begin, CHUNK).to(tl.int32)
    chunks_of_row = tl.maximum((numel + CHUNK - 1) // CHUNK, 1).to(tl.int32)
    return begin, count, first_chunk.to(tl.int32), chunks_of_row


@triton.jit
def addresses_of(table, tensors, row, addresses: tl.constexpr):
    """Of each operand of the row; 0 if it has none."""
    found = ()
    for k in tl.static_range(addresses):
        found += (tl.load(table + k * tensors + row),)
    return found


@triton.jit
def operand_offsets(layout, begin, offsets, operands: tl.constexpr, strided: tl.constexpr):
    """Where the elements begin + offsets of the row lie in each operand, in elements after its element ``begin``.

    For rows that are walked flat that is ``offsets`` itself; others go through ``layout`` in 64 bits, dimension by dimension.
    """
    places = ()
    if not strided:
        for _ in tl.static_range(operands):
            places += (offsets,)
    else:
        index = begin + offsets
        for _ in tl.static_range(operands):
            places += (offsets * 0 - begin,)
        for _ in range(tl.load(layout)):
            size = tl.load(layout + 1)
            coordinate = index % size
            further = ()
            for k in tl.static_range(operands):
                further += (places[k] + coordinate * tl.load(layout + 2 + k),)
            places = further
            index = index // size
            layout += 1 + operands
    return places


@triton.jit
def _pointers(address, begin, offsets, operand: tl.constexpr, kind: tl.constexpr, aligned: tl.constexpr):
    first = address.to(tl.pointer_type(storage_type(kind, operand))) + begin
    if aligned:  # an address from memory tells the compiler nothing; with the hint it makes one access of several elements
        first = tl.multiple_of(first, vector_bytes(kind, operand))
    return first + offsets


@triton.jit
def _widened(x, arithmetic: tl.constexpr):
    if x.dtype == tl.bfloat16 and INTERPRETED:  # whose own conversion is wrong for subnormal numbers
        x = (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return x.to(arithmetic)


@triton.jit
def load(address, begin, offsets, mask, operand: tl.constexpr, kind: tl.constexpr, aligned: tl.constexpr):
    """Elements begin + offsets of an operand in the type of the arithmetic; 0 where the mask is off or the kind lacks it."""
    if storage_type(kind, operand) is None:
        x = tl.zeros([BLOCK], arithmetic_type(kind))
    elif mask is None:
        x = tl.load(_pointers(address, begin, offsets, operand, kind, aligned))
    else:
        x = tl.load(_pointers(address, begin, offsets, operand, kind, aligned), mask=mask, other=0.0)
    return _widened(x, arithmetic_type(kind))


# ----------------------------------------------------------------------------------------------------------------- writing


@triton.jit
def _rounded(x, storage: tl.constexpr):
    if storage == tl.bfloat16 or storage == tl.float16:  # float64 goes through float32, as in torch
        x = x.to(tl.float32)
    if storage == tl.bfloat16 and INTERPRETED:  # whose own conversion truncates: to the nearest, ties to even
        bits = x.to(tl.uint32, bitcast=True)
        bits = tl.where(x == x, (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16, 0x7FC0)
        return bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(storage)


@triton.jit
def start_of_update(master, low, storage: tl.constexpr):
    """What the update of a low-precision parameter starts from, element by element; csrc/adamw.h has the reasons."""
    rounded = _widened(_rounded(master, storage), master.dtype)
    return tl.where((rounded == low) | ((rounded != rounded) & (low != low)), master, low)


@triton.jit
def store(address, begin, offsets, mask, x, operand: tl.constexpr, kind: tl.constexpr, aligned: tl.constexpr):
    """Writes elements begin + offsets of an operand; returns them as a later load will see them."""
    stored = _rounded(x, storage_type(kind, operand))
    tl.store(_pointers(address, begin, offsets, operand, kind, aligned), stored, mask=mask)
    return _widened(stored, x.dtype)


# ------------------------------------------------------------------------------------------------------ stochastic rounding


@triton.jit
def _scrambled(x):
    """csrc/rounding.h has the source and the reasons of all of this."""
    x = (x ^ (x >> 16)) * tl.full([], 0x7FEB352D, tl.uint32)
    x = (x ^ (x >> 15)) * tl.full([], 0x846CA68B, tl.uint32)
    return x ^ (x >> 16)


@triton.jit
def rounding_key(seed, step, row):
    """What makes the random bits of a row in this step, but for the operand."""
    low = tl.full([], 0xFFFFFFFF, tl.int64)
    seed = seed.to(tl.int64)  # Triton passes a small one in 32 bits, where a shift by 32 is undefined
    key = _scrambled((seed & low).to(tl.uint32))
    key = _scrambled(key ^ ((seed >> 32) & low).to(tl.uint32))
    whole = step.to(tl.int64)
    key = _scrambled(key ^ (whole & low).to(tl.uint32) ^ ((whole >> 32) & low).to(tl.uint32) * 0x9E3779B9)
    return _scrambled(key ^ (row & low).to(tl.uint32))


@triton.jit
def round_stochastically(x, key, begin, offsets, operand: tl.constexpr, kind: tl.constexpr):
    """Elements begin + offsets of an operand, as numbers that it can hold; as they are if it is wide enough."""
    storage: tl.constexpr = storage_type(kind, operand)
    if storage == tl.bfloat16 or storage == tl.float16:
        low = tl.full([], 0xFFFFFFFF, tl.int64)
        first = begin.to(tl.int64)
        key = _scrambled(key ^ (((first >> 32) * 5 + operand) & low).to(tl.uint32))
        random = _scrambled(((first + offsets) & low).to(tl.uint32) ^ key)
        single = x.to(tl.float32)
        bits = single.to(tl.uint32, bitcast=True)
        finite = (bits & 0x7F800000) != 0x7F800000
        if storage == tl.bfloat16:
            rounded = ((bits + (random >> 16)) >> 16) << 16
            bits = tl.where(finite, rounded, bits)
        else:
            rounded = ((bits + (random >> 19)) >> 13) << 13
            magnitude = tl.abs(single) * 16777216.0
            is_small = magnitude < 1024.0
            whole = tl.where(is_small, magnitude, 0.0).to(tl.int32).to(tl.float32)
            up = (random >> 8).to(tl.int32).to(tl.float32) * 5.9604644775390625e-08 < magnitude - whole
            small = (whole + up.to(tl.float32)) * 5.9604644775390625e-08
            small_bits = small.to(tl.uint32, bitcast=True) | ((bits >> 31) << 31)
            bits = tl.where(is_small, small_bits, tl.where(finite, rounded, bits))
        return bits.to(tl.float32, bitcast=True).to(x.dtype)
    else:
        return x


# -------------------------------------------------------------------------------------------------------------- arithmetic


@triton.jit
def square_root(x):
    """Correctly rounded."""
    if x.dtype == tl.float64:  # always correctly rounded; sqrt_rn and div_rn exist for float32 only
        return tl.sqrt(x)
    else:
        return tl.sqrt_rn(x)


@triton.jit
def quotient(x, y):
    """Correctly rounded."""
    if x.dtype == tl.float64:
        return x / y
    else:
        return tl.div_rn(x, y)


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
def write_sums(lanes, row, chunk, chunks, first_chunk, chunks_of_row, partials, tickets, out):
    """The sums of one chunk: into the result [T, sums] if it is the whole row, else into partials [sums, chunks].

    Of several programs of a row the one that finishes last adds their partial sums, in chunk order whichever it is.
    """
    width: tl.constexpr = length(lanes)
    for k in tl.static_range(width):
        total = pairwise_sum(lanes[k])
        if chunks_of_row == 1:
            tl.store(out + row * width + k, total)
        else:
            tl.store(partials + k * chunks + chunk, total)
    if chunks_of_row > 1:
        tl.debug_barrier()  # all threads have stored before one takes the ticket: its release covers the whole program
        if tl.atomic_add(tickets + row, 1, sem="acq_rel", scope="gpu") == chunks_of_row - 1:
            tl.debug_barrier()
            lane = tl.arange(0, BLOCK)
            for column in range(width):
                all_lanes = tl.zeros([BLOCK], tl.float64)
                for i in range(0, chunks_of_row, BLOCK):
                    # .cg: from the second-level cache, which all programs share
                    pointers = partials + column * chunks + first_chunk + i + lane
                    all_lanes += tl.load(pointers, mask=i + lane < chunks_of_row, other=0.0, cache_modifier=".cg")
                tl.store(out + row * width + column, pairwise_sum(all_lanes))
            tl.store(tickets + row, 0)  # for the next launch
