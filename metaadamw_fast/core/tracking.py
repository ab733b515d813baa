"""TrackingOptimizer: which parameters there are, their counts and states, whatever users do to param groups, states and data."""

from __future__ import annotations

from abc import ABC
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from metaadamw_fast.ops import FakeBackend, resolve_backend

from . import devices
from .allocation import MASTER, check_params
from .hyperparameters import HyperparameterTable, check_hyperparameters
from .members import Member, listed, origins, repeats
from .rule import Rule
from .sharding import RankSums, local_gradient, refuse_zero
from .states import States
from .watch import Mark, written_since


class Moved(NamedTuple):
    """Where parameters stood before ``param_groups`` changed, None for a new one; and what ``_regroup`` returned."""

    origins: list[int | None]
    groups: Any


class TrackingOptimizer(Optimizer, ABC):
    """The half of :class:`~metaadamw_fast.core.optimizer.FusedOptimizer` that follows the parameters; it takes no steps.

    Args:
        params, defaults: as of ``torch.optim.Optimizer``, with lr, betas, eps, weight_decay, maximize, capturable and the flags of
            the rule's states.
        differentiable, state_dtype, master_weights, backend, allocate: see :class:`~metaadamw_fast.MetaAdamW`.
    """

    rule: Rule

    def __init__(
        self,
        params: Any,
        defaults: dict[str, Any],
        *,
        differentiable: bool,
        state_dtype: torch.dtype | None,
        master_weights: bool,
        backend: str,
        allocate: str,
    ) -> None:
        if allocate not in ("eager", "lazy"):
            raise ValueError(f"Invalid allocate: {allocate!r} (eager or lazy)")
        check_hyperparameters({**defaults, "differentiable": differentiable})
        refuse_zero()
        if state_dtype not in (None, torch.float32, torch.float64, torch.bfloat16, torch.float16):
            raise ValueError(f"Invalid state_dtype: {state_dtype}")
        self._allocate, self._backend_name = allocate, backend
        self._state_dtype, self._master_weights = state_dtype, master_weights
        # Steps taken by each parameter and, last, by the optimizer; on the parameters' device, which may decide that one is none.
        self._counts = torch.zeros(1, dtype=torch.float64, device="cpu")
        self._members: Sequence[Member] = []
        self._rank_sums = RankSums([])
        self._states: States | None = None
        self._marks: Sequence[Mark] = []  # of the last lists, where the rule has to know what others write
        self._built = False
        super().__init__(params, {**defaults, "betas": tuple(float(beta) for beta in defaults["betas"])})
        self._arrange()
        self._prepare()
        self._built = True

    # --------------------------------------------------------------------------------------------- what subclasses add to it

    def _describe(self) -> Sequence[Member]:
        """All parameters that ``param_groups`` list."""
        return [Member(param, name, index) for name, param, index in listed(self.param_groups)]

    def _regroup(self, members: Sequence[Member], origins: Sequence[int | None]) -> Any:
        """Takes down what depends on which parameters there are; changes nothing if it raises. :meth:`_follow` gets the result."""

    def _follow(self, moved: Moved) -> None:
        """Brings what is kept for each parameter in the order of the members."""
        self._cache()

    def _cache(self) -> None:
        """Makes everything else that only a change of the parameters, or of their device, changes."""
        self._drop_tables()

    def _drop_tables(self) -> None:
        """Forgets what the next step makes anew from param groups and shapes."""
        self._hyperparameters = HyperparameterTable([m.param_group for m in self._members], self._counts.device)

    def _kept(self) -> list[Tensor | None]:
        """The tensors on the device that are kept from step to step, besides parameters and states."""
        return [self._counts, *self._hyperparameters.kept(), *([] if self._states is None else self._states.kept())]

    # ------------------------------------------------------------------------------------------------------- construction

    @devices.outside_inference_mode
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds parameters, as ``torch.optim.Optimizer.add_param_group``.

        Raises:
            ValueError, RuntimeError: as the constructor. Nothing has changed then.
        """
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group must be a dict, but got {type(param_group)}")
        check_hyperparameters({**self.defaults, **param_group})
        if self._built:
            self._sync_params()
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        before = dict(self.__dict__)
        try:
            group["betas"] = tuple(float(beta) for beta in group["betas"])
            self._check_params(group["params"])
            if self._built:
                moved = self._arrange()
                self._prepare()
        except Exception:
            self.param_groups.pop()
            self.__dict__.update(before)
            raise
        if self._built:
            self._follow(moved)

    def _check_params(self, params: Sequence[Tensor]) -> None:
        """Raises ValueError on new parameters that cannot be updated; ``param_groups`` list them already."""
        check_params(params, self.param_groups, self._device())

    def _device(self) -> torch.device:
        """Of the first parameter that is trained."""
        params = [p for group in self.param_groups for p in group["params"]]
        trained = (p for p in params if p.requires_grad or self.rule.states[0].name in self.state.get(p, ()))
        first = next(trained, params[0] if params else None)
        return torch.device("cpu") if first is None else first.device

    def _prepare(self, grads: Sequence[Tensor | None] | None = None, *, allocated: bool | None = None) -> None:
        """Chooses the backend and lists the states, with those that are missing.

        Args:
            grads: T gradients, for parameters that get their state with the first.
            allocated: whether the states are made now; default: unless that waits for the first step.
        """
        device = self._device()
        on_meta = device.type == "meta"  # no data yet: states and the choice of a backend wait for the first step
        device = torch.device("cpu") if on_meta else device
        self._backend = resolve_backend(self._backend_name, device)
        if any(devices.is_fake(member.param) for member in self._members):
            self._backend = FakeBackend
        self._rank_sums = RankSums([m.param for m in self._members], self._rank_sums)
        self._counts = self._counts if self._counts.device == device else self._counts.to(device)
        frozen_sums = None if self._states is None else self._states.frozen_sums
        self._drop_states()
        if allocated is None:
            allocated = self._allocate == "eager" and not on_meta
        if allocated:
            self._states = States(
                self.rule,
                self._members,
                [None] * len(self._members) if grads is None else grads,
                self.state,
                self.param_groups,
                device,
                self._backend.launch,
                self._counts,
                state_dtype=self._state_dtype,
                master_weights=self._master_weights,
                frozen_sums=frozen_sums,
                marks=self._marks,
            )
            self._states.let_go()

    def _settle_names(self) -> None:
        """Brings the names of states that change their roles up to date, after steps of which only the device knows the outcome."""
        if self._states is not None:
            self._states.settle_names(self.state, [self._members[t].param for t in self._states.rows])

    def _drop_states(self) -> None:
        """Forgets the lists of the states; the next step makes them anew."""
        self._settle_names()
        if self._states is not None and self._states.watched is not None:
            self._marks = self._states.watched.marks()
        self._states = None

    def _current_states(self, grads: Sequence[Tensor | None] | None = None) -> States:
        """The states, listed anew if somebody replaced a parameter, a state or the data of one, or if one gets its first gradient.

        They hold the tensors until the caller lets them go.

        Args:
            grads: T gradients; default: those that the parameters have.

        Raises:
            RuntimeError: the parameters have no data.
            ValueError: a parameter that no backend can update has a gradient; one is listed twice.
        """
        states = self._states
        if states is not None and states.hold(self.state, self.param_groups):
            if not states.lacks(states.gradients() if grads is None else grads):
                return states
            states.let_go()
        self._sync_params()
        device = self._device()
        if device.type == "meta":
            raise RuntimeError("the parameters are on the meta device: give the model its data before using the optimizer")
        same_device = device == self._counts.device and self._backend is not None and self._states is not None
        self._prepare([local_gradient(m.param) for m in self._members] if grads is None else grads, allocated=True)
        if same_device:
            self._drop_tables()
        else:
            self._cache()
        states = self._states
        held = states is not None and states.hold(self.state, self.param_groups)
        assert states is not None
        assert held
        return states

    def _written(self) -> list[int]:
        """Which parameters others have written since the last step, or their states, if the rule has to know. Read only."""
        if not self.rule.remembers:
            return []
        states = self._states
        marks = self._marks if states is None or states.watched is None else states.watched.marks()
        return written_since(marks, [m.param for m in self._members], self.state, (*self.rule.names, MASTER))

    def _forget(self, written: Sequence[int]) -> None:
        """Forgets the last update of these parameters, which others have written; see :attr:`Rule.remembers`."""

    # ---------------------------------------------------------------------------------- parameters that join, move and leave

    def _sync_params(self) -> None:
        """Makes the members those that ``param_groups`` list now, in their order, whoever changed them.

        What left leaves with its state, and what takes the place of another of the same shape takes what was known of it.

        Raises:
            ValueError: a parameter that no backend can update, or one that is listed twice. Nothing has changed then.
        """
        now = [(p, index) for index, group in enumerate(self.param_groups) for p in group["params"]]
        if len(now) == len(self._members) and all(
            m.param is p and m.param_group == index for m, (p, index) in zip(self._members, now, strict=True)
        ):
            return
        known = {m.param for m in self._members}
        self._check_params([p for p, _ in now if p not in known])
        self._drop_states()
        self._follow(self._arrange())
        present = {p for p, _ in now}
        for p in [p for p in self.state if isinstance(p, Tensor) and p not in present]:
            del self.state[p]

    def _arrange(self) -> Moved:
        """Members and counts for what ``param_groups`` list; changes nothing if the grouping raises."""
        described = self._describe()
        before = origins(self._members, described)
        # What is known stays: a copy of an optimizer has no model to ask for names.
        members = [
            new if t is None else replace(self._members[t], param=new.param, param_group=new.param_group)
            for new, t in zip(described, before, strict=True)
        ]
        groups = self._regroup(members, before)
        counts = self._counts.new_zeros(len(members) + 1)
        kept = [t for t, origin in enumerate(before) if origin is not None and self._members[origin].param is members[t].param]
        counts[[*kept, len(members)]] = self._counts[[*(before[t] for t in kept), -1]]
        self._members, self._counts = members, counts
        return Moved(before, groups)

    def release(self) -> None:
        """Lets go of all memory that the next step can make anew: tables and caches.

        States stay, but for those of parameters that are no longer in ``param_groups``. Nothing that is left refers to the memory
        of a parameter, a gradient or a state, whether or not this is called: that is free as soon as it is replaced.
        """
        if not repeats(self.param_groups):
            self._sync_params()
        self._drop_states()
        self._drop_tables()

    def __getstate__(self) -> dict[str, Any]:
        # As torch's optimizers leave it to who copies or loads: hooks, and the `step` that an LR scheduler wraps.
        self._settle_names()
        self._forget(self._written())  # the copy cannot know it
        kept = {name: x for name, x in self.__dict__.items() if name != "step" and not name.startswith("_optimizer_")}
        # The first step of the copy makes these anew. A backend is a class that need not have a name to be pickled by.
        anew: dict[str, Any] = {"_states": None, "_backend": None, "_rank_sums": RankSums([]), "_marks": []}
        # By value: a spawned process gets the memory of tensors, and that of a copy made here would be gone before it starts.
        counts = self._counts if devices.is_fake(self._counts) else self._counts.tolist()
        return {**kept, **anew, "_counts": counts}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if not isinstance(self._counts, Tensor):
            self._counts = torch.tensor(self._counts, dtype=torch.float64, device="cpu")
        for group in self.param_groups:
            for name in (*self.rule.flags, "maximize", "capturable"):
                group.setdefault(name, False)
