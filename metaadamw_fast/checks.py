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
        RuntimeError: something of it does not hold, or an expanded tensor would be written.
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
                raise RuntimeError(f"{name}[{i}] and {leader.name}[{i}] differ in shape: {tuple(x.shape)}, {tuple(like.shape)}")
            if written and x.numel() and any(stride == 0 and size > 1 for stride, size in zip(x.stride(), x.shape, strict=True)):
                raise RuntimeError(f"{name}[{i}] is expanded: several of its elements share one place in memory")


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
    others = (OpList("grads", grads, optional=True), OpList("params", params), OpList("exp_avg_sqs", exp_avg_sqs))
    check_lists(OpList("exp_avgs", exp_avgs), *others)


def check_update(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor] | None,
    *hyperparameters: Tensor | None,
) -> None:
    """:func:`check_lists` for ``adamw_update_``; hyper-parameters must be float64 [T] on the tensors' device."""
    check_lists(
        OpList("params", params, written=True),
        OpList("grads", grads),
        OpList("exp_avgs", exp_avgs, written=True),
        OpList("exp_avg_sqs", exp_avg_sqs, written=True),
        OpList("max_exp_avg_sqs", max_exp_avg_sqs, written=True, optional=True),
    )
    for name, x in zip(HYPERPARAMETERS, hyperparameters, strict=True):
        if x is None:
            continue
        if x.dtype != torch.float64 or x.shape != (len(params),):
            raise RuntimeError(f"{name} must be a float64 tensor of shape [{len(params)}]")
        if params and x.device != params[0].device:
            raise RuntimeError(f"{name} is on {x.device}, another device than params[0] on {params[0].device}")
