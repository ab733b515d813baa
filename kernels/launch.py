"""The multi-tensor ops on a launch table that is kept, and on lists that come once."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from metaadamw_fast.launch import statistics_columns

from . import mada_policy, policy
from .elements import INTERPRETED, WARPS
from .engine import measure_constants, measure_kernel, update_constants, update_kernel, update_options
from .table import LaunchTable, MaybeTensors

Tensors = Iterable[Tensor]


class TritonLaunch(LaunchTable):
    """A `LaunchTable` with the ops as methods, one launch each whatever T is."""

    def tensor_stats(
        self, params: bool, exp_avg_sqs: bool, count_nonzero: bool, dtype: torch.dtype, carried: Tensor | None = None
    ) -> Tensor:
        """Sums per tensor, [T, S]: Σg², Σg·m, Σm², then Σp², Σv² and the non-zeros of g and m where asked for.

        Args:
            params, exp_avg_sqs: compute their column, and read them.
            count_nonzero: append the two counts.
            dtype: of the result, float32 or float64.
            carried: float64 [T, 2], the columns Σp² and Σv² where neither is to be read.

        A lane adds at most CHUNK / BLOCK products in the type of the arithmetic. Everything after that is float64, in a fixed
        order.

        Raises:
            RuntimeError: another dtype, or a column of a list that the launch does not have.
        """
        return self.measure(statistics_columns(params, exp_avg_sqs, count_nonzero), dtype, carried)

    def measure(self, columns: int, dtype: torch.dtype, carried: Tensor | None = None, vectors: Tensor | None = None) -> Tensor:
        """Sums [T, S] of the rule: those that ``columns`` has a bit for.

        Args:
            columns: bit i asks for sum i of the rule.
            dtype: of the result, float32 or float64.
            carried: float64 [T, C], the columns that an update leaves, where none of them is asked for.
            vectors: float64 [H, T], what the sums behind the first, ``rule.plain``, need of the update before.

        Raises:
            RuntimeError: as :meth:`tensor_stats`; vectors that are missing or of another dtype, shape, layout or device.
        """
        rule = self.rule
        if dtype not in (torch.float32, torch.float64):
            raise RuntimeError(f"the statistics are float32 or float64, not {dtype}")
        wanted = tuple(i for i in range(len(rule.sum_operands)) if columns >> i & 1)
        if any(not self.has(k) and k not in rule.zeros for i in wanted for k in rule.sum_operands[i]):
            raise RuntimeError("the launch was made without the lists of these columns")
        if not rule.measured or all(i < rule.plain for i in wanted):
            vectors = None
        elif vectors is None:
            raise RuntimeError("these columns need the vectors of the last update")
        self.check_vector("vectors", vectors, (rule.measured, self.tensors))
        out = torch.empty(self.tensors, len(wanted), dtype=dtype, device=self.device)
        if self.tensors:
            with self.device_guard():
                measure_kernel[(self.chunks,)](
                    self.table, self.tensors, self.chunks, self.partials, self.tickets, out, vectors,
                    **measure_constants(rule, wanted, self.kinds), num_warps=WARPS, enable_fp_fusion=False,
                )  # fmt: skip
        if carried is None:
            return out
        before = sum(i < rule.left[0] for i in wanted)
        return torch.cat([out[:, :before], carried.to(dtype), out[:, before:]], dim=1)

    def update_(self, vectors: Tensor, new_sums: Tensor | None = None, rounding_seed: int | None = None) -> None:
        """The rule's update in place; rows without a gradient, or whose step is 0, stay as they are.

        Args:
            vectors: contiguous float64 [V, T] on the tensors' device, made by `kernels.policy` or `kernels.mada_policy`.
            new_sums: contiguous float64 on the tensors' device, or None. [T, 2], of AdamW only, receives Σp², Σv² as stored, in the
                bits of a later pass of `measure`; rows that stay as they are keep what it holds. With a column for each of the
                first sums of the rule, [T, 5] of AdamW and [T, 7] of MADA, it receives of every row what `measure` would find
                before the update.
            rounding_seed: of stochastic rounding; None rounds to the nearest.

        Raises:
            RuntimeError: vectors or new_sums of another dtype, shape, layout or device; a launch that is not to be written.
        """
        if not self.written:
            raise RuntimeError("the launch was not made for updates: written=False")
        rule = self.rule
        self.check_vector("vectors", vectors, (rule.vectors, self.tensors))
        sums = new_sums.shape[-1] if new_sums is not None and new_sums.dim() else 0
        found = sums in rule.found
        width = sums if found else max(rule.found, default=0) if sums > len(rule.left) else len(rule.left)
        self.check_vector("new_sums", new_sums, (self.tensors, width))
        if self.tensors:
            with self.device_guard():
                update_kernel[(self.chunks,)](
                    self.table, self.tensors, self.chunks, self.partials, self.tickets, new_sums, vectors, rounding_seed,
                    **update_constants(rule, sums, self.kinds), enable_fp_fusion=False,
                    **update_options(rule, self.kinds, found, rounding_seed is not None),
                )  # fmt: skip


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
    mada_policy_ = staticmethod(mada_policy.mada_policy_)

    @staticmethod
    def tensor_stats(
        grads: Tensors,
        exp_avgs: Tensors,
        params: Tensors | None,
        exp_avg_sqs: Tensors | None,
        count_nonzero: bool,
        dtype: torch.dtype,
    ) -> Tensor:
        """Sums per tensor, [T, S]; see `TritonLaunch.tensor_stats`."""
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
        """The update, in place, with hyper-parameters [T] each; see `TritonLaunch.update_`."""
        _refuse_capture()
        launch = TritonLaunch(grads, exp_avgs, params, exp_avg_sqs, max_exp_avg_sqs, low_precision_params, written=True)
        vectors = policy.update_vectors(step_size, decay_factor, step, beta1, beta2, eps, grad_scale)
        launch.update_(vectors, new_sums, rounding_seed)

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
