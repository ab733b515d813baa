"""The states of an optimizer as the lists that the ops take, cached from step to step."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .grouping import Member


class Rows(NamedTuple):
    """Lists over the tensors that one call updates. ``positions`` is None for all T, else where they stand."""

    positions: Tensor | None
    params: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    max_exp_avg_sqs: list[Tensor] | None


class StateLists:
    """Allocates the states that are missing and lists them all.

    Args:
        members: the T parameters.
        state: ``optimizer.state``, completed in place. Every ``state[p]["step"]`` becomes a view of one [T] tensor, so that one
            operation counts all of them and checkpoints still see torch's 0-dim steps.
        param_groups: ``optimizer.param_groups``.
        device: of the parameters.
    """

    def __init__(
        self,
        members: Sequence[Member],
        state: MutableMapping[Tensor, Any],
        param_groups: Sequence[Mapping[str, Any]],
        device: torch.device,
    ) -> None:
        params = [m.param for m in members]
        steps = [float(state[p]["step"]) if state.get(p) else 0.0 for p in params]
        capturable = any(group["capturable"] for group in param_groups)
        self.device = device
        self.steps = torch.tensor(steps, dtype=torch.float32, device=device if capturable else None)
        for p, member, step in zip(params, members, self.steps.unbind(), strict=True):
            names = ["exp_avg", "exp_avg_sq"] + ["max_exp_avg_sq"] * bool(param_groups[member.param_group]["amsgrad"])
            for name in names:
                if name not in state[p] or state[p][name].is_meta:
                    state[p][name] = torch.zeros_like(p, memory_format=torch.preserve_format)
                state[p][name] = state[p][name].to(device)
            state[p]["step"] = step
        # An entry without elements says that its tensor has no such operand.
        self._absent = torch.empty(0, device=device)
        self._states = [state[p] for p in params]
        self.all = self._select(params, None)
        self._some: tuple[list[int], Rows] | None = None
        self._carried: tuple[list[int], Tensor] | None = None

    def _select(self, params: list[Tensor], positions: list[int] | None) -> Rows:
        states = self._states if positions is None else [self._states[i] for i in positions]
        maxima = [s.get("max_exp_avg_sq", self._absent) for s in states]
        return Rows(
            None if positions is None else torch.tensor(positions, dtype=torch.long, device=self.device),
            params,
            [s["exp_avg"] for s in states],
            [s["exp_avg_sq"] for s in states],
            maxima if any(x is not self._absent for x in maxima) else None,
        )

    def with_gradients(self, grads: Sequence[Tensor | None]) -> tuple[Rows, list[Tensor]]:
        """The lists of the tensors that have a gradient, and their gradients."""
        present = [g for g in grads if g is not None]
        if len(present) == len(grads):
            return self.all, present
        positions = [i for i, g in enumerate(grads) if g is not None]
        if self._some is None or self._some[0] != positions:
            self._some = (positions, self._select([self.all.params[i] for i in positions], positions))
        return self._some[1], present

    def or_absent(self, grads: Sequence[Tensor | None]) -> list[Tensor]:
        """The gradients with a tensor without elements for each that is missing."""
        return [self._absent if g is None else g for g in grads]

    def new_sums(self) -> Tensor:
        """Where an update of all T tensors writes Σp², Σv² of what it leaves: [T, 2] float64."""
        return torch.empty(len(self._states), 2, dtype=torch.float64, device=self.device)

    def carry(self, sums: Tensor | None) -> None:
        """Keeps these sums for the next step's statistics; None forgets them."""
        self._carried = None if sums is None else (self._fingerprint(), sums)

    def carried(self) -> Tensor | None:
        """The sums kept, if parameters and second moments are still what the update left, as far as torch can tell."""
        if self._carried is None or self._carried[0] != self._fingerprint():
            return None
        return self._carried[1]

    def _fingerprint(self) -> list[int]:
        """Versions and addresses: in-place operations change the one, assignments to ``.data`` the other."""
        tensors = self.all.params + self.all.exp_avg_sqs
        return [x._version for x in tensors] + [x.data_ptr() for x in tensors]

    def next_steps(self, positions: Tensor | None) -> Tensor:
        """Step counts of the step that comes now, [T'] float64, at these positions; nothing is counted yet."""
        steps = self.steps.to(self.device, torch.float64)
        return (steps if positions is None else steps.index_select(0, positions)) + 1

    def count_step(self, positions: Tensor | None) -> None:
        """Counts a step of the tensors at these positions."""
        if positions is None:
            self.steps += 1
        else:
            self.steps[positions.to(self.steps.device)] += 1
