"""What a step asks of its device so that the host never waits for it, and a CUDA graph can hold the step."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

P = ParamSpec("P")
R = TypeVar("R")


def outside_inference_mode(method: Callable[P, R]) -> Callable[P, R]:
    """Makes a method leave ``torch.inference_mode()``, where a caller has it on, for the time of a call.

    Tensors that are made in inference mode can never be trained or written outside of it. A set-up function under
    inference mode would otherwise leave an optimizer that cannot step.
    """

    @functools.wraps(method)
    def outside(*args: P.args, **kwargs: P.kwargs) -> R:
        if not torch.is_inference_mode_enabled():
            return method(*args, **kwargs)
        with torch.inference_mode(False), torch.no_grad():  # the former alone would enable gradients
            return method(*args, **kwargs)

    return outside


def is_fake(x: Tensor) -> bool:
    """Whether ``x`` has a shape and no elements: made under FakeTensorMode, as estimators of memory do."""
    return isinstance(x, FakeTensor)


def readable(x: Tensor) -> bool:
    """Whether the host can read numbers of ``x`` without waiting for a device."""
    return x.device.type == "cpu" and not is_fake(x)


def capturing(device: torch.device) -> bool:
    """Whether what is called now goes into a CUDA graph instead of being carried out."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def current_stream(device: torch.device) -> torch.Stream | None:
    """The stream that takes what is called now; None where there are no streams."""
    return torch.cuda.current_stream(device) if device.type == "cuda" else None


def upload(rows: Sequence[Sequence[float]], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers [R, C] of the host as a tensor on the device, without waiting for it.

    While a CUDA graph is captured they become arguments of kernels: a replay would copy from memory that is gone.
    """
    if not capturing(device):
        host = torch.tensor(rows, dtype=dtype, pin_memory=device.type == "cuda")
        return host.to(device, non_blocking=True)
    numbers = [x for row in rows for x in row]
    most = max(set(numbers), key=numbers.count, default=0.0)
    out = torch.full((len(numbers),), most, dtype=dtype, device=device)
    for i, x in enumerate(numbers):
        if x != most:
            out[i].fill_(x)
    return out.view(len(rows), -1)
