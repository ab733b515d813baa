"""What the next gradient says of the scales of the last update: docs/algorithm.md, section 13. Nothing here knows the optimizer.

The kernels make a few more sums of each tensor, for which they need numbers of its last update. The derivatives follow from these
sums in float64, on the device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .core import devices
from .core.hyperparameters import Hyperparameters
from .core.rule import Rule, State
from .online_reference import FOUND, LAST, SUMS

__all__ = ["FOUND", "LastUpdate", "learning_sums", "log_derivatives", "of_groups", "online_rule"]

VECTORS = ("ema_decay", *(f"last_{name}" for name in LAST))  # behind those of AdamW
# What is summed between AdamW's sums and its counts; the last two are of p - ema_param.
GRAD_DIRECTION, GRAD_PARAM, DIRECTION_SQ, DIRECTION_PARAM, GRAD_TRACE, TRACE_SQ = SUMS[5:11]


def online_rule(adamw: Rule, *, ema: bool, learns: bool) -> Rule:
    """The rule of csrc/online.h: that of ``adamw``, counts included, with a learner's sums and, if ``ema``, averaged parameters."""
    states, operands = adamw.states, adamw.operands
    average = (State("ema_param", wide=True, of_param=True),) if ema else ()
    return adamw._replace(
        name="online_adamw",
        states=(*states[:-1], *average, states[-1]),
        operands=(*operands[:-1], "ema_param" if ema else None, operands[-1]),
        vectors=(*adamw.vectors, *VECTORS),
        sums={name: adamw.sums.get(name, 0) for name in SUMS},  # a learner's are of the gradient as it is
        found=len(SUMS),
        remembers=learns,
    )


def learning_sums(gradient: str, trace: float, *, learns_decay: bool) -> list[str]:
    """The sums that :func:`log_derivatives` needs beside those of AdamW."""
    last_step = [GRAD_DIRECTION, GRAD_PARAM]
    if gradient == "cosine":
        return [GRAD_TRACE, TRACE_SQ] if trace else [*last_step, DIRECTION_SQ, DIRECTION_PARAM]
    return [*(last_step if learns_decay or not trace else []), *([GRAD_TRACE] if trace else [])]


class LastUpdate:
    """Of each tensor the numbers of the last update that counted, on the device, changed in place.

    A row each: those of ``VECTORS``, then the step size a, the decay factor d, and 1 - d, which is 0 where d was clamped. A tensor
    that did not move in that update, or that somebody has written since, has a step size of 0 and a decay factor of 1: nothing
    is learned of it.

    Args:
        tensors: T.
        ema_decay: γ of the averaged parameters; 0 without them.
        device: of the numbers.

    Attributes:
        numbers: float64 [7, T].
    """

    def __init__(self, tensors: int, ema_decay: float, device: torch.device) -> None:
        none = torch.tensor([ema_decay, 0.0, 0.0, 1.0, 0.0, 1.0, 0.0], dtype=torch.float64, device="cpu")
        self._none = none[:, None].to(device)
        self.numbers = self._none.repeat(1, tensors)

    @property
    def of_update(self) -> Tensor:
        """[4, T], what an update reads of it."""
        return self.numbers[:4]

    @property
    def of_sums(self) -> Tensor:
        """[3, T], what a pass of sums reads of it."""
        return self.numbers[1:4]

    def without(self, tensors: Sequence[int]) -> Tensor:
        """A copy of the numbers in which nothing is known of the last update of these tensors."""
        numbers = self.numbers.clone()
        if tensors:
            numbers[:, [*tensors]] = self._none
        return numbers

    def forget(self, tensors: Sequence[int] | None = None) -> None:
        """Learns nothing more of the last update of these tensors, of all by default."""
        if tensors is None:
            self.numbers.copy_(self._none)
        elif tensors:
            rows = devices.upload([tensors], torch.float64, self.numbers.device)[0].long()
            self.numbers.index_copy_(1, rows, self._none.repeat(1, len(tensors)))

    def follow(self, origins: Sequence[int | None], counts: Tensor) -> None:
        """Brings the columns in the order of other tensors; those without steps, by ``counts``, have no last update."""
        device = counts.device
        old, self._none = self.numbers.to(device), self._none.to(device)
        numbers = none = self._none.repeat(1, len(origins))
        here = [t for t, origin in enumerate(origins) if origin is not None]
        if here:
            rows, there = (torch.tensor(x, device=device) for x in (here, [t for t in origins if t is not None]))
            numbers = none.index_copy(1, rows, old.index_select(1, there))
        self.numbers = torch.where(counts > 0, numbers, none)

    def to(self, device: torch.device) -> None:
        """Moves to where the parameters are."""
        self.numbers, self._none = self.numbers.to(device), self._none.to(device)

    def kept(self) -> list[Tensor]:
        """The tensors on the device that it keeps from step to step."""
        return [self.numbers, self._none]

    def take(
        self,
        hyper: Hyperparameters,
        steps: Tensor,
        scales: Tensor,
        moved: Tensor | None,
        counted: Tensor | None,
        *,
        released: bool,
        clamped_at: float,
    ) -> None:
        """Takes the update that was made, unless it is not ``counted``: docs/algorithm.md, section 5.

        Args:
            hyper: of the step.
            steps: float64 [T], of each tensor, this one included.
            scales: float64 [2, T], lr_scale and wd_scale of each tensor.
            moved: bool [T], which of them it moved; None for all.
            counted: 0-dim bool; None if it is.
            released: whether the decay is divided by the first bias correction.
            clamped_at: the smallest decay factor.
        """
        correction1, correction2 = 1 - hyper.beta1**steps, 1 - hyper.beta2**steps
        size = hyper.lr * scales[0]
        decay = size * scales[1] * hyper.weight_decay
        decay = decay / correction1 if released else decay
        kept = 1 - decay
        if clamped_at > 0:
            kept, decay = kept.clamp(min=clamped_at), torch.where(kept < clamped_at, 0.0, decay)
        rows = [self.numbers[0], correction1.reciprocal(), correction2.rsqrt(), hyper.eps, size, kept, decay]
        new = torch.stack(rows)
        if moved is not None:
            new = torch.where(moved, new, self._none)
        self.numbers.copy_(new if counted is None else torch.where(counted, new, self.numbers))


def log_derivatives(
    sums: Tensor,
    names: Sequence[str],
    last: LastUpdate,
    teaches: Tensor,
    factor: Tensor | None,
    gradient: str,
    trace: float,
    *,
    learns_decay: bool,
) -> Tensor:
    """What each tensor adds to the sums of its group, [T, C], of which :func:`of_groups` makes the derivatives.

    With u, d, a and p_t as in docs/algorithm.md, and h the moves, by which the new loss changes with ⟨g, h⟩: of ``loss`` the
    derivatives by log lr_scale, and by log wd_scale if it is learned, of ``cosine`` ⟨g, h⟩, ‖g‖² and ‖h‖².

    Args:
        sums: float64 [T, S], those that ``names`` says; ``grad_sq`` is of the multiplied gradient, with ``cosine``.
        last: the update that the sums were made with.
        teaches: bool [T], which tensors have a gradient and a last update.
        factor: float64 [T], of the gradient; None for 1.
        gradient, trace, learns_decay: see :class:`~metaadamw_fast.OnlineLearner`.
    """

    def of(name: str) -> Tensor:
        return sums[:, names.index(name)]

    size, kept, decay = last.numbers[4:].unbind()
    columns = []
    if gradient == "cosine":
        if trace:
            along, squared = of(GRAD_TRACE), of(TRACE_SQ)  # of trace·h: its length does not matter
        else:
            # h = p - p_t = -((1 - d)·p + a·u)/d
            lost, size = (1 - kept) / kept, size / kept
            along = -(lost * of(GRAD_PARAM) + size * of(GRAD_DIRECTION))
            squared = lost.square() * of("param_sq") + size.square() * of(DIRECTION_SQ) + 2 * lost * size * of(DIRECTION_PARAM)
        columns = [along if factor is None else along * factor, of("grad_sq"), squared]
    else:
        if learns_decay or not trace:
            moved = size * of(GRAD_DIRECTION)
            decayed = decay * (of(GRAD_PARAM) + moved) / kept  # (1 - d)·⟨g, p_t⟩
        columns = [of(GRAD_TRACE) / trace if trace else -(moved + decayed)]
        columns += [-decayed] if learns_decay else []
        columns = columns if factor is None else [x * factor for x in columns]
    return torch.where(teaches[:, None], torch.stack(columns, dim=1), 0.0)


def of_groups(of_tensors: Tensor, order: Tensor, lengths: Tensor, gradient: str) -> Tensor:
    """∂J/∂log lr_scale and ∂J/∂log wd_scale, float64 [2, G], of what :func:`log_derivatives` returned.

    ``order`` and ``lengths`` as of :class:`~metaadamw_fast.features.FeatureTable`: sums of groups have an order.
    """
    sums = torch.segment_reduce(of_tensors.index_select(0, order), "sum", lengths=lengths, axis=0, unsafe=True).t()
    if gradient == "cosine":
        norms = sums[1].sqrt() * sums[2].sqrt()
        sums = torch.where(norms == 0, 0.0, sums[0] / norms)[None]
    return sums if len(sums) == 2 else torch.nn.functional.pad(sums, (0, 0, 0, 1))
