"""The multi-tensor ops on a launch table that is kept, and on lists that come once."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from . import policy
from .adamw_update import adamw_update_
from .elements import INTERPRETED
from .table import LaunchTable, MaybeTensors
from .tensor_stats import tensor_stats

Tensors = Iterable[Tensor]


class TritonLaunch(LaunchTable):
    """A `LaunchTable` with the ops as methods, one launch each whatever T is."""

    tensor_stats = tensor_stats
    adamw_update_ = adamw_update_


class TritonBackend:
    """The ops around the encoder, and those on elements with lists instead of a launch.

    For lists a table is built at each call, which costs the host more than the kernels take on small models.
    """

    name = "triton"
    launch = TritonLaunch
    group_features = staticmethod(policy.group_features)
    scaled_gradients = staticmethod(policy.scaled_gradients)
    modulation = staticmethod(policy.modulation)
    update_vectors = staticmethod(policy.update_vectors)

    @staticmethod
    def tensor_stats(
        grads: Tensors,
        exp_avgs: Tensors,
        params: Tensors | None,
        exp_avg_sqs: Tensors | None,
        count_nonzero: bool,
        dtype: torch.dtype,
    ) -> Tensor:
        """Sums per tensor, [T, S]; see `kernels.tensor_stats`."""
        _refuse_capture()
        launch = TritonLaunch(grads, exp_avgs, params, exp_avg_sqs, written=False)
        return launch.tensor_stats(params is not None, exp_avg_sqs is not None, count_nonzero, dtype)

    @staticmethod
    def adamw_update_(
        params: Tensors,
        grads: Tensors,
        exp_avgs: Tensors,
        exp_avg_sqs: Tensors,
        max_exp_avg_sqs: Tensors | None,
        step_size: Tensor,
        decay_factor: Tensor,
        step: Tensor,
        beta1: Tensor,
        beta2: Tensor,
        eps: Tensor,
        grad_scale: Tensor | None,
        new_sums: Tensor | None = None,
        rounding_seed: int | None = None,
        low_precision_params: MaybeTensors | None = None,
    ) -> None:
        """The update, in place, with hyper-parameters [T] each; see `kernels.adamw_update`."""
        _refuse_capture()
        launch = TritonLaunch(grads, exp_avgs, params, exp_avg_sqs, max_exp_avg_sqs, low_precision_params, written=True)
        vectors = policy.update_vectors(step_size, decay_factor, step, beta1, beta2, eps, grad_scale)
        launch.adamw_update_(vectors, new_sums, rounding_seed)

    @staticmethod
    def unavailable(device: torch.device) -> str | None:
        """Why the kernels cannot run on ``device``; None if they can."""
        if device.type == "cuda" and not INTERPRETED.value:
            return None
        if device.type == "cpu":
            return None if INTERPRETED.value else "Triton needs a GPU (for tests, TRITON_INTERPRET=1 interprets it on the CPU)"
        return "Triton interprets on the CPU only" if INTERPRETED.value else f"these Triton kernels do not run on {device.type}"


def _refuse_capture() -> None:
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("a table that lives for one call cannot be captured in a CUDA graph: keep a TritonLaunch instead")
