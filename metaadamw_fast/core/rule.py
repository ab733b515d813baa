"""What the machinery must know of an optimizer's formula, and what passes between the two in a step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .hyperparameters import Hyperparameters

PARAM = "param"  # the parameter among the operands of a rule


class State(NamedTuple):
    """A tensor of a parameter's shape, kept from step to step; zeros at the start, unless it is ``of_param``.

    Attributes:
        name: its key in ``optimizer.state[p]``.
        flag: the key of ``param_groups`` that asks for it; None if every parameter has it.
        wide: whether it is at least float32, whatever the parameter and ``state_dtype`` are.
        of_gradient: whether it keeps gradients, and so has the parameter's dtype, whatever ``state_dtype`` is.
        square: whether it is of squares. Another optimizer may use the sign, which a checkpoint's numbers leave behind here.
        of_param: whether it starts as the parameter, or its master, has the parameter's dtype and may be missing in a checkpoint.
    """

    name: str
    flag: str | None = None
    wide: bool = False
    of_gradient: bool = False
    square: bool = False
    of_param: bool = False


class Rule(NamedTuple):
    """The operands, vectors and sums of an optimizer.

    Attributes:
        name: names its ops.
        states: what is kept of a parameter. The first has no flag.
        operands: of its ops, behind the gradient and in their order: states by name, ``PARAM``, None for one that is not used.
        vectors: the rows of the float64 [V, T] that an update reads.
        sums: the columns of the sums [T, S], and the degree d of each: that of the gradient c·g is c^d times that of g. Column 0 is
            Σg².
        carried: neighbouring columns that an update can leave for the next step, and the operand of which each is Σx².
        found: how many columns, from the first on, an update can make of what it finds, at most.
        exchanged: two states that change their roles, and so their names, with every update of a parameter.
        remembers: whether the optimizer remembers its last update of each parameter, so that it has to know which of them, or whose
            states, others have written since.
    """

    name: str
    states: tuple[State, ...]
    operands: tuple[str | None, ...]
    vectors: tuple[str, ...]
    sums: dict[str, int]
    carried: dict[str, str]
    found: int = 0
    exchanged: tuple[str, str] | None = None
    remembers: bool = False

    @property
    def always(self) -> tuple[str, ...]:
        """The states without which that of a parameter is not whole."""
        return tuple(state.name for state in self.states if state.flag is None and not state.of_param)

    @property
    def names(self) -> tuple[str, ...]:
        """All states."""
        return tuple(state.name for state in self.states)

    @property
    def flags(self) -> tuple[str, ...]:
        """The keys of ``param_groups`` that ask for a state."""
        return tuple(state.flag for state in self.states if state.flag is not None)


class Step(NamedTuple):
    """What a step is made of, besides its sums.

    Attributes:
        hyper: float64 [T] each.
        grad_factor: what the update multiplies the gradients with, float64 [T]; None for 1.
        counts: float64 [T + 1], the steps so far, of each parameter and of the optimizer.
        counted: 0-dim bool, whether this step counts; None if it does.
        loss_scale: what GradScaler has multiplied the loss with, 0-dim float32; None without one.
        present: float64 [T], 1 for parameters that have a gradient, else 0; None if all have.
        turns: float64 [T], how often the rule's ``exchanged`` states have changed their roles since the launch was made; None if
            the rule has none.
    """

    hyper: Hyperparameters
    grad_factor: Tensor | None
    counts: Tensor
    counted: Tensor | None
    loss_scale: Tensor | None = None
    present: Tensor | None = None
    turns: Tensor | None = None


class Decision(NamedTuple):
    """What an optimizer makes of a step.

    Attributes:
        vectors: float64 [V, T], the rule's.
        shown: attributes of the optimizer that get these values, unless the step does not count.
    """

    vectors: Tensor
    shown: dict[str, Tensor]


def of_multiplied_gradient(sums: Tensor, factor: Tensor | None, degrees: Sequence[int]) -> Tensor:
    """Sums [T, S] of gradients that are multiplied with ``factor`` [T]; ``degrees`` are those of the columns: see :class:`Rule`.

    Clipping multiplies with 0 where Σg² overflows. The product of finite gradients is then 0 and has no infinite Σ(cg)²: whether
    they are finite shows in the sums of degree 1, since infinity and NaN times anything are not.
    """
    if factor is None:
        return sums
    sums = sums.clone()
    linear = [sums[:, column] for column, degree in enumerate(degrees) if degree == 1]
    for x in linear:
        x *= factor
    for column, degree in enumerate(degrees):
        if degree == 2:
            x = sums[:, column]
            squared = factor.square() * x
            x.copy_(torch.where(factor == 0, linear[0], squared) if linear else squared)
    return sums
