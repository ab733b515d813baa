"""The ops on fixed lists of tensors, of which only the gradients change from call to call.

An optimizer calls the same two ops on the same tensors in every step. A launch makes all checks and, in C++, writes down all
addresses, sizes and strides once, in a table (csrc/table.h); after that a call costs little more than its arithmetic.

Both classes take the same arguments:

    grads: T gradients. None, or a tensor without elements where its momentum has some, is an absent one: it counts as zeros in the
        statistics, and the update leaves its row alone. Whoever calls holds them until the ops have been called: if a launch
        did, they would outlive `zero_grad` by a whole backward pass.
    exp_avgs: T first moments.
    params, exp_avg_sqs: T tensors each; the update needs both.
    max_exp_avg_sqs: T running maxima (amsgrad); None, or a tensor without elements, leaves its tensor plain.
    written: whether the update will be called; then no tensors but the gradients may share memory.

Elements are walked in the order of the parameters' memory, or of the first moments' without parameters. Errors are those of the ops
of the same names in :mod:`metaadamw_fast.ops`; nothing has changed then.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import reference
from .checks import OpList, check_distinct, check_lists

Tensors = Iterable[Tensor]
OptionalTensors = Iterable[Tensor | None]

_SAME, _OTHER_ADDRESSES, _OTHER_TABLE, _NEGATIVES = range(4)  # what launch_set_gradients returns; csrc/ops.cpp


def _listed(tensors: Tensors | None) -> list[Tensor] | None:
    return None if tensors is None else list(tensors)


def _filled(tensors: OptionalTensors, absent: Tensor) -> list[Tensor]:
    return [absent if x is None else x for x in tensors]


def resolved(grads: Sequence[Tensor | None]) -> tuple[list[Tensor | None], list[Tensor]]:
    """Gradients without negative views of their memory, which autograd may return of complex functions.

    Returns:
        All of them, and the copies among them, which nobody else holds.
    """
    out = [x.resolve_neg() if x is not None and x.is_neg() else x for x in grads]
    return out, [y for x, y in zip(grads, out, strict=True) if y is not None and y is not x]


class DeviceCopy:
    """A GPU's copy of a launch table, brought up to date when it has to be.

    Nothing waits for the GPU: the table goes through pinned memory, which is written once and then left alone, since the copy from
    it may be carried out at any later time. In a CUDA graph it is carried out at every replay. So a graph gets a copy of its own,
    which no upload outside of it touches, and this and the pinned memory are kept in ``in_graphs``.

    Args:
        table: int64, on the CPU (csrc/table.h).
        device: the GPU.
        in_graphs: what must live and stay as it is while graphs may be replayed; the launch has it to its end.
    """

    def __init__(self, table: Tensor, device: torch.device, in_graphs: list[tuple[Tensor, Tensor]]) -> None:
        copied_bytes, device_bytes = table[:2].tolist()
        self.is_stale = True  # the table has changed since it was copied
        self._table = table[: copied_bytes // 8]
        self._size, self._device, self._in_graphs = device_bytes // 8, device, in_graphs
        self._capture = 0  # in which the copy was made; 0 outside of any
        self._copy = torch.empty(self._size, dtype=torch.int64, device=device)
        # In stock, since not every torch can allocate pinned memory in the capture of a graph. Captures that follow without a step
        # outside of them need one that can.
        self._spare: Tensor | None = torch.empty_like(self._table, pin_memory=True)

    def current(self) -> Tensor:
        """The copy, int64 on the device: the table and, behind it, room for partial sums."""
        capture = 0
        if torch.cuda.is_current_stream_capturing():
            capture = torch.ops.metaadamw_fast.launch_capture.default(self._copy)
        if capture != self._capture:
            self._capture, self.is_stale = capture, True
            self._copy = torch.empty(self._size, dtype=torch.int64, device=self._device)
        if self.is_stale:
            pinned = self._spare if self._spare is not None else torch.empty_like(self._table, pin_memory=True)
            pinned.copy_(self._table)
            self._copy[: len(pinned)].copy_(pinned, non_blocking=True)
            if capture:
                self._in_graphs.append((pinned, self._copy))
                self._spare = None
            else:
                # torch gives freed pinned memory away again when the copies from it are done.
                self._spare = torch.empty_like(self._table, pin_memory=True)
            self.is_stale = False
        return self._copy


class CppLaunch:
    """The C++ ops on the CPU or a CUDA device; see the head of this file.

    A CUDA graph that captured its ops must not be replayed after its end. What is captured are the gradients of that time.
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
        exp_avgs = list(exp_avgs)
        self._absent = exp_avgs[0].new_empty(0) if exp_avgs else torch.empty(0, device="cpu")
        maxima = None if max_exp_avg_sqs is None else _filled(max_exp_avg_sqs, self._absent)
        self._lists = (exp_avgs, _listed(params), _listed(exp_avg_sqs), maxima)
        if any(x.is_neg() for xs in self._lists for x in xs or ()):
            raise RuntimeError("a tensor is a negative view of its memory: resolve_neg() makes it one of its own")
        self._written = written
        self._in_graphs: list[tuple[Tensor, Tensor]] = []
        whole, self._copies = resolved(list(grads))
        self._make_table(_filled(whole, self._absent))

    def _make_table(self, grads: list[Tensor]) -> None:
        self._table: Tensor = torch.ops.metaadamw_fast.launch_table.default(grads, *self._lists, self._written)
        on_gpu = self._absent.is_cuda
        self._device_copy = DeviceCopy(self._table, self._absent.device, self._in_graphs) if on_gpu else None

    def set_gradients(self, grads: OptionalTensors) -> None:
        """Takes T other gradients. Cheap if their dtypes and layouts are as before, whatever their addresses.

        Raises:
            RuntimeError: as the constructor; the launch then keeps the gradients that it had.
        """
        copies: list[Tensor] = []
        grads = _filled(grads, self._absent)
        outcome = torch.ops.metaadamw_fast.launch_set_gradients.default(self._table, grads)
        if outcome == _NEGATIVES:
            whole, copies = resolved(grads)
            grads = _filled(whole, self._absent)
            outcome = torch.ops.metaadamw_fast.launch_set_gradients.default(self._table, grads)
        if outcome == _OTHER_TABLE:
            self._make_table(grads)
        elif outcome == _OTHER_ADDRESSES and self._device_copy is not None:
            self._device_copy.is_stale = True
        self._copies = copies

    def _copy(self) -> Tensor | None:
        return None if self._device_copy is None else self._device_copy.current()

    def tensor_stats(
        self, params: bool, exp_avg_sqs: bool, count_nonzero: bool, dtype: torch.dtype, carried: Tensor | None = None
    ) -> Tensor:
        """Sums [T, S], as :func:`metaadamw_fast.ops.tensor_stats`; columns that are not asked for are not read.

        ``carried``, float64 [T, 2], are the columns Σp² and Σv² of a call that asks for neither.
        """
        op = torch.ops.metaadamw_fast.launch_tensor_stats.default
        statistics: Tensor = op(self._table, self._copy(), params, exp_avg_sqs, count_nonzero, dtype, carried)
        return statistics

    def adamw_update_(
        self,
        step_size: Tensor,
        decay_factor: Tensor,
        step: Tensor,
        beta1: Tensor,
        beta2: Tensor,
        eps: Tensor,
        grad_scale: Tensor | None = None,
        new_sums: Tensor | None = None,
        rounding_seed: int | None = None,
    ) -> None:
        """Updates in place; float64 [T] each, absent rows counted. See :func:`metaadamw_fast.ops.adamw_update_`.

        ``new_sums``, float64 [T, 2], gets Σp² and Σv² of what the update leaves, in the bits that ``tensor_stats(True, True, ...)``
        would find now; [T, 5] before them Σg², Σg·m, Σm² of what the update found, in the bits of a pass before it. Rows without a
        gradient, or whose step is 0, keep what it holds.
        """
        hyperparameters = (step_size, decay_factor, step, beta1, beta2, eps, grad_scale)
        torch.ops.metaadamw_fast.launch_adamw_update_.default(self._table, self._copy(), *hyperparameters, new_sums, rounding_seed)


class ReferenceLaunch:
    """Plain eager PyTorch; see the head of this file."""

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
        self._exp_avgs, self._params, self._exp_avg_sqs = list(exp_avgs), _listed(params), _listed(exp_avg_sqs)
        self._absent = self._exp_avgs[0].new_empty(0) if self._exp_avgs else torch.empty(0, device="cpu")
        self._maxima = None if max_exp_avg_sqs is None else _filled(max_exp_avg_sqs, self._absent)
        self._written = written
        if written and (self._params is None or self._exp_avg_sqs is None):
            raise RuntimeError("the update needs params and exp_avg_sqs")
        self.set_gradients(grads)

    def set_gradients(self, grads: OptionalTensors) -> None:
        """Takes T other gradients.

        Raises:
            RuntimeError: as the constructor; the launch then keeps the gradients that it had.
        """
        grads = _filled(grads, self._absent)
        leaders = [OpList("params", self._params, self._written), OpList("exp_avgs", self._exp_avgs, self._written)]
        others = (
            OpList("exp_avg_sqs", self._exp_avg_sqs, self._written),
            OpList("max_exp_avg_sqs", self._maxima, self._written, optional=True),
        )
        lists = (*leaders[self._params is None :], OpList("grads", grads, optional=True), *others)
        check_lists(*lists)
        check_distinct(*lists)
        self._grads = grads

    def tensor_stats(
        self, params: bool, exp_avg_sqs: bool, count_nonzero: bool, dtype: torch.dtype, carried: Tensor | None = None
    ) -> Tensor:
        """As :meth:`CppLaunch.tensor_stats`."""
        if (params and self._params is None) or (exp_avg_sqs and self._exp_avg_sqs is None):
            raise RuntimeError("the launch was made without the lists of these columns")
        chosen = (self._params if params else None, self._exp_avg_sqs if exp_avg_sqs else None)
        lists = (self._grads, self._exp_avgs, self._params, self._exp_avg_sqs)
        rows = zip(*(x for x in lists if x is not None), strict=True)
        arithmetic = [reference.arithmetic_dtype(*row) for row in rows]  # also of the columns that are not read now
        read = reference.tensor_stats(self._grads, self._exp_avgs, *chosen, count_nonzero, dtype, arithmetic)
        return reference.beside(read, carried)

    def adamw_update_(
        self,
        step_size: Tensor,
        decay_factor: Tensor,
        step: Tensor,
        beta1: Tensor,
        beta2: Tensor,
        eps: Tensor,
        grad_scale: Tensor | None = None,
        new_sums: Tensor | None = None,
        rounding_seed: int | None = None,
    ) -> None:
        """As :meth:`CppLaunch.adamw_update_`."""
        if not self._written or self._params is None or self._exp_avg_sqs is None:
            raise RuntimeError("the launch was not made for updates: written=False")
        lists = (self._params, self._grads, self._exp_avgs, self._exp_avg_sqs, self._maxima)
        reference.adamw_update_(*lists, step_size, decay_factor, step, beta1, beta2, eps, grad_scale, new_sums, rounding_seed)


class FakeLaunch:
    """Allocates what the ops return and does nothing else: for tensors without elements, under FakeTensorMode."""

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
        exp_avgs = list(exp_avgs)
        self._rows, self._device = len(exp_avgs), exp_avgs[0].device

    def set_gradients(self, grads: OptionalTensors) -> None:
        """As :meth:`CppLaunch.set_gradients`."""

    def tensor_stats(
        self, params: bool, exp_avg_sqs: bool, count_nonzero: bool, dtype: torch.dtype, carried: Tensor | None = None
    ) -> Tensor:
        """As :meth:`CppLaunch.tensor_stats`."""
        width = 3 + (2 if carried is not None else params + exp_avg_sqs) + 2 * count_nonzero
        return torch.empty(self._rows, width, dtype=dtype, device=self._device)

    def adamw_update_(self, *hyperparameters: Tensor | None, new_sums: Tensor | None = None, **others: Any) -> None:
        """As :meth:`CppLaunch.adamw_update_`."""
