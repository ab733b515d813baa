"""Evaluation with averaged parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .core import devices
from .core.allocation import MASTER
from .parallel import reshard

AVERAGE = "ema_param"


@contextmanager
def averaged(state: Mapping[Any, Any], model: nn.Module | None) -> Iterator[None]:
    """For the time of a ``with`` block parameters, and their masters, are what ``state`` has as their averages."""
    pairs: list[tuple[Tensor, Tensor]] = []
    for p, own in state.items():
        if isinstance(p, Tensor) and AVERAGE in own:
            pairs += [(x, own[AVERAGE]) for x in (p.detach(), own.get(MASTER)) if x is not None]
    kept = [x.clone() for x, _ in pairs]
    try:
        _write(((x, average) for x, average in pairs), model)
        yield
    finally:
        _write(zip((x for x, _ in pairs), kept, strict=True), model)


@devices.outside_inference_mode
@torch.no_grad()
def _write(pairs: Any, model: nn.Module | None) -> None:
    for x, value in pairs:
        x.copy_(value)
    if model is not None:
        reshard(model)  # so that FSDP2 gathers what the shards now hold
