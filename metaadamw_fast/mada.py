"""MADA: an update whose six coefficients are learned by hyper-gradients; docs/mada.md. All but its formulas is in core/.

Longer than 300 lines: half of it is the constructor with its documentation and its checks.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import rounding
from .adam import fixed_vectors, mean_of_second_moment, with_mean
from .avgrad import AVGRAD
from .core import devices
from .core.checkpoint import check_keys, check_tensor
from .core.hyperparameters import Hyperparameters, check_hyperparameters, pair_of
from .core.optimizer import FusedOptimizer
from .core.rule import PARAM, Decision, Rule, State, Step
from .core.tracking import Moved
from .mada_reference import COEFFICIENTS, SUMS, VECTORS, Flags
from .reference import gradient_factor

BOUNDS = {"beta1": (0.01, 0.99), "beta2": (0.501, 0.99), "beta3": (0.0, 0.99), **dict.fromkeys(COEFFICIENTS[3:], (0.0, 1.0))}
HYPER_LR = {"beta1": 5e-4, "beta2": 5e-4, "beta3": 0.1, "rho": 0.1, "c": 0.1, "gamma": 0.1}
_SUMS = {**dict.fromkeys(SUMS, 0), "grad_sq": 2}  # those along a coefficient are of the gradient as it is


class Semantics(NamedTuple):
    """Where the paper's algorithm and the authors' training loops differ; docs/mada.md section 8.

    Attributes:
        keeps_gradient: d = g - the gradient of the step before; otherwise d = g.
        starts_at_rest: d = 0 in a tensor's first update, and n starts at 0; otherwise d = g there, and n starts at g².
        v_start: V before the first update, 0 or 1e-15.
        lion_looks_back: Lion's u is formed from l before this step's update; otherwise from l after it.
    """

    keeps_gradient: bool
    starts_at_rest: bool
    v_start: float
    lion_looks_back: bool


_LEARNED = ("coefficients", "momentum", "hyper_gradient", "hyper_sums", "last")  # attributes of MADA, with an underscore
_TURN = VECTORS.index("turn")
VARIANTS = {"paper": Semantics(True, True, 0.0, True), "released": Semantics(False, False, 1e-15, False)}


class MADA(FusedOptimizer):
    """An optimizer between Adam, AVGrad, Adan, Yogi and Lion that learns where to stand.

    Ozkara et al., *MADA: Meta-Adaptive Optimizers through hyper-gradient Descent*, arXiv 2401.08893 (2024); docs/mada.md. Each step
    moves six coefficients against the derivative of the new loss by each, taken through the last update, and updates with
    them. With the defaults this is AdamW until the coefficients begin to move, after ``freeze_steps`` updates. No graph is kept;
    the derivatives are sums per tensor, made of the states in one launch.

    Args:
        params: parameters, named parameters or param groups, as for any torch optimizer.
        lr, eps, weight_decay: as ``torch.optim.AdamW``; lr and weight_decay may be 1-element tensors. They are not learned.
        betas, beta3, rho, c, gamma: where the coefficients start. beta3 is Adan's, the decay and the weight of the momentum of
            gradient differences; rho is 1 for the second moment itself and 0 for its mean over all steps (AVGrad); c is 1 for
            Adam's accumulation of squares and 0 for Yogi's; gamma is 1 for the adaptive update and 0 for Lion's sign.
        lion_betas: Lion's two decays, not learned.
        hyper_lr: learning rates of the coefficients, one number or a dict by name (a name that is left out has the default rate). A
            rate of 0 fixes a coefficient. What is fixed where its part of the update vanishes (beta3 0, rho 1, gamma 1) takes the
            states of that part and their traffic along.
        hyper_momentum: of that learning, one number or a dict by name (left out: 0).
        hyper_clip: largest magnitude of a hyper-gradient, each by itself; 0 does not clip.
        freeze_steps: of so many updates at the beginning the hyper-gradients are dropped.
        bounds: (lowest, highest) by name, where others than the defaults are wanted.
        max_grad_norm: as of :class:`~metaadamw_fast.MetaAdamW`; coefficients learn from the gradient before clipping.
        scope: ``global``: one set of coefficients. ``per_group``: one for each entry of ``param_groups``, which starts at its
            ``betas`` and learns from its parameters alone.
        second_moment: ``average``, or ``maximum`` for AMSGrad's in place of the mean.
        statistics: ``exact``, or ``lagged``: what a step learns acts from the next step on, and the step is one launch less.
        variant: ``paper``, ``released`` for the arithmetic of the authors' code, or a :class:`Semantics`.
        maximize, capturable, foreach, fused, differentiable, state_dtype, master_weights, stochastic_rounding, seed,
            skip_nonfinite, backend, allocate: as of :class:`~metaadamw_fast.MetaAdamW`. The mean is kept in float32 or wider,
            gradients in the parameter's dtype.

    ``betas`` in ``param_groups`` say where a set started, and in a checkpoint where it has come to; what is written there changes
    nothing, and neither do the betas of a checkpoint of another optimizer.

    ``state[p]["last_grad"]`` and ``["previous_grad"]`` change places with every update. Where only the device knows whether there
    was one (GradScaler on a GPU, a replayed CUDA graph), ``state_dict`` is the first to bring them right.

    A step that GradScaler or ``skip_nonfinite`` leaves out moves nothing, coefficients included. ``load_state_dict`` also takes
    checkpoints of torch's Adam and AdamW: the mean is then v, and nothing is learned of updates before. They load its
    checkpoints, too, but where ``exp_avg_sq`` carries a bit in its sign (rho fixed at 1, c not fixed at 1): torch's then need the
    magnitude of it, which the optimizers here take by themselves.

    Raises:
        ValueError: a number out of range, also a start outside its bounds; an unknown name; else as
            :class:`~metaadamw_fast.MetaAdamW`.
        RuntimeError: the chosen backend cannot run; ``differentiable=True``.
    """

    checkpoint_key = "mada"

    @devices.outside_inference_mode
    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.95),
        eps: float = 1e-6,
        weight_decay: float | Tensor = 0.0,
        *,
        beta3: float = 0.0,
        rho: float = 1.0,
        c: float = 1.0,
        gamma: float = 1.0,
        lion_betas: tuple[float, float] = (0.95, 0.98),
        hyper_lr: float | Mapping[str, float] = HYPER_LR,
        hyper_momentum: float | Mapping[str, float] = 0.0,
        hyper_clip: float | None = 10.0,
        freeze_steps: int = 50,
        bounds: Mapping[str, tuple[float, float]] = BOUNDS,
        max_grad_norm: float | None = None,
        scope: str = "global",
        second_moment: str = "average",
        statistics: str = "exact",
        variant: str | Semantics = "paper",
        maximize: bool = False,
        capturable: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        differentiable: bool = False,
        state_dtype: torch.dtype | None = None,
        master_weights: bool = False,
        stochastic_rounding: bool = False,
        seed: int = 0,
        skip_nonfinite: bool = False,
        backend: str = "auto",
        allocate: str = "eager",
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "maximize": maximize}
        check_hyperparameters({**defaults, "differentiable": differentiable})
        for name, value, choices in (
            ("scope", scope, ("global", "per_group")),
            ("second_moment", second_moment, ("average", "maximum")),
            ("statistics", statistics, ("exact", "lagged")),
        ):
            if value not in choices:
                raise ValueError(f"Invalid {name}: {value!r} ({' or '.join(choices)})")
        if not isinstance(variant, Semantics) and variant not in VARIANTS:
            raise ValueError(f"Invalid variant: {variant!r} (paper, released or a Semantics)")
        semantics = variant if isinstance(variant, Semantics) else VARIANTS[variant]
        if semantics.v_start not in (0.0, 1e-15):
            raise ValueError(f"Invalid v_start: {semantics.v_start} (0 or 1e-15)")
        for index, decay in enumerate(pair_of(lion_betas)):
            if not 0.0 < decay < 1.0:
                raise ValueError(f"Invalid lion_betas[{index}]: {decay}")
        if hyper_clip is not None and not hyper_clip >= 0.0:
            raise ValueError(f"Invalid hyper_clip: {hyper_clip}")
        if not (isinstance(freeze_steps, int) and freeze_steps >= 0):
            raise ValueError(f"Invalid freeze_steps: {freeze_steps!r}")
        beta1, beta2 = (float(beta) for beta in pair_of(betas))
        self._start = (beta1, beta2, *(float(x) for x in (beta3, rho, c, gamma)))
        self._bounds = _bounds(bounds)
        rates = _by_name("hyper_lr", hyper_lr, HYPER_LR)
        momenta = _by_name("hyper_momentum", hyper_momentum, {})
        _check_start(self._start, self._bounds)
        _check_learning(self._bounds, rates, momenta)
        self.scope, self.statistics_mode, self.variant = scope, statistics, variant
        self.hyper_clip, self.freeze_steps, self.lion_betas = float(hyper_clip or 0.0), freeze_steps, (lion_betas[0], lion_betas[1])
        self.rule, self._flags = _rule(self._start, rates, semantics, maximum=second_moment == "maximum")
        self._learns = any(rates)
        self._constants = torch.tensor([rates, momenta, *zip(*self._bounds, strict=True)], dtype=torch.float64, device="cpu")
        # Whether `hyper_update` has learned from the gradients that the next step finds; whether the sums of the last step are
        # still to be learned from (lagged).
        self._learned, self._pending = False, False
        self._adds = False  # whether a group is being added
        super().__init__(
            params,
            {**defaults, "capturable": capturable},
            differentiable=differentiable,
            max_grad_norm=max_grad_norm,
            state_dtype=state_dtype,
            master_weights=master_weights,
            rounding_seed=rounding.signed(seed) if stochastic_rounding else None,
            skip_nonfinite=skip_nonfinite,
            backend=backend,
            allocate=allocate,
        )
        sets, tensors = self._new_sets(), len(self._members)
        self._coefficients = sets
        self._momentum, self._hyper_gradient = torch.zeros_like(sets), torch.zeros_like(sets)
        self._hyper_sums = sets.new_zeros(tensors, len(COEFFICIENTS))
        # The vectors of the last update of each tensor, and of the one before: what its derivatives are made of.
        self._last = _no_update(tensors, sets.device)
        self._cache()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds parameters, as ``torch.optim.Optimizer.add_param_group``; with ``per_group`` their coefficients start at its betas.

        Raises:
            ValueError, RuntimeError: as the constructor. Nothing has changed then.
        """
        self._adds = True
        try:
            super().add_param_group(param_group)
        finally:
            self._adds = False

    def _check_params(self, params: Sequence[Tensor]) -> None:
        super()._check_params(params)
        if not self._adds:  # groups that a user assigns may be those of a checkpoint, with betas that were learned
            return
        betas = tuple(float(beta) for beta in self.param_groups[-1]["betas"])
        if self.scope == "global" and betas != self._start[:2]:
            raise ValueError(f"Invalid betas of a param group: {betas} (scope='global' has {self._start[:2]} for all)")
        _check_start((*betas, *self._start[2:]), self._bounds)

    def _new_sets(self) -> Tensor:
        """[K, 6] where each set of coefficients starts."""
        groups = self.param_groups if self.scope == "per_group" else [self.defaults]
        rows = [(*(float(beta) for beta in group["betas"]), *self._start[2:]) for group in groups]
        return torch.tensor(rows, dtype=torch.float64, device=self._counts.device).reshape(-1, len(COEFFICIENTS))

    def _regroup(self, members: Sequence[Any], origins: Sequence[int | None]) -> list[int | None]:
        """For each set of coefficients which one it was before, None for a new one."""
        if self.scope == "global":
            return [0]
        before: list[int | None] = [None] * len(self.param_groups)
        for member, origin in zip(members, origins, strict=True):
            if origin is not None and before[member.param_group] is None:
                before[member.param_group] = self._members[origin].param_group
        return before

    def _follow(self, moved: Moved) -> None:
        """Brings coefficients, and what is known of the last updates, in the order of groups and members."""
        sets, old = self._new_sets(), [k for k, number in enumerate(moved.groups) if number is not None]
        numbers = [number for number in moved.groups if number is not None]
        zeros = torch.zeros_like(sets)
        for name, start in (("_coefficients", sets), ("_momentum", zeros), ("_hyper_gradient", zeros.clone())):
            start[old] = getattr(self, name)[numbers]
            setattr(self, name, start)
        here = [t for t, origin in enumerate(moved.origins) if origin is not None]
        there = [origin for origin in moved.origins if origin is not None]
        hyper_sums, last = self._hyper_sums, self._last
        self._hyper_sums = hyper_sums.new_zeros(len(moved.origins), hyper_sums.shape[1])
        self._hyper_sums[here] = hyper_sums[there]
        self._last = _no_update(len(moved.origins), last.device)
        self._last[..., here] = last[..., there]
        super()._follow(moved)

    def _cache(self) -> None:
        super()._cache()
        device = self._counts.device
        for name in (*_LEARNED, "constants"):
            setattr(self, f"_{name}", getattr(self, f"_{name}").to(device))
        per_group = self.scope == "per_group"
        numbers = [m.param_group if per_group else 0 for m in self._members]
        self._set_of = torch.tensor(numbers, dtype=torch.long, device=device)
        self._no_turns = torch.zeros(len(numbers), dtype=torch.float64, device=device)

    def _drop_tables(self) -> None:
        super()._drop_tables()
        # The lists that are made next name the gradients by what they are now, and count their changes of roles from 0 on.
        self._last[0, _TURN] = -1.0

    def _kept(self) -> list[Tensor | None]:
        own = (*_LEARNED, "constants", "set_of", "no_turns")
        return [*super()._kept(), *(getattr(self, f"_{name}") for name in own)]

    # ---------------------------------------------------------------------------------------------------------- the decision

    def needs_sums(self) -> bool:
        """What is learned acts at once, unless lagged."""
        return self._learns and not self._learned and self.statistics_mode == "exact"

    def wants_sums(self) -> bool:
        """In lagged mode the update makes them."""
        return self._learns and not self._learned and self.statistics_mode == "lagged"

    def sums_dtype(self) -> torch.dtype:
        """The coefficients'."""
        return torch.float64

    def measured_with(self) -> Tensor | None:
        """The vectors of the last update, whose derivatives the sums are of."""
        return self._last[0] if self._learns else None

    def decide(self, sums: Tensor | None, step: Step) -> Decision:
        """Learns, from the sums of this step or, in lagged mode, of the step before; then the vectors of the update."""
        if self.rule.name != "mada":  # all coefficients are fixed at AdamW or AVGrad
            beta1, beta2 = self._coefficients[:, :2].t()[:, self._set_of].contiguous()
            return Decision(fixed_vectors(self._backend, step, beta1, beta2), {})
        if self.statistics_mode == "lagged":
            sums = self._statistics if self._pending else None
        elif not self.needs_sums():
            sums = None
        return Decision(self._policy(sums, step, advance=True), {})

    def _policy(self, sums: Tensor | None, step: Step, *, advance: bool, lagged: bool | None = None) -> Tensor:
        """docs/mada.md section 5, in place; the vectors of the update if it is to ``advance``."""
        hyper = step.hyper
        unclipped = gradient_factor(len(self._members), hyper.sign, step.loss_scale)[0]
        turns = self._no_turns if step.turns is None else step.turns
        lagged = self.statistics_mode == "lagged" if lagged is None else lagged
        vectors: Tensor = self._backend.mada_policy_(
            sums, self._coefficients, self._momentum, self._hyper_gradient, self._hyper_sums, self._last, self._set_of,
            hyper.lr, hyper.weight_decay, hyper.eps, step.grad_factor, unclipped, step.counts, step.present, turns, step.counted,
            self._constants, self.hyper_clip, self.freeze_steps, *self.lion_betas, int(self._flags), lagged, advance,
        )  # fmt: skip
        return vectors

    def _publish(self, should_step: Tensor | bool, **tensors: Tensor) -> None:
        super()._publish(should_step, **tensors)
        self._pending = self.wants_sums()
        self._learned = False

    @devices.outside_inference_mode
    @torch.no_grad()
    def hyper_update(self) -> None:
        """Learns from the gradients as they stand, for who accumulates: the next ``step`` then updates without learning.

        So the coefficients can learn from the first of several micro-batches, as the authors' training loop does. Gradients of a
        GradScaler are to be unscaled before.

        Raises:
            RuntimeError, ValueError: as :meth:`step`.
        """
        if not self._learns:
            return
        states = self._current_states()
        try:
            hyper = self._hyperparameters.update(self.param_groups)
            states.counts.take_writes()
            step = Step(hyper, None, self._counts, None, None, None, None if states.turns is None else states.turns[:-1])
            if self._pending:
                self._policy(self._statistics, step, advance=False)
            self._pending, self._learned = False, False
            states.set_gradients(states.gradients())
            self._policy(self._measure(states, needed=True)[1], step, advance=False, lagged=False)
            self._learned = True
        finally:
            states.let_go()

    # ------------------------------------------------------------------------------------------------------- what can be read

    @property
    def coefficients(self) -> Tensor:
        """[K, 6] float64: beta1, beta2, beta3, rho, c, gamma of each set, as they are learned so far. A copy; nothing waits."""
        return self._now()[0]

    @property
    def hyper_gradient(self) -> Tensor:
        """[K, 6] float64, d loss / d coefficient through the last update, before clipping; 0 before there is one. A copy.

        Of a fixed coefficient whose states are not kept the number means nothing.
        """
        return self._now()[1]

    @property
    def hyper_sums(self) -> Tensor:
        """[T, 6] float64, the sums per tensor that :attr:`hyper_gradient` is made of: ⟨gradient, dU/d coefficient⟩. A copy.

        Of a fixed coefficient whose states are not kept the number means nothing.
        """
        return self._now()[2]

    def _now(self) -> tuple[Tensor, Tensor, Tensor]:
        """Copies of what is learned so far, also from sums that the next step of lagged mode will begin with."""
        own = (self._coefficients, self._momentum, self._hyper_gradient, self._hyper_sums)
        copies = tuple(x.clone() for x in own)
        if self._pending:
            try:
                self._coefficients, self._momentum, self._hyper_gradient, self._hyper_sums = copies
                none = self._no_turns  # of hyper-parameters learning has no need
                hyper = Hyperparameters(none, none, none, none, none, None)
                self._policy(self._statistics, Step(hyper, None, self._counts, None), advance=False)
            finally:
                self._coefficients, self._momentum, self._hyper_gradient, self._hyper_sums = own
        return copies[0], copies[2], copies[3]

    @property
    def statistics(self) -> Tensor:
        """[T, 1] float64, Σg² of the clipped gradient, of the last step that summed; 0 before the first."""
        return self._statistics[:, :1]

    # ----------------------------------------------------------------------------------------------------------- checkpoints

    def saved(self) -> dict[str, Any]:
        """Coefficients, and what the next step learns from."""
        copies = {name: getattr(self, f"_{name}").clone() for name in _LEARNED}
        copies["last"][:, _TURN] = -1.0  # who loads lists the states anew
        # Always of one size: torch.distributed.checkpoint loads only into what looks as it did when it was saved.
        sums = torch.nn.functional.pad(self._statistics, (0, len(_SUMS) - self._statistics.shape[1]))
        return {**copies, "sums": sums.clone(), "pending": self._pending, "learned": self._learned}

    def saved_groups(self) -> list[dict[str, Any]]:
        """With the betas that were learned, for other optimizers."""
        sets = self.coefficients[:, :2].tolist()
        numbers = range(len(self.param_groups)) if self.scope == "per_group" else [0] * len(self.param_groups)
        return [{**group, "betas": tuple(sets[k])} for group, k in zip(self.param_groups, numbers, strict=True)]

    def check_saved(self, extra: dict[str, Any], state_dict: dict[str, Any]) -> None:
        """Raises ValueError on other sets of coefficients or other tensors."""
        own = self.saved()
        check_keys(extra, own, self.checkpoint_key)
        check_tensor(extra["coefficients"], self._coefficients, "coefficients")
        for k, (name, rate) in enumerate(zip(COEFFICIENTS, self._constants[0].tolist(), strict=True)):
            values = extra["coefficients"][:, k]
            if not bool(values.isfinite().all()):
                raise ValueError(f"coefficients in the loaded state dict have a {name} that is not finite")
            # The rule has no more states than the start of a fixed coefficient needs.
            moved = values.to(self._coefficients) != self._start[k]
            if rate == 0.0 and k >= 2 and bool(moved.any()):
                raise ValueError(
                    f"{name} is {values.tolist()} in the loaded state dict, and fixed at {self._start[k]} here: build the optimizer"
                    f" with this {name}, or let it be learned"
                )
        for name, x in own.items():
            if isinstance(x, Tensor):
                check_tensor(extra[name], x, name)
            elif type(extra[name]) is not bool:
                raise ValueError(f"{name} in the loaded state dict is {extra[name]!r}, not True or False")

    def restore(self, extra: dict[str, Any] | None, state_dict: dict[str, Any]) -> None:
        """Takes over what was learned; a checkpoint of Adam leaves the coefficients as they are and says so."""
        self._pending = self._learned = False
        if extra is None:
            mean_of_second_moment(self)
            self._last.copy_(_no_update(len(self._members), self._last.device))
            message = "checkpoint of a plain Adam: moments and steps are loaded, the coefficients, betas too, stay as they are"
            warnings.warn(message, stacklevel=4)
            return
        for name in _LEARNED:
            getattr(self, f"_{name}").copy_(extra[name])
        self._learned = extra["learned"] and self._learns
        self._statistics.copy_(extra["sums"][:, : self._statistics.shape[1]])
        self._pending = extra["pending"] and self._learns and self.statistics_mode == "lagged"

    def converted(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Adam's and AdamW's get A = v, and zeros for all else."""
        others = [name for name in self.rule.names if name not in ("exp_avg", "exp_avg_sq")]
        return with_mean(state_dict, others)


def _no_update(tensors: int, device: torch.device) -> Tensor:
    """[2, H, T], the vectors of no update: step 0. Nothing is learned of it, and the derivatives by it are finite."""
    last = torch.zeros(2, len(VECTORS), tensors, dtype=torch.float64, device=device)
    last[:, [VECTORS.index(name) for name in ("beta1", "beta2", "eps", "k1", "k2", "lion2")]] = 1.0
    return last


def _check_names(option: str, values: Mapping[str, Any]) -> None:
    unknown = [name for name in values if name not in COEFFICIENTS]
    if unknown:
        raise ValueError(f"Invalid {option}: unknown {', '.join(map(str, unknown))} (known: {', '.join(COEFFICIENTS)})")


def _by_name(option: str, values: float | Mapping[str, float], default: Mapping[str, float]) -> list[float]:
    """One number for each coefficient."""
    if not isinstance(values, Mapping):
        return [float(values)] * len(COEFFICIENTS)
    _check_names(option, values)
    return [float(values.get(name, default.get(name, 0.0))) for name in COEFFICIENTS]


def _bounds(bounds: Mapping[str, tuple[float, float]]) -> list[tuple[float, float]]:
    _check_names("bounds", bounds)
    pairs = [(float(low), float(high)) for low, high in (bounds.get(name, BOUNDS[name]) for name in COEFFICIENTS)]
    for name, (low, high) in zip(COEFFICIENTS, pairs, strict=True):
        is_decay = name.startswith("beta")
        if not (0.0 <= low <= high and (high < 1.0 if is_decay else high <= 1.0)):
            raise ValueError(f"Invalid bounds of {name}: {(low, high)}")
    return pairs


def _check_start(start: Sequence[float], bounds: Sequence[tuple[float, float]]) -> None:
    for name, x, (low, high) in zip(COEFFICIENTS, start, bounds, strict=True):
        if not low <= x <= high:
            raise ValueError(f"Invalid {name}: {x} (its bounds are {low} and {high}; bounds= takes others)")


def _check_learning(bounds: Sequence[tuple[float, float]], rates: Sequence[float], momenta: Sequence[float]) -> None:
    for name, (low, high), rate, momentum in zip(COEFFICIENTS, bounds, rates, momenta, strict=True):
        if not 0.0 <= rate < math.inf:
            raise ValueError(f"Invalid hyper_lr of {name}: {rate}")
        if not 0.0 <= momentum < 1.0:
            raise ValueError(f"Invalid hyper_momentum of {name}: {momentum}")
        # The derivatives divide by these two: docs/mada.md section 4.
        if name in ("beta1", "beta2") and rate > 0.0 and low == 0.0:
            raise ValueError(f"Invalid bounds of {name}: {(low, high)} (learned, it must stay above 0)")


_ADAMW = Rule(
    "adamw",
    states=AVGRAD.states[:2],
    operands=("exp_avg", PARAM, "exp_avg_sq", None),
    vectors=AVGRAD.vectors,
    sums={"grad_sq": 2},
    carried={},
)


def _rule(start: Sequence[float], rates: Sequence[float], semantics: Semantics, *, maximum: bool) -> tuple[Rule, Flags]:
    """The rule with the states that are needed, and how its ops compute: docs/mada.md section 9."""
    of = dict(zip(COEFFICIENTS, start, strict=True))
    fixed = {name: of[name] for name, rate in zip(COEFFICIENTS, rates, strict=True) if rate == 0.0}
    learns = len(fixed) < len(COEFFICIENTS)
    average, differences, lion = fixed.get("rho") != 1.0, fixed.get("beta3") != 0.0, fixed.get("gamma") != 1.0
    before = semantics.keeps_gradient and differences
    if not learns and not differences and not lion and of["c"] == 1.0 and semantics.v_start == 0.0:
        if not average:
            return _ADAMW, Flags(0)
        if of["rho"] == 0.0 and not maximum:
            return AVGRAD, Flags(0)
    two, one = learns and before, learns or before
    states = [
        State("exp_avg"),
        State("exp_avg_sq"),
        *([State("average_sq", wide=True)] if average else []),
        *([State("exp_avg_diff")] if differences else []),
        *([State("lion_exp_avg")] if lion else []),
        *([State("last_grad", of_gradient=True)] if one else []),
        *([State("previous_grad", of_gradient=True)] if two else []),
    ]
    known = {state.name for state in states}
    gradients = ("last_grad", "previous_grad") if two else (None, "last_grad" if one else None)
    optional = (name if name in known else None for name in ("average_sq", "exp_avg_diff", "lion_exp_avg"))
    flags = Flags.KEEPS * semantics.keeps_gradient | Flags.LOOKS_BACK * semantics.lion_looks_back | Flags.MAXIMUM * maximum
    flags |= Flags.SIGN_IN_V * (not average and fixed.get("c") != 1.0) | Flags.TWO * two
    flags |= Flags.V_STARTS * (semantics.v_start != 0.0) | Flags.N_STARTS * (not semantics.starts_at_rest)
    flags |= Flags.STARTS_AT_REST * semantics.starts_at_rest
    rule = Rule(
        "mada",
        states=tuple(states),
        operands=("exp_avg", PARAM, "exp_avg_sq", *optional, *gradients),
        vectors=VECTORS,
        sums=_SUMS if learns else {"grad_sq": 2},
        carried={},
        found=len(_SUMS) if learns else 0,
        exchanged=("last_grad", "previous_grad") if two else None,
    )
    return rule, Flags(flags)
