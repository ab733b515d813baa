"""What must hold of the lists that an op takes. csrc/checks.h is its twin for the C++ ops."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

HYPERPARAMETERS = ("step_size", "decay_factor", "step", "beta1", "beta2", "eps", "grad_scale")  # in the order of the op
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class OpList(NamedTuple):
    """One list of an op; ``optional`` allows entries without elements where the leading list has some."""

    name: str
    tensors: Sequence[Tensor] | None
    written: bool = False
    optional: bool = False


def check_lists(leader: OpList, *others: OpList) -> None:
    """Lists of one length; dense floating tensors on one device, of one shape at each position.

    Raises:
        RuntimeError: something of it does not hold, or a tensor would be written whose elements share memory.
    """
    leading = leader.tensors or ()
    for name, tensors, written, optional in (leader, *others):
        if tensors is None:
            continue
        if len(tensors) != len(leading):
            raise RuntimeError(f"{name} has {len(tensors)} tensors, {leader.name} has {len(leading)}")
        for i, (x, like) in enumerate(zip(tensors, leading, strict=True)):
            if x.layout is not torch.strided:
                raise RuntimeError(f"{name}[{i}] is sparse: only dense tensors are supported")
            if x.device != leading[0].device:
                raise RuntimeError(f"{name}[{i}] is on {x.device}, another device than {leader.name}[0] on {leading[0].device}")
            if x.dtype not in DTYPES:
                raise RuntimeError(f"{name}[{i}] has dtype {x.dtype}: only float32, float64, bfloat16, float16 are supported")
            if x.shape != like.shape and not (optional and x.numel() == 0):
                shapes = f"{list(x.shape)}, {list(like.shape)}"
                raise RuntimeError(f"{name}[{i}] and {leader.name}[{i}] differ in shape: {shapes}")
            if written and x.numel() and _reach(x) is None:
                raise RuntimeError(
                    f"{name}[{i}] is expanded or overlaps itself: several of its elements share one place in memory, so it"
                    " cannot be updated"
                )


def _reach(x: Tensor) -> int | None:
    """Elements of memory from the first to the last of ``x``; None if two of them share a place.

    Each stride must lead beyond all that the smaller ones reach. That refuses a few exotic tensors whose elements interleave
    without meeting.
    """
    reach = 1
    for stride, size in sorted(pair for pair in zip(x.stride(), x.shape, strict=True) if pair[1] != 1):
        if stride < reach:
            return None
        reach += (size - 1) * stride
    return reach


def check_distinct(*lists: OpList) -> None:
    """No two tensors that will be written share memory for certain; strided ones that interleave are fine.

    Raises:
        RuntimeError: two of them do, and would be updated twice.
    """
    extents = []
    for name, tensors, written, _ in lists:
        for i, x in enumerate(tensors or ()):
            reach = _reach(x)
            if written and x.numel() and reach is not None:
                begin = x.data_ptr()
                extents.append((begin, begin + reach * x.element_size(), reach == x.numel(), f"{name}[{i}]"))
    extents.sort(key=lambda extent: extent[0])
    full_end, full_name = 0, ""  # of those before that hold every byte in between, the one that ends last
    last_begin, last_name = -1, ""
    for begin, end, full, name in extents:
        other = last_name if begin == last_begin else full_name if begin < full_end else None
        if other is not None:
            raise RuntimeError(f"{name} and {other} share memory, so they cannot be updated")
        if full and end > full_end:
            full_end, full_name = end, name
        last_begin, last_name = begin, name


def check_stats(
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    params: Sequence[Tensor] | None,
    exp_avg_sqs: Sequence[Tensor] | None,
    dtype: torch.dtype,
) -> None:
    """:func:`check_lists` for ``tensor_stats``."""
    if dtype not in (torch.float32, torch.float64):
        raise RuntimeError(f"the statistics are float32 or float64, not {dtype}")
    lists = [OpList("params", params), OpList("exp_avgs", exp_avgs)][params is None :]
    check_lists(*lists, OpList("grads", grads, optional=True), OpList("exp_avg_sqs", exp_avg_sqs))


def update_lists(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor] | None,
    low_precision_params: Sequence[Tensor] | None = None,
) -> tuple[OpList, ...]:
    """The lists of ``adamw_update_`` for :func:`check_lists` and :func:`check_distinct`."""
    return (
        OpList("params", params, written=True),
        OpList("grads", grads, optional=True),
        OpList("exp_avgs", exp_avgs, written=True),
        OpList("exp_avg_sqs", exp_avg_sqs, written=True),
        OpList("max_exp_avg_sqs", max_exp_avg_sqs, written=True, optional=True),
        OpList("low_precision_params", low_precision_params, written=True, optional=True),
    )


def check_low_precision(params: Sequence[Tensor] | None, low_precision_params: Sequence[Tensor] | None) -> None:
    """Parameters of bfloat16 or float16 have float32 masters in the place of ``params``; entries without elements have none.

    Raises:
        RuntimeError: something of it does not hold.
    """
    if low_precision_params is None:
        return
    if params is None:
        raise RuntimeError("low_precision_params need params, which are their masters")
    for i, (low, master) in enumerate(zip(low_precision_params, params, strict=False)):  # of one length: check_lists
        if not low.numel():
            continue
        if low.dtype not in (torch.bfloat16, torch.float16):
            raise RuntimeError(f"low_precision_params[{i}] has dtype {low.dtype}: only bfloat16, float16 have a master")
        if master.dtype != torch.float32:
            raise RuntimeError(f"params[{i}] has dtype {master.dtype}: the master of low_precision_params[{i}] must be float32")


def check_update(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor] | None,
    *hyperparameters: Tensor | None,
    low_precision_params: Sequence[Tensor] | None = None,
) -> None:
    """:func:`check_lists` for ``adamw_update_``; hyper-parameters must be float64 [T] on the tensors' device."""
    check_lists(*update_lists(params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, low_precision_params))
    check_low_precision(params, low_precision_params)
    for name, x in zip(HYPERPARAMETERS, hyperparameters, strict=True):
        if x is None:
            continue
        if x.dtype != torch.float64 or x.shape != (len(params),):
            raise RuntimeError(f"{name} must be a float64 tensor of shape [{len(params)}]")
        if params and x.device != params[0].device:
            raise RuntimeError(f"{name} is on {x.device}, another device than params[0] on {params[0].device}")
