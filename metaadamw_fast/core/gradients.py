"""What is done to gradients on their way into an update: unscaling, clipping, negating. ``.grad`` itself stays as it is.

And whether there is an update at all. Where only the device knows, the answer is a tensor there: the host never waits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import devices


class Scaled(NamedTuple):
    """Gradients that are multiplied.

    Attributes:
        factor: float64 [T]; None for 1.
        norm: 0-dim, of the unscaled gradients before clipping; None without clipping.
        sums: [T, S], of the multiplied gradients.
    """

    factor: Tensor | None
    norm: Tensor | None
    sums: Tensor


def should_step(optimizer: Any) -> Tensor | bool:
    """Whether a step counts: True, False, or a 0-dim bool on the device, where the host must not wait to know.

    ``torch.amp.GradScaler`` sets ``found_inf`` and ``grad_scale`` for the time of a step.
    """
    found_inf: Tensor | None = getattr(optimizer, "found_inf", None)
    if found_inf is None:
        return True
    return not found_inf.item() if devices.readable(found_inf) else found_inf.reshape(()) == 0


def scaler_scale(optimizer: Any, device: torch.device) -> Tensor | None:
    """By what ``torch.amp.GradScaler`` has multiplied the loss of this step, 0-dim float32; None without one."""
    scale: Tensor | None = getattr(optimizer, "grad_scale", None)
    return None if scale is None else scale.to(device, torch.float32).reshape(())


def skip_nonfinite(should: Tensor | bool, sums: Tensor, skipped: Tensor) -> Tensor | bool:
    """``should``, unless the gradients are not finite. Counts that in ``skipped``, unless GradScaler has called the step off."""
    finite = sums[:, 0].sum().isfinite()
    skipped += ~finite & should
    should = finite & should
    return bool(should) if devices.readable(should) else should


def scale(
    backend: Any,
    sums: Tensor,
    sign: Tensor | None,
    scale_of_loss: Tensor | None,
    max_norm: float | None,
    degrees: Sequence[int] = (2, 1),
) -> Scaled:
    """Unscaling by 0-dim ``scale_of_loss``, clipping to ``max_norm`` and maximizing (``sign`` float64 [T]), as far as not None.

    ``degrees`` are those of the columns of ``sums``; see :class:`~metaadamw_fast.core.rule.Rule`.
    """
    if sign is None and scale_of_loss is None and max_norm is None:
        return Scaled(None, None, sums)
    # A backend knows a rule's sums by their places: of the second it takes Σg·m to be there.
    known = sums if any(degrees[1:]) else sums[:, :1].contiguous()
    factor, norm, scaled = backend.scaled_gradients(known, sign, scale_of_loss, max_norm or 0.0)
    if known is not sums:
        scaled = torch.cat([scaled, sums[:, 1:]], dim=1)
    return Scaled(factor, None if max_norm is None else norm, scaled)
