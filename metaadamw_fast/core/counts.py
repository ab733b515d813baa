"""How many steps were taken, by each parameter and by the optimizer: exact inside, and shown as ``state[p]["step"]``."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import dlpack

from . import devices
from .watch import version


class StepCounts:
    """Keeps ``state["step"]`` of some parameters and the exact counts equal, in both directions.

    torch shows a count as a 0-dim float32 tensor, which stands still at 2^24. So the counts are float64 inside. What is shown are R
    tensors, each with a storage of its own, on one vector: one copy writes them all. The counts follow what others put or write
    there. A value that is the rounding of the exact count is the exact count.

    Args:
        exact: float64 [T + 1], the counts of T parameters and, last, the optimizer's own; written in place.
        rows: int64 [R], which of the parameters have a state; None for all T.
        states: their states. Each gets its ``"step"``: the tensor that is there stays the same object where it can.
        always: look for what others wrote in every step, also where no version counter tells: a CUDA graph replays without Python.
    """

    def __init__(self, exact: Tensor, rows: Tensor | None, states: Sequence[MutableMapping[str, Any]], *, always: bool) -> None:
        self._exact, self._rows, self._always = exact, rows, always
        device = exact.device
        known = self._selected().float()
        self._shown = known.clone()
        self.tensors: list[Tensor] = []  # the states' own
        self._elsewhere: list[int] = []  # rows whose tensor has memory that others share
        found = [state.get("step", 0.0) for state in states]
        self._take([torch.as_tensor(x, dtype=torch.float64, device=device).detach().reshape(()) for x in found])
        for t, (state, value) in enumerate(zip(states, found, strict=True)):
            element = self._element(t)
            if not _can_show(value, device):
                state["step"] = value = element
            elif _is_shared(value):
                self._elsewhere.append(t)
            else:
                value.data = element
            self.tensors.append(value)
        self._show()
        self._seen = version(self.tensors)

    def _selected(self) -> Tensor:
        counts = self._exact[:-1]
        return counts if self._rows is None else counts.index_select(0, self._rows)

    def _element(self, t: int) -> Tensor:
        """Element ``t`` of what is shown, as a tensor whose storage is four bytes long: it is saved and shared without the rest."""
        view = self._shown[t]
        return view.clone() if devices.is_fake(view) else dlpack.from_dlpack(dlpack.to_dlpack(view))  # type: ignore[attr-defined]

    def _take(self, found: Sequence[Tensor]) -> None:
        """Makes the counts those of ``found``, R of 0 dimensions, where these are not their roundings."""
        if not found:
            return
        now, known = torch.stack([*found]).double(), self._selected()
        taken = torch.where(now.float() == known.float(), known, now)
        if self._rows is None:
            self._exact[:-1].copy_(taken)
        else:
            self._exact.index_copy_(0, self._rows, taken)

    def _show(self) -> None:
        self._shown.copy_(self._selected())
        if self._elsewhere:
            torch._foreach_copy_([self.tensors[t] for t in self._elsewhere], [self._shown[t] for t in self._elsewhere])

    def take_writes(self) -> None:
        """Follows what others have written since the last step."""
        seen = version(self.tensors)
        if seen != self._seen or self._elsewhere or self._always:
            self._take(self.tensors)
            self._seen = seen

    def add(self, increment: Tensor | int) -> None:
        """Counts a step, ``increment`` [T + 1] or 1 for all, and shows it."""
        self._exact += increment
        self._show()
        if self._elsewhere:
            self._seen = version(self.tensors)

    def kept(self) -> list[Tensor]:
        """The tensors on the device that it keeps from step to step."""
        return [self._exact, self._shown, *([] if self._rows is None else [self._rows])]


def _can_show(value: Any, device: torch.device) -> bool:
    """Whether a count can be shown in this very object."""
    return (
        type(value) is Tensor
        and value.dim() == 0
        and value.dtype == torch.float32
        and value.device == device
        and not value.is_inference()
        and not value.requires_grad
    )


def _is_shared(value: Tensor) -> bool:
    """Whether others may count in the memory of ``value``: other processes, or tensors that are views of the same."""
    on_cpu = value.device.type == "cpu"
    shared: bool = on_cpu and value.is_shared()  # type: ignore[no-untyped-call]
    return shared or value.untyped_storage().nbytes() > value.element_size()
