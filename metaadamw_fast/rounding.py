"""Stochastic rounding in plain PyTorch, with the random bits of csrc/rounding.h."""

from __future__ import annotations

import torch
from torch import Tensor

OPERANDS = 5  # csrc/rounding.h
MOMENTUM, PARAM, SECOND_MOMENT = 1, 2, 3
_LOW = 0xFFFFFFFF


def scrambled(x: Tensor) -> Tensor:
    """A permutation of 32-bit numbers, held in int64: C. Wellons, "Prospecting for hash functions" (2018), lowbias32."""
    x = (x ^ (x >> 16)) * 0x7FEB352D & _LOW
    x = (x ^ (x >> 15)) * 0x846CA68B & _LOW
    return x ^ (x >> 16)


def signed(seed: int) -> int:
    """The number of 64 bits, with a sign, that the ops take for a seed; torch's generators take it without one, too."""
    return (seed + 2**63) % 2**64 - 2**63


def random_bits(seed: int, step: Tensor, tensor: int, operand: int, element: Tensor) -> Tensor:
    """32 bits for each ``element`` (numbers of elements as the kernels walk a tensor, int64), whatever the device."""
    key = scrambled(torch.tensor(seed & _LOW, device=element.device))
    key = scrambled(key ^ (seed >> 32 & _LOW))
    whole = step.to(torch.int64)
    key = scrambled(key ^ (whole & _LOW) ^ ((whole >> 32 & _LOW) * 0x9E3779B9 & _LOW))
    key = scrambled(key ^ tensor)
    key = scrambled(key ^ ((element >> 32) * OPERANDS + operand & _LOW))
    return scrambled(element & _LOW ^ key)


def walked(like: Tensor) -> Tensor:
    """The number of each element in the order in which kernels walk a tensor: that of its memory."""
    order = sorted(range(like.dim()), key=like.stride, reverse=True)
    numbers = torch.arange(like.numel(), device=like.device).view([like.size(d) for d in order])
    return numbers.permute([order.index(d) for d in range(like.dim())])


def round_stochastically(x: Tensor, dtype: torch.dtype, random: Tensor) -> Tensor:
    """``x`` up or down to a neighbour among the numbers of ``dtype``, by chance, so that the mean is ``x``. Wider dtypes: ``x``."""
    if dtype not in (torch.bfloat16, torch.float16):
        return x
    single = x.to(torch.float32)
    bits = single.view(torch.int32).to(torch.int64)
    dropped = 16 if dtype == torch.bfloat16 else 13
    rounded = (bits + (random >> (32 - dropped)) >> dropped << dropped).to(torch.int32).view(torch.float32)
    rounded = torch.where(single.isfinite(), rounded, single)
    if dtype == torch.float16:  # which are the multiples of 2^-24 below 2^-14
        magnitude = single.abs() * 2.0**24
        whole = magnitude.floor()
        up = (random >> 8) * 2.0**-24 < magnitude - whole
        rounded = torch.where(magnitude < 2.0**10, ((whole + up) * 2.0**-24).copysign(single), rounded)
    return rounded.to(x.dtype)
