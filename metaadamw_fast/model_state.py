"""Evaluating a model at other parameters, and leaving it exactly as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel


@contextmanager
def preserved(model: nn.Module) -> Iterator[Callable[[], None]]:
    """Restores gradients, buffers, train/eval modes and torch's random states on exit, also after an exception.

    Yields:
        A function that puts the random states back to those at the entry: evaluations that start from it draw equal dropout masks.
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
                buffer.copy_(value)
        for param, grad in grads:
            if param.grad is not grad:
                param.grad = grad


@contextmanager
def parameters_replaced(model: nn.Module, replacements: Mapping[Tensor, Tensor]) -> Iterator[None]:
    """Puts other tensors in the places of parameters, everywhere in the model: a tied weight has several places.

    The replacements may carry a graph, so that a loss computed inside can be differentiated through them.
    """
    places = [
        (module, name, param)
        for module in model.modules()
        for name, param in module._parameters.items()
        if param is not None and param in replacements
    ]
    recurrent = [module for module in model.modules() if isinstance(module, nn.RNNBase)]

    def put(values: Callable[[Tensor], Tensor]) -> None:
        for module, name, param in places:
            module._parameters[name] = values(param)  # type: ignore[assignment]
        for module in recurrent:  # they keep a list of their own
            module._flat_weights = [getattr(module, name, None) for name in module._flat_weights_names]

    put(lambda param: replacements[param])
    try:
        yield
    finally:
        put(lambda param: param)


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
