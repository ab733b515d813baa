"""Leaving a model exactly as it was, and letting it be differentiated twice."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .sharding import reducing


@contextmanager
def preserved(model: nn.Module) -> Iterator[Callable[[], None]]:
    """Restores gradients, buffers, train/eval modes and torch's random states on exit, also after an exception.

    Gradients are aside meanwhile, also those that FSDP2 has not reduced yet; see :func:`metaadamw_fast.sharding.reducing`.

    Yields:
        A function that puts the random states back to those at the entry: evaluations that start from it draw equal dropout masks.

    Raises:
        RuntimeError: a torch in which unreduced gradients of FSDP2 are not found.
    """
    grads = [(p, p.grad) for p in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(module, dict(module._buffers)) for module in model.modules()]
    values = [(x, x.detach().clone()) for _, own in buffers for x in own.values() if x is not None]
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.is_cuda})
    cpu_state, cuda_states = torch.get_rng_state(), [torch.cuda.get_rng_state(d) for d in devices]

    def rewind() -> None:
        torch.set_rng_state(cpu_state)
        for device, state in zip(devices, cuda_states, strict=True):
            torch.cuda.set_rng_state(state, device)

    try:
        with reducing(model):
            for param, _ in grads:  # autograd would add to them in place
                param.grad = None
            yield rewind
    finally:
        rewind()
        for module, training in modes:
            module.training = training
        with torch.no_grad():
            for module, own in buffers:  # an evaluation may also create or replace some
                module._buffers.clear()
                module._buffers.update(own)
            for buffer, value in values:
                if not torch.equal(buffer, value):  # a write that changes nothing would break a backward pass that needs it
                    buffer.copy_(value)
        for param, grad in grads:
            if param.grad is not grad:
                param.grad = grad


@contextmanager
def twice_differentiable(model: nn.Module) -> Iterator[None]:
    """Makes torch choose kernels whose backward has a backward.

    Of the attention kernels only MATH has one; of the recurrent ones on the CPU, those without oneDNN.
    """
    recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
    one_dnn: Any = torch.backends.mkldnn
    enabled = one_dnn.enabled
    with sdpa_kernel(SDPBackend.MATH):
        try:
            if recurrent:  # not mkldnn.flags(): it sets the precisions too, and warns of its own defaults
                one_dnn.enabled = False
            yield
        finally:
            one_dnn.enabled = enabled
