"""The ops on fixed lists of tensors, of which only the gradients change from call to call.

An optimizer calls the same two ops on the same tensors in every step. A launch checks them all and writes down addresses, sizes
and strides once, in a table (csrc/table.h); from then on a step converts one list, the gradients, instead of nine.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import reference
from .checks import OpList, check_lists

Tensors = Sequence[Tensor]
OptionalTensors = Sequence[Tensor | None]
_ops = torch.ops.metaadamw_fast
_OTHER_TABLE = 2  # what launch_set_gradients returns if a gradient has another dtype or layout than the table was made for


class _Launch:
    """The lists of a launch.

    Args:
        grads: T gradients. None, or a tensor without elements where its momentum has some, is an absent one: it counts as zeros in
            the statistics, and the update leaves its row alone. They are not kept alive: the caller holds them until the ops ran.
        exp_avgs: T first moments.
        params, exp_avg_sqs: T tensors each; the update needs both.
        max_exp_avg_sqs: T running maxima (amsgrad); None, or a tensor without elements, leaves its tensor plain.
        written: whether the update will be called; then none of the tensors but the gradients may share memory.

    Elements are walked in the order of the parameters' memory, or of the first moments' if there are no parameters.

    Raises:
        RuntimeError: as the ops of the same names in :mod:`metaadamw_fast.ops`.
    """

    def __init__(
        self,
        grads: OptionalTensors,
        exp_avgs: Tensors,
        params: Tensors | None = None,
        exp_avg_sqs: Tensors | None = None,
        max_exp_avg_sqs: OptionalTensors | None = None,
        *,
        written: bool,
    ) -> None:
        self._absent = exp_avgs[0].new_empty(0) if len(exp_avgs) else torch.empty(0)
        self._exp_avgs, self._params, self._exp_avg_sqs = exp_avgs, params, exp_avg_sqs
        self._max_exp_avg_sqs = None if max_exp_avg_sqs is None else self._filled(max_exp_avg_sqs)
        self._written = written
        self.set_gradients(grads)

    def _filled(self, tensors: OptionalTensors) -> list[Tensor]:
        return [self._absent if x is None else x for x in tensors]

    def set_gradients(self, grads: OptionalTensors) -> None:
        """The gradients of the calls that follow, T of them.

        Raises:
            RuntimeError: a sparse gradient, or one of another shape or device; the launch is unchanged then.
        """
        raise NotImplementedError


class CppLaunch(_Launch):
    """The C++ ops. Its arguments and errors are those of every launch; see :class:`_Launch`."""

    _table: Tensor | None = None

    def set_gradients(self, grads: OptionalTensors) -> None:  # noqa: D102
        grads = self._filled(grads)
        if self._table is None or _ops.launch_set_gradients.default(self._table, grads) == _OTHER_TABLE:
            lists = (self._exp_avgs, self._params, self._exp_avg_sqs, self._max_exp_avg_sqs)
            self._table = _ops.launch_table.default(grads, *lists, self._written)

    def tensor_stats(self, params: bool, exp_avg_sqs: bool, count_nonzero: bool, dtype: torch.dtype) -> Tensor:
        """[T, S] as :func:`metaadamw_fast.ops.tensor_stats`; the columns of ``params``, ``exp_avg_sqs`` only if asked for."""
        statistics: Tensor = _ops.launch_tensor_stats.default(self._table, None, params, exp_avg_sqs, count_nonzero, dtype)
        return statistics

    def adamw_update_(self, *hyper: Tensor | None, new_sums: Tensor | None = None) -> None:
        """As :func:`metaadamw_fast.ops.adamw_update_`.

        Args:
            hyper: step_size, decay_factor, step, beta1, beta2, eps, grad_scale (or None): float64 [T] on the tensors' device.
            new_sums: [T, 2] float64, receives Σp², Σv² of what the update leaves, bit by bit what a later pass would sum; rows
                without a gradient keep theirs.
        """
        _ops.launch_adamw_update_.default(self._table, None, *hyper, new_sums)


class ReferenceLaunch(_Launch):
    """Plain eager PyTorch. Its arguments and errors are those of every launch; see :class:`_Launch`."""

    def set_gradients(self, grads: OptionalTensors) -> None:  # noqa: D102
        grads = self._filled(grads)
        check_lists(
            OpList("exp_avgs", self._exp_avgs, self._written),
            OpList("grads", grads, optional=True),
            OpList("params", self._params, self._written),
            OpList("exp_avg_sqs", self._exp_avg_sqs, self._written),
            OpList("max_exp_avg_sqs", self._max_exp_avg_sqs, self._written, optional=True),
        )
        # Without elements like its momentum, a gradient is there.
        self._present = [i for i, (g, m) in enumerate(zip(grads, self._exp_avgs, strict=True)) if g.numel() or not m.numel()]
        self._grads = grads

    def tensor_stats(self, params: bool, exp_avg_sqs: bool, count_nonzero: bool, dtype: torch.dtype) -> Tensor:
        """As :meth:`CppLaunch.tensor_stats`."""
        lists = (self._params if params else None, self._exp_avg_sqs if exp_avg_sqs else None)
        return reference.tensor_stats(self._grads, self._exp_avgs, *lists, count_nonzero, dtype)

    def adamw_update_(self, *hyper: Tensor | None, new_sums: Tensor | None = None) -> None:
        """As :meth:`CppLaunch.adamw_update_`."""
        rows = torch.tensor(self._present, dtype=torch.long, device=self._absent.device)
        lists: list[Any] = [self._params, self._grads, self._exp_avgs, self._exp_avg_sqs, self._max_exp_avg_sqs]
        numbers: list[Any] = [None if x is None else x[rows] for x in (*hyper, new_sums)]
        selected: list[Any] = [xs and [xs[i] for i in self._present] for xs in lists]
        reference.adamw_update_(*selected, *numbers)
        if new_sums is not None:
            new_sums[rows] = numbers[-1]
