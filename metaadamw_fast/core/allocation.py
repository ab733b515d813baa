"""Which parameters can be updated, and the states that they get: zeros or copies, masters of low-precision parameters, counts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from metaadamw_fast.checks import DTYPES

from .members import repeats
from .rule import Rule, State
from .sharding import check_supported
from .watch import is_wrapper

MASTER = "master_param"
_LOW_PRECISION = (torch.bfloat16, torch.float16)
_COMPLEX = {torch.float32: torch.complex64, torch.float64: torch.complex128}


def reason_against(p: Tensor, device: torch.device) -> str | None:
    """Why no backend on ``device`` can update ``p``; None if one can."""
    if is_lazy(p):
        return "the optimizer cannot update a parameter that is not initialized: run the model once before"
    if is_wrapper(p):
        return f"the optimizer cannot update a {type(p).__name__}: it is a subclass that is no plain memory"
    real = p.dtype.to_real() if p.is_complex() else p.dtype
    if real not in DTYPES or p.layout is not torch.strided:
        return f"the optimizer needs dense floating-point parameters, got {p.dtype}, {p.layout}"
    if p.numel() and any(stride == 0 and size > 1 for stride, size in zip(p.stride(), p.shape, strict=True)):
        return "the optimizer cannot update an expanded parameter: its elements share memory"
    if p.device != device:
        return f"the optimizer needs all parameters on one device, got {', '.join(sorted((str(device), str(p.device))))}"
    return None


def check_params(params: Sequence[Tensor], param_groups: Sequence[Mapping[str, Any]], device: torch.device) -> None:
    """Raises ValueError on new parameters that require a gradient and that no backend can update.

    Others are left alone. What can be said against them is said when a gradient comes.

    Args:
        params: the new ones, which ``param_groups`` list already.
        device: of the optimizer.
    """
    for p in params:
        if p.requires_grad and not is_lazy(p):
            reason = reason_against(p, p.device)
            if reason is not None:
                raise ValueError(reason)
    if repeats(param_groups):
        raise ValueError("the optimizer got a parameter group with duplicate parameters")
    everyone = [p for group in param_groups for p in group["params"]]
    check_supported(everyone)
    names = sorted({str(p.device) for p in everyone if p.requires_grad})
    if len(names) > 1:
        raise ValueError(f"the optimizer needs all parameters on one device, got {', '.join(names)}")
    if device.type != "cuda" and everyone and any(g["capturable"] for g in param_groups):
        raise ValueError(f"capturable=True needs parameters on a CUDA device, got {device}")


def has_row(p: Tensor, grad: Tensor | None, state: Mapping[Tensor, Any], device: torch.device, rule: Rule) -> bool:
    """Whether a parameter has a state, or is to get one now: it has a gradient, or requires one and can be updated.

    Raises:
        ValueError: it is to get one, and no backend can update it.
    """
    if rule.states[0].name in state.get(p, ()):
        return True
    if grad is None:
        return p.requires_grad and not p.is_meta and reason_against(p, device) is None
    reason = reason_against(p, device)
    if reason is not None:
        raise ValueError(reason)
    return True


class Allocation:
    """Gives parameters the entries of their states that are missing, and can take them away again.

    Args:
        state: ``optimizer.state``.
        device: of the states.
        state_dtype: see :class:`~metaadamw_fast.core.states.States`.
        master_weights: likewise.
    """

    def __init__(
        self, state: MutableMapping[Tensor, Any], device: torch.device, state_dtype: torch.dtype | None, master_weights: bool
    ) -> None:
        self._state, self._device, self._state_dtype, self._master_weights = state, device, state_dtype, master_weights
        self._added: list[tuple[Tensor, str | None]] = []  # None: the state itself

    def complete(self, p: Tensor, states: Iterable[State]) -> None:
        """Gives a parameter those of these states that it does not have, its master and its count."""
        if p not in self._state:
            self._added.append((p, None))
        own = self._state.setdefault(p, {})
        for state in states:
            if state.name not in own:
                self._added.append((p, state.name))
                dtype = self._dtype(p, state)
                if state.of_param:
                    start = own.get(MASTER, p).detach()
                    own[state.name] = start.to(self._device, dtype, copy=True, memory_format=torch.preserve_format)
                else:
                    own[state.name] = torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format)
            elif own[state.name].device != self._device:
                own[state.name] = own[state.name].to(self._device)
        if self._master_weights and p.dtype in _LOW_PRECISION:
            if MASTER not in own:
                self._added.append((p, MASTER))
                own[MASTER] = p.detach().to(torch.float32, copy=True, memory_format=torch.preserve_format)
            elif own[MASTER].device != self._device:
                own[MASTER] = own[MASTER].to(self._device)
        if "step" not in own:
            self._added.append((p, "step"))
            own["step"] = torch.zeros((), dtype=torch.float32, device=self._device)

    def _dtype(self, p: Tensor, state: State) -> torch.dtype:
        own = p.dtype.to_real() if p.is_complex() else p.dtype
        real = own if state.of_gradient or state.of_param else self._state_dtype or own
        if state.wide:
            real = torch.promote_types(real, torch.float32)
        return _COMPLEX.get(real, p.dtype) if p.is_complex() else real

    def undo(self) -> None:
        """Takes away all that was added."""
        for p, name in reversed(self._added):
            if name is None:
                self._state.pop(p, None)
            else:
                self._state[p].pop(name, None)
