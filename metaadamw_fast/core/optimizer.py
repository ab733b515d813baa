"""FusedOptimizer: a torch optimizer around one launch that sums and one that updates. No formula of an optimizer is in here.

Longer than 300 lines, a third of them documentation: one class from its step to its checkpoints.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from metaadamw_fast.ops import FakeBackend
from metaadamw_fast.reference import gradient_factor

from . import checkpoint, devices, gradients
from .members import repeats
from .rule import Decision, Step, of_multiplied_gradient
from .states import States
from .tracking import Moved, TrackingOptimizer


class FusedOptimizer(TrackingOptimizer):
    """All that an optimizer needs besides its formula; ``decide`` is the one method that a subclass must have.

    A subclass names its ``rule``. Its constructor calls this one, then makes its own parts, which may depend on how many parameters
    there are and on their device, then calls ``_cache``.

    Args:
        max_grad_norm, skip_nonfinite: see :class:`~metaadamw_fast.MetaAdamW`.
        rounding_seed: of stochastic rounding; None rounds to nearest.
        params, defaults, differentiable, state_dtype, master_weights, backend, allocate: see
            :class:`~metaadamw_fast.core.tracking.TrackingOptimizer`.
    """

    checkpoint_key: ClassVar[str]  # of what a checkpoint holds besides torch's ``state`` and ``param_groups``
    _step_supports_amp_scaling = True  # torch.amp.GradScaler leaves unscaling and skipping to the step

    def __init__(
        self,
        params: Any,
        defaults: dict[str, Any],
        *,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
        rounding_seed: int | None = None,
        differentiable: bool = False,
        state_dtype: torch.dtype | None = None,
        master_weights: bool = False,
        backend: str = "auto",
        allocate: str = "eager",
    ) -> None:
        if max_grad_norm is not None and not max_grad_norm > 0.0:
            raise ValueError(f"Invalid max_grad_norm: {max_grad_norm}")
        self.max_grad_norm = max_grad_norm
        self._skipped = torch.zeros((), dtype=torch.float32, device="cpu") if skip_nonfinite else None
        self._rounding_seed = rounding_seed
        self._statistics: Tensor
        self._grad_norm: Tensor | None = None
        # How often `step` was called, and how often the count of steps was set, and to what: known without a wait for the device.
        self.step_calls, self.count_set = 0, (0, 0)
        self._stream: torch.Stream | None = None  # of the last step
        super().__init__(
            params,
            defaults,
            differentiable=differentiable,
            state_dtype=state_dtype,
            master_weights=master_weights,
            backend=backend,
            allocate=allocate,
        )

    # ----------------------------------------------------------------------------------------------- what a subclass says

    @abstractmethod
    def decide(self, sums: Tensor | None, step: Step) -> Decision:
        """What this step makes of the sums [T, S] of its gradients and states, which may be None if :meth:`needs_sums` is false."""

    def needs_sums(self) -> bool:
        """Whether :meth:`decide` needs the sums of this step. If not, the update itself may make them, in the same launch."""
        return True

    def wants_sums(self) -> bool:
        """Whether the sums of this step are wanted at all, be it after the update."""
        return self.rule.found > 0

    def measured(self) -> Sequence[str]:
        """The sums, of the rule's and in its order, that this step makes: before its update, or the first ones in it."""
        return [*self.rule.sums]

    def statistics_columns(self) -> int:
        """How many sums are shown."""
        return len(self.rule.sums)

    def statistics_of(self, sums: Tensor) -> Tensor:
        """The sums that are shown, of those that a step has made."""
        return sums

    def updated(self, sums: Tensor | None, step: Step, decision: Decision) -> None:
        """Called after the update, with the sums that the step has made, be it in the update, and before anything is shown."""

    def measured_with(self) -> Tensor | None:
        """What the rule's sums need besides gradients and states: float64 [H, T], of the last update."""
        return None

    def sums_dtype(self) -> torch.dtype:
        """Of the sums that :meth:`decide` gets."""
        return torch.float32

    def saved(self) -> dict[str, Any]:
        """What a checkpoint holds of a subclass: tensors that nobody else holds, numbers, lists and dicts only."""
        return {}

    def saved_groups(self) -> list[dict[str, Any]]:
        """``param_groups`` as a checkpoint shows them, parameters included."""
        return self.param_groups

    def check_saved(self, extra: dict[str, Any], state_dict: dict[str, Any]) -> None:
        """Raises ValueError if ``extra``, of a checkpoint, is not what :meth:`saved` returns; nothing changes."""

    def restore(self, extra: dict[str, Any] | None, state_dict: dict[str, Any]) -> None:
        """Takes over what :meth:`saved` returned, of a checkpoint that was checked; None if it is another optimizer's."""

    def converted(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """A checkpoint that is to be loaded, with states that another optimizer does not have; ``state_dict`` stays as it is."""
        return state_dict

    def hint(self, state_dict: Any) -> str:
        """What may be behind states that do not fit, as a sentence for the error; empty if nothing is known."""
        return ""

    # ------------------------------------------------------------------------------------------------------------ the step

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One optimization step.

        Args:
            closure: re-evaluates the model and returns the loss.

        Returns:
            The closure's loss, or None.

        Raises:
            RuntimeError: a sparse gradient, or tensors that changed shape or device; in the capture of a CUDA graph also one that
                no replay would do right; a param group that is to be differentiable. Nothing has changed then.
            ValueError: a param group was given fewer or more than two betas; a parameter that no backend can update has a gradient;
                ``param_groups`` list one twice. Nothing has changed then.
        """
        # torch.compile breaks its graph here: the launch table's addresses mean nothing to what it traces.
        return self._step_untraced(closure) if torch.compiler.is_compiling() else self._step(closure)

    @devices.outside_inference_mode
    @torch.no_grad()
    def _step(self, closure: Callable[[], Any] | None) -> Any:
        self.step_calls += 1
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not any(group["params"] for group in self.param_groups):
            return loss
        should_step = gradients.should_step(self)
        if should_step is False:
            return loss
        if devices.capturing(self._counts.device):
            self._check_capture()
        states = self._current_states()
        try:
            self._update(states, should_step)
        finally:
            states.let_go()
        return loss

    _step_untraced = torch._disable_dynamo(_step)  # type: ignore[attr-defined]

    def _update(self, states: States, should_step: Tensor | bool) -> None:
        """A step of all parameters that have a gradient."""
        self._record_stream()
        hyper = self._hyperparameters.update(self.param_groups)
        states.counts.take_writes()
        if not states.rows:
            states.count(should_step)
            return
        scaler_scale = gradients.scaler_scale(self, self._counts.device)
        states.set_gradients(states.gradients())
        self._forget(states.written())
        states.sync_masters()
        degrees = [self.rule.sums[name] for name in self.measured()]
        sums: Tensor | None = None
        of_rows: Tensor | None = None
        norm: Tensor | None = None
        if not self._measures():
            factor = gradient_factor(len(self._members), hyper.sign, scaler_scale)[0]
        else:
            of_rows, sums = self._measure(states)
            if self._skipped is not None:
                should_step = gradients.skip_nonfinite(should_step, sums, self._skipped)
                if should_step is False:
                    return
            factor, norm, sums = gradients.scale(self._backend, sums, hyper.sign, scaler_scale, self.max_grad_norm, degrees)
        counted = should_step if isinstance(should_step, Tensor) else None
        turns = None if states.turns is None else states.turns[:-1]
        step = Step(hyper, factor, self._counts, counted, scaler_scale, states.present, turns)
        decision = self.decide(sums, step)
        if self.wants_sums() and not self.needs_sums():  # beside Σg², which clipping and skipping may have needed before
            sums = states.update_and_measure(decision.vectors, len(degrees), should_step, self._rounding_seed)
            sums = self._rank_sums(states.whole(sums)).to(self.sums_dtype())
            sums = of_multiplied_gradient(sums, factor, degrees)
        else:
            states.update(decision.vectors, of_rows, should_step, self._rounding_seed)
        if any(group["capturable"] for group in self.param_groups):
            # A CUDA graph replays the kernels but not this Python: it would miss a user's write to p, and Python would miss the
            # replay's. So the sums are never reused.
            states.forget_sums()
        states.captured_ready = True
        self.updated(sums, step, decision)
        shown = {"_statistics": None if sums is None else self.statistics_of(sums), "_grad_norm": norm}
        self._publish(should_step, **{name: x for name, x in shown.items() if x is not None}, **decision.shown)

    def _measures(self) -> bool:
        """Whether a step needs the sums before its update."""
        return self.needs_sums() or self.max_grad_norm is not None or self._skipped is not None

    def _measure(self, states: States, needed: bool | None = None) -> tuple[Tensor, Tensor]:
        """Sums [T, S], :meth:`measured`, of the gradients that ``states`` has and of the states; a missing one counts as zeros.

        Only Σg² is made, and the others are 0, unless all of them are ``needed``: by default if :meth:`decide` needs them.

        Returns:
            Those of this rank's shards, of the R parameters that have a state, and those of all T whole tensors, in
            :meth:`sums_dtype`. One and the same where nothing is sharded or frozen.
        """
        dtype, names = self.sums_dtype(), self.measured()
        needed = self.needs_sums() if needed is None else needed
        sums = states.measure(
            torch.float64 if self._rank_sums.active else dtype,
            wanted=self._bits(names) if needed else 1,  # Σg², to clip and to skip by
            # A row that the last update left out has carried sums in the dtype of that time.
            reuse=dtype == self._statistics.dtype,
            vectors=self.measured_with() if needed else None,
        )
        sums = sums if needed else torch.nn.functional.pad(sums, (0, len(names) - 1))
        return sums, self._rank_sums(states.whole(sums)).to(dtype)

    def _bits(self, names: Sequence[str]) -> int:
        """These sums as a launch takes them."""
        every = self.rule.sums
        return (1 << len(every)) - 1 if len(names) == len(every) else sum(1 << i for i, name in enumerate(every) if name in names)

    def _record_stream(self) -> None:
        """Tells torch's allocator when the optimizer's own tensors are used on another stream than before.

        The allocator hands a freed block at once to the next allocation on the stream that it was allocated on. A kernel on another
        stream may still read it: a launch table, say, that is replaced because a gradient came in another layout. So we name each
        stream to the allocator, which then waits for it, too.
        """
        stream = None if self._backend is FakeBackend else devices.current_stream(self._counts.device)
        if stream is None or stream == self._stream or devices.capturing(self._counts.device):
            return
        self._stream = stream
        for x in self._kept():
            if x is not None:
                x.record_stream(stream)

    def _kept(self) -> list[Tensor | None]:
        return [*super()._kept(), self._statistics, self._grad_norm, self._skipped]

    def _check_capture(self) -> None:
        """Raises RuntimeError on a step that a CUDA graph would not repeat as it is meant."""
        if not all(group["capturable"] for group in self.param_groups):
            raise RuntimeError("capturing step() in a CUDA graph needs capturable=True in all param groups")
        ready = self._states is not None and self._states.captured_ready
        if self._states is None or not ready or not self._states.hold(self.state, self.param_groups):
            raise RuntimeError(
                "take a step before one is captured in a CUDA graph, also after parameters or states have changed: the first"
                " compiles kernels and fills tables"
            )
        written = self._states.watched is not None and self._states.watched.look(again=True)
        self._states.let_go()
        if written:
            raise RuntimeError(
                "parameters or states were written since the last step: take another one before a step is captured in a CUDA graph"
            )
        for index, member in enumerate(self._members):
            if member.param.requires_grad and member.param.grad is None:
                raise RuntimeError(
                    f"parameter {member.name or index} has no gradient: a captured step would leave it out at every replay."
                    " Call backward() before, or requires_grad_(False) if it is not to be trained"
                )

    def _publish(self, should_step: Tensor | bool, **tensors: Tensor) -> None:
        """What can be read of the step, unless it did not count. Where a graph may be replayed, in the tensors that are there."""
        in_place = any(group["capturable"] for group in self.param_groups)
        for name, new in tensors.items():
            old = getattr(self, name)
            new = torch.where(should_step, new, old) if isinstance(should_step, Tensor) else new
            if in_place:
                old.copy_(new)
            else:
                setattr(self, name, new)

    # ------------------------------------------------------------------------------------------------------- what can be read

    def _cache(self) -> None:
        """Also makes what can be read of the last step, which stays as it is where its shape does."""
        super()._cache()
        checkpoint.reserve(self)
        device, dtype = self._counts.device, self.sums_dtype()
        shapes = {"_statistics": (len(self._members), self.statistics_columns()), "_grad_norm": ()}
        for name, shape in shapes.items():
            old: Tensor | None = getattr(self, name, None)

            setattr(
                self,
                name,
                old.to(device, dtype) if old is not None and old.shape == shape else torch.zeros(shape, dtype=dtype, device=device),
            )
        if self.max_grad_norm is None:
            self._grad_norm = None
        if self._skipped is not None:
            self._skipped = self._skipped.to(device)

    def _follow(self, moved: Moved) -> None:
        """Brings the sums of the last step in the order of the members."""
        statistics = self._statistics.new_zeros(len(moved.origins), self._statistics.shape[1])
        here = [t for t, origin in enumerate(moved.origins) if origin is not None]
        statistics[here] = self._statistics[[origin for origin in moved.origins if origin is not None]]
        self._statistics = statistics
        super()._follow(moved)

    @property
    def steps_done(self) -> int:
        """How many steps have been taken; steps that a GradScaler skipped do not count. Waits for the device."""
        return int(self._counts[-1])

    @steps_done.setter
    def steps_done(self, value: int) -> None:
        self._counts[-1] = value
        self.count_set = (self.count_set[0] + 1, int(value))

    @property
    def skipped_steps(self) -> int:
        """How many steps ``skip_nonfinite`` left out. Waits for the device."""
        return 0 if self._skipped is None else int(self._skipped)

    @property
    def statistics(self) -> Tensor:
        """[T, S] sums per tensor of the last step, of the clipped (and with maximize negated) gradient; 0 before the first.

        The columns are those of ``rule.sums``. The gradient is this step's; parameters and states are as the step found them.
        """
        return self._statistics

    @property
    def grad_norm(self) -> Tensor:
        """0-dim total 2-norm of the last step's gradient, before clipping; 0 before the first step."""
        return self._statistics[:, 0].sum().sqrt() if self._grad_norm is None else self._grad_norm

    def invalidate_statistics(self) -> None:
        """Tells that parameters or second moments were written where torch cannot see it.

        That is: in place through ``.data``, through numpy, or by kernels that raise no version counter: another library's, or those
        of another optimizer of torch's with ``fused=True`` on the same parameters, after each of its steps. The update sums what it
        writes, and the next step's statistics rely on these sums. In-place operations, ``p.data = x``, other tensors in ``state``,
        ``load_state_dict`` and ``add_param_group`` are noticed without this call. Of DTensors, two more need it, which torch does
        not count either: ``torch._foreach_*_``, and in place through ``p.detach().to_local()``.

        What such a write changes without this call are statistics, and what is made of them: with exact statistics also those of
        a frozen parameter, whose norm is read once, and with ``master_weights`` those of the one step that takes the write up. In a
        captured CUDA graph the norms of frozen parameters are those of the capture.
        """
        if self._states is not None:
            self._states.invalidate()
        self._forget(range(len(self._members)))

    # ----------------------------------------------------------------------------------------------------------- checkpoints

    # Both methods call the user's hooks themselves, where torch would call them. A hook of ours, registered for the time of a call,
    # would change a dict that the call of another thread iterates over.

    @devices.outside_inference_mode
    def state_dict(self) -> dict[str, Any]:
        """Torch's state dict with one key more, ``checkpoint_key``: step count and what else a bitwise resume needs.

        Raises:
            ValueError: ``param_groups`` list a new parameter that no backend can update.
        """
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        if not repeats(self.param_groups):  # else they are numbered as torch numbers them
            self._sync_params()
        self._settle_names()
        state_dict = checkpoint.saved(self)
        for after in self._optimizer_state_dict_post_hooks.values():
            replaced = after(self, state_dict)
            state_dict = state_dict if replaced is None else replaced
        return state_dict

    @devices.outside_inference_mode
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a checkpoint of the same optimizer, or torch's own of one whose states have the same names.

        States keep their saved dtypes. ``state_dict`` is copied, never changed or referred to.

        Raises:
            ValueError: a checkpoint of another model; the optimizer is unchanged then.
            RuntimeError: parameters on the meta device.
        """
        state_dict = copy.copy(state_dict)  # pre-hooks may change it
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = before(self, state_dict)
            state_dict = state_dict if replaced is None else replaced
        if self._device().type == "meta":
            raise RuntimeError("the parameters are on the meta device: give the model its data before loading a checkpoint")
        if not repeats(self.param_groups):
            self._sync_params()
        checkpoint.load(self, self.converted(state_dict))
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_stream": None}
