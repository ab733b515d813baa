"""The ops on fixed lists of tensors, of which only the gradients change from call to call.

An optimizer calls the same two ops on the same tensors in every step. A launch makes all checks and writes down all addresses, sizes
and strides once, in a table (csrc/table.h); after that a call costs the same whatever the number of tensors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import reference
from .checks import check_lists, OpList

Tensors = Sequence[Tensor]
OptionalTensors = Sequence[Tensor | None]
_ops = torch.ops.metaadamw_fast


class CppLaunch:
    """The C++ ops.

    Args:
        grads: T gradients. None, or a tensor without elements where its momentum has some, is an absent one: it counts as zeros in the
            statistics, and the update leaves its row alone.
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
        exp_avgs = list(exp_avgs)
        self._absent = exp_avgs[0].new_empty(0) if exp_avgs else torch.empty(0)
        self._lists = [exp_avgs, params and list(params), exp_avg_sqs and list(exp_avg_sqs), max_exp_avg_sqs and self._filled(max_exp_avg_sqs)]
        self._written = written
        self._grads = self._filled(grads)
        self._table = _ops.launch_table.default(self._grads, *self._lists, written)

    def _filled(self, tensors):
        absent = self._absent
        return [absent if x is None else x for x in tensors]

    def set_gradients(self, grads: OptionalTensors) -> None:
        grads = self._filled(grads)
        outcome = _ops.launch_set_gradients.default(self._table, grads)
        if outcome == 2:
            self._table = _ops.launch_table.default(grads, *self._lists, self._written)
        self._grads = grads

    def tensor_stats(self, params, exp_avg_sqs, count_nonzero, dtype):
        return _ops.launch_tensor_stats.default(self._table, None, params, exp_avg_sqs, count_nonzero, dtype)

    def adamw_update_(self, step_size, decay_factor, step, beta1, beta2, eps, grad_scale=None, new_sums=None):
        _ops.launch_adamw_update_.default(self._table, None, step_size, decay_factor, step, beta1, beta2, eps, grad_scale, new_sums)
