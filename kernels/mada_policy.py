"""How MADA learns, and what its update takes of each tensor: docs/mada.md section 5, in one launch."""

from __future__ import annotations

import struct

import torch
import triton
import triton.language as tl
from torch import Tensor

from .mada import (
    FIRST,
    GRAD_SCALE,
    N_STARTS,
    ROWS_OF_HALF,
    STARTS_AT_REST,
    STEP,
    STEP_SIZE,
    UNCLIPPED,
    V_STARTS,
)
from .policy import WARPS, check, device_guard, integer_power

ROWS = tl.constexpr(128)  # tensors at a time: one for each thread, which holds half of its vectors
TOGETHER = tl.constexpr(7)  # rows of the vectors; all 21 at once would spill
COEFFICIENTS = tl.constexpr(6)
HALF = tl.constexpr(ROWS_OF_HALF)
AT_START = tl.constexpr(V_STARTS.value | N_STARTS.value)
NOT_ALWAYS = tl.constexpr(FIRST.value | AT_START.value | STARTS_AT_REST.value)


@triton.jit
def _own(vector, tensor, mine):
    """An entry per tensor of this set; None counts as 1."""
    if vector is None:
        return tl.full([ROWS], 1.0, tl.float64)
    else:
        return tl.load(vector + tensor, mask=mine, other=0.0)


@triton.jit
def _hyper_gradient(sums, hyper_sums, half, rows, factor, set_of, tensors, set_number, goes):
    """Minus the sums of the set's tensors, each times the lr of the update that ``half`` is of: six numbers."""
    lanes = ()
    for _ in tl.static_range(COEFFICIENTS):
        lanes += (tl.zeros([ROWS], tl.float64),)
    for i in range(0, tensors, ROWS):
        tensor = i + tl.arange(0, ROWS)
        mine = tl.load(set_of + tensor, mask=tensor < tensors, other=-1) == set_number
        step = _own(half + STEP * rows, tensor, mine)
        lr = _own(half + STEP_SIZE * rows, tensor, mine)
        scale = _own(factor, tensor, mine)
        more = ()
        for c in tl.static_range(COEFFICIENTS):
            along = tl.load(sums + tensor.to(tl.int64) * (COEFFICIENTS + 1) + 1 + c, mask=mine, other=0.0) * scale
            along = tl.where((step == 0.0) | (lr == 0.0), 0.0, along)  # sums of a tensor that has not moved may be NaN
            tl.store(hyper_sums + tensor.to(tl.int64) * COEFFICIENTS + c, along, mask=mine & goes)
            more += (lanes[c] + lr * -1.0 * along,)
        lanes = more
    h = ()
    for c in tl.static_range(COEFFICIENTS):
        h += (tl.sum(lanes[c], axis=0),)
    return h


@triton.jit
def _learned(place, c: tl.constexpr, h, coefficients, momentum, constants, clip, learns):
    """A coefficient of the set, moved against its hyper-gradient where the set learns."""
    theta = tl.load(coefficients + place)
    h = tl.where(tl.abs(h) < float("inf"), h, 0.0)
    if clip > 0.0:
        shrink = clip / (tl.abs(h) + 1e-6)
        h = h * tl.where(shrink < 1.0, shrink, 1.0)
    velocity = tl.load(constants + COEFFICIENTS + c) * tl.load(momentum + place) + h
    moved = theta - tl.load(constants + c) * velocity
    lower = tl.load(constants + 2 * COEFFICIENTS + c)
    upper = tl.load(constants + 3 * COEFFICIENTS + c)
    moved = tl.where(moved < lower, lower, moved)
    moved = tl.where(moved > upper, upper, moved)
    tl.store(momentum + place, velocity, mask=learns)
    tl.store(coefficients + place, moved, mask=learns)
    return tl.where(learns, moved, theta)


@triton.jit
def _this_half(theta, lr, weight_decay, eps, grad_scale, last_scale, unclipped, step, turn, flags, lion1, lion2):
    """The rows of the vectors, in the order of kernels/mada.py."""
    zeros = tl.zeros([ROWS], tl.float64)
    beta1 = zeros + theta[0]
    beta2 = zeros + theta[1]
    correction1 = 1.0 - integer_power(beta1, step)
    correction2 = 1.0 - integer_power(beta2, step)
    half = (lr, 1.0 - lr * weight_decay, step, beta1, beta2)
    for c in tl.static_range(2, COEFFICIENTS):
        half += (zeros + theta[c],)
    half += (eps, grad_scale, last_scale, correction1, correction2)
    half += (step * integer_power(beta1, step - 1.0) / (correction1 * correction1),)
    half += (step * integer_power(beta2, step - 1.0) / (correction2 * correction2),)
    half += (zeros + lion1, zeros + lion2, turn, flags, unclipped)
    return half


@triton.jit
def _advance(
    vectors, theta, last, rows, set_of, tensors, set_number, lr, weight_decay, eps, grad_scale, unclipped, counts, present, turns,
    goes, lion1, lion2, flags,
):  # fmt: skip
    """Writes the vectors of the set's tensors; their last half becomes the one before it, and the new one the last."""
    for i in range(0, tensors, ROWS):
        tensor = i + tl.arange(0, ROWS)
        mine = tl.load(set_of + tensor, mask=tensor < tensors, other=-1) == set_number
        step = tl.load(counts + tensor, mask=mine, other=0.0) + 1.0
        at_rest = _own(last + STEP * rows, tensor, mine) == 0.0
        own_flags = tl.full([ROWS], 0, tl.int64) + (flags & ~NOT_ALWAYS)
        if (flags & STARTS_AT_REST) != 0:
            own_flags = tl.where(at_rest, own_flags | FIRST, own_flags)
        own_flags = tl.where(at_rest & (step == 1.0), own_flags | (flags & AT_START), own_flags)
        new = _this_half(
            theta, _own(lr, tensor, mine), _own(weight_decay, tensor, mine), _own(eps, tensor, mine),
            _own(grad_scale, tensor, mine), _own(last + GRAD_SCALE * rows, tensor, mine), _own(unclipped, tensor, mine), step,
            _own(turns, tensor, mine), own_flags.to(tl.float64), lion1, lion2,
        )  # fmt: skip
        here = _own(present, tensor, mine) != 0.0
        # Row by row: products with the row's number would be taken out of the loop over tensors, and spilled.
        at = tensor.to(tl.int64)
        for begin in tl.static_range(0, HALF, TOGETHER):
            old = ()
            place = at
            for _ in tl.static_range(TOGETHER):
                old += (tl.load(last + place, mask=mine, other=0.0),)
                place += rows
            tl.debug_barrier()  # all threads have read these rows before one writes them
            for row in tl.static_range(begin, begin + TOGETHER):
                before = old[row - begin]
                taken = tl.where(goes, new[row], 0.0) if row == STEP else new[row]
                tl.store(vectors + at, taken, mask=mine)
                tl.store(vectors + HALF * rows + at, before, mask=mine)
                kept = new[row]  # of a tensor without a gradient the update before stays the last, with nothing more to teach
                if row == STEP_SIZE:
                    kept = tl.where(here, kept, 0.0)
                elif row != UNCLIPPED:
                    kept = tl.where(here, kept, before)
                tl.store(last + at, kept, mask=mine & goes)
                tl.store(last + HALF * rows + at, before, mask=mine & goes)
                at += rows


@triton.jit(do_not_specialize=["tensors", "clip_bits", "freeze_steps", "lion1_bits", "lion2_bits", "flags"])
def mada_policy_kernel(
    vectors, sums, coefficients, momentum, hyper_gradient, hyper_sums, last, set_of, lr, weight_decay, eps, grad_scale, unclipped,
    counts, present, turns, go, constants, tensors, clip_bits, freeze_steps, lion1_bits, lion2_bits, flags, lagged: tl.constexpr,
    advance: tl.constexpr,
):  # fmt: skip
    """One program per set of coefficients, which takes its tensors ROWS at a time."""
    set_number = tl.program_id(0).to(tl.int64)
    rows = tensors.to(tl.int64)
    first = set_number * COEFFICIENTS
    goes = tl.full([], 1, tl.int1)
    if go is not None:
        goes = tl.load(go) != 0
    theta = ()
    if sums is None:
        for c in tl.static_range(COEFFICIENTS):
            theta += (tl.load(coefficients + first + c),)
    else:
        half = last + HALF * rows if lagged else last
        factor = last + UNCLIPPED * rows if lagged else unclipped
        h = _hyper_gradient(sums, hyper_sums, half, rows, factor, set_of, tensors, set_number, goes)
        done = tl.load(counts + rows) - (1.0 if lagged else 0.0)
        learns = goes & (done > freeze_steps.to(tl.float64))
        clip = clip_bits.to(tl.int64).to(tl.float64, bitcast=True)  # in bits, since Triton would round a float to 32 of them
        for c in tl.static_range(COEFFICIENTS):
            tl.store(hyper_gradient + first + c, h[c], mask=goes)
            theta += (_learned(first + c, c, h[c], coefficients, momentum, constants, clip, learns),)
        tl.debug_barrier()  # all threads have read what follows writes
    if advance:
        lion1 = lion1_bits.to(tl.int64).to(tl.float64, bitcast=True)
        lion2 = lion2_bits.to(tl.int64).to(tl.float64, bitcast=True)
        _advance(
            vectors, theta, last, rows, set_of, tensors, set_number, lr, weight_decay, eps, grad_scale, unclipped, counts, present,
            turns, goes, lion1, lion2, flags.to(tl.int64),
        )  # fmt: skip


def mada_policy_(
    sums: Tensor | None,
    coefficients: Tensor,
    momentum: Tensor,
    hyper_gradient: Tensor,
    hyper_sums: Tensor,
    last: Tensor,
    set_of: Tensor,
    lr: Tensor,
    weight_decay: Tensor,
    eps: Tensor,
    grad_scale: Tensor | None,
    unclipped: Tensor | None,
    counts: Tensor,
    present: Tensor | None,
    turns: Tensor,
    go: Tensor | None,
    constants: Tensor,
    hyper_clip: float,
    freeze_steps: int,
    lion1: float,
    lion2: float,
    flags: int,
    lagged: bool,
    advance: bool,
) -> Tensor:
    """As ``metaadamw_fast.mada_reference.mada_policy_``.

    Raises:
        RuntimeError: an argument of another dtype or shape.
    """
    tensors, sets = len(set_of), len(coefficients)
    check("set_of", set_of, torch.int64, (tensors,))
    check("sums", sums, torch.float64, (tensors, COEFFICIENTS.value + 1))
    check("hyper_sums", hyper_sums, torch.float64, (tensors, COEFFICIENTS.value))
    check("last", last, torch.float64, (2, ROWS_OF_HALF, tensors))
    check("constants", constants, torch.float64, (4, COEFFICIENTS.value))
    of_sets = {"coefficients": coefficients, "momentum": momentum, "hyper_gradient": hyper_gradient}
    for name, x in of_sets.items():
        check(name, x, torch.float64, (sets, COEFFICIENTS.value))
    of_tensors = {"lr": lr, "weight_decay": weight_decay, "eps": eps, "grad_scale": grad_scale, "unclipped": unclipped}
    for name, y in (of_tensors | {"present": present, "turns": turns}).items():
        check(name, y, torch.float64, (tensors,))
    check("counts", counts, torch.float64, (tensors + 1,))
    vectors = last.new_empty(2 * ROWS_OF_HALF, tensors if advance else 0)
    clip_bits, lion1_bits, lion2_bits = (struct.unpack("<q", struct.pack("<d", x))[0] for x in (hyper_clip, lion1, lion2))
    with device_guard(last):
        mada_policy_kernel[(sets,)](
            vectors, sums, *of_sets.values(), hyper_sums, last, set_of, *of_tensors.values(), counts, present, turns, go, constants,
            tensors, clip_bits, freeze_steps, lion1_bits, lion2_bits, flags, lagged, advance, num_warps=WARPS,
            enable_fp_fusion=False,
        )  # fmt: skip
    return vectors
