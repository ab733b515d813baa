"""The ops of MADA in plain eager PyTorch."""

from __future__ import annotations

from typing import Any


def mada_sums(*_: Any) -> Any:
    raise NotImplementedError


def mada_update_(*_: Any) -> Any:
    raise NotImplementedError
