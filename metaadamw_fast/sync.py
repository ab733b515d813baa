"""What a step asks of its device so that the host never waits for it, and a CUDA graph can hold the step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def readable(x: Tensor) -> bool:
    """Whether the host can read numbers of ``x`` without waiting for a device."""
    return x.device.type == "cpu"


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
