"""MetaAdamW: what is its own of the step, on the optimizer of core/. No arithmetic on elements happens here; see ops.py.

Longer than 300 lines: a good third of it is the constructor and documentation.
"""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import checkpoint, ema, rounding
from . import grouping as grouping_
from .core import devices
from .core.checkpoint import check_keys
from .core.gradients import Scaled, scale
from .core.hyperparameters import Hyperparameters
from .core.members import listed
from .core.optimizer import FusedOptimizer
from .core.rule import PARAM, Decision, Rule, State, Step
from .core.sharding import RankSums, check_supported
from .core.states import States
from .core.tracking import Moved
from .encoder import EncoderConfig, GroupEncoder, check_encoder
from .encoder_graph import EncoderGraph, Encoding, Sources
from .features import FeatureConfig, FeatureTable, feature_table, training_progress
from .hyper_gradient import FOUND, LastUpdate, online_rule
from .lookahead import LookAhead, gradients_of_rows, next_directions, released_decay, stored_directions, sums_beside

if TYPE_CHECKING:
    from .online import OnlineLearner

# csrc/table.h and features.py have the same operands and columns.
ADAMW = Rule(
    "adamw",
    states=(State("exp_avg"), State("exp_avg_sq", square=True), State("max_exp_avg_sq", flag="amsgrad", square=True)),
    operands=("exp_avg", PARAM, "exp_avg_sq", "max_exp_avg_sq"),
    vectors=("step_size", "decay_factor", "step", "beta1", "beta2", "eps", "grad_scale"),
    sums={"grad_sq": 2, "grad_momentum": 1, "momentum_sq": 0, "param_sq": 0, "second_moment_sq": 0},
    carried={"param_sq": PARAM, "second_moment_sq": "exp_avg_sq"},
    found=5,
)
ADAMW_COUNTING = ADAMW._replace(sums={**ADAMW.sums, "grad_nonzero": 0, "momentum_nonzero": 0})

# Instead of a sum of squares: lagged mode has none yet. Its square root is NaN, so the encoder leaves every group at scale 1.
_NO_SUM = -1.0
_DECAY_FACTOR, LEAST_DECAY_FACTOR = ADAMW.vectors.index("decay_factor"), 0.5


class MetaAdamW(FusedOptimizer):
    """AdamW whose learning rate and weight decay are scaled per parameter group by a small Transformer encoder.

    Zhao & Liu, *MetaAdamW*, arXiv 2605.04055 (2026), algorithm 1. Each step: sums per tensor → features per group → scales per
    group → ``p ← (1 - lr·lr_scale·wd_scale·λ)·p - lr·lr_scale·m̂/(√v̂ + ε)``. The encoder is trained by a
    :class:`~metaadamw_fast.MetaLearner`; without one, and from the default identity start, this is AdamW.

    Args:
        params: parameters, named parameters or param groups, as for any torch optimizer.
        lr, betas, eps, weight_decay, amsgrad, maximize: as ``torch.optim.AdamW``; lr and weight_decay may be 1-element tensors.
        capturable: ``step`` may be captured in a CUDA graph (parameters on a CUDA device; take a step before). lr and weight_decay
            given as tensors on the device are read at every replay, and what can be read of the optimizer is what the last replay
            left. The statistics read p and v again in every step, since a replay cannot tell who wrote them meanwhile. Capture
            anew after ``load_state_dict``, ``add_param_group`` or a changed parameter.
        foreach, fused: taken for the sake of callers of ``torch.optim.AdamW``, None, True or False, and without effect: all
            tensors are one call here, whatever they say.
        differentiable: False; the kernels leave no graph.
        model: gives names to unnamed parameters and the owning modules to fine-grained grouping.
        grouping: ``auto`` (fine_grained if names are known), ``param_groups``, ``fine_grained`` (layer type × depth × bias) or a
            callable ``(name, param) -> hashable``.
        features: a :class:`~metaadamw_fast.FeatureConfig` or the name of its version.
        encoder: an :class:`~metaadamw_fast.EncoderConfig`, or a ready :class:`~metaadamw_fast.GroupEncoder` (which then takes
            this optimizer's ranges and keeps its weights; ``features``, ``head_init`` and ``seed`` must be its own or not given).
        lr_scale_range, wd_scale_range: width of the interval around 1 in which the scales lie, in [0, 2); 0 and 0 is AdamW.
        head_init: ``identity`` (all scales exactly 1 until the first meta-update) or ``xavier`` (the paper).
        total_steps: the training length, for the time feature.
        seed: of the encoder's start and of stochastic rounding; the global random state is not touched.
        max_grad_norm: clip the gradients' total 2-norm in the step itself, as ``clip_grad_norm_`` before it would, but without
            changing ``.grad``.
        statistics: ``exact``, or ``lagged``: the scales of a step come from the statistics of the step before.
        state_dtype: of the moments, if not the parameter's own: float32 beside bfloat16 parameters, or bfloat16 to save memory.
            ``load_state_dict`` keeps the dtypes of the checkpoint.
        master_weights: update a float32 copy of each bfloat16 or float16 parameter, ``state[p]["master_param"]``, and round it into
            the parameter. Statistics are the copy's. An element of a parameter that is not the rounding of its copy was written by
            somebody, and is what counts.
        stochastic_rounding: round bfloat16 and float16 parameters and moments up or down by chance, right in the mean, so that
            small updates are not lost. The same for the same ``seed``, step and parameters; a checkpoint brings its own seed.
        skip_nonfinite: take no step whose gradients are not finite (their sum of squares is not); decided on the device, counted in
            ``skipped_steps``. Without it the affected group alone is masked out of the encoder.
        ema_decay: also average the parameters, with this decay in 0..1, into ``state[p]["ema_param"]``: float32 or wider, the
            parameter itself at the start, and moved in the steps in which the parameter moves. See :meth:`ema_params`.
        variant: ``paper``, or ``released`` for the arithmetic of the authors' code.
        backend: ``auto``, ``cpp``, ``triton`` or ``reference``; see :func:`metaadamw_fast.backend_report`.
        allocate: ``eager``: parameters that require a gradient and have data get their moments here, all others with their first
            gradient. ``lazy`` puts all of it off to the first step, for an optimizer that is built before the model is sharded.
        encoder_graph: replay features, encoder and what the update takes of the scales as one CUDA graph, captured after the first
            steps and again when something changes. The same numbers in fewer launches; a capture waits for the GPU once. Where
            it is not possible, the logger ``metaadamw_fast`` says why.

    ``state_dict`` has one key more than torch's, ``metaadamw``: encoder, step count and what else a bitwise resume needs.
    ``load_state_dict`` also takes a checkpoint of ``torch.optim.AdamW``; the encoder then stays as it is, with a warning. Where
    only one side knows the parameters' names, which decide the groups, parameters match by their positions; the encoder is loaded,
    too, if there are as many groups. ``add_param_group`` leaves the ids of groups that exist.

    Raises:
        ValueError: a hyper-parameter out of range; parameters that require a gradient and are sparse, expanded or on several
            devices; missing names for a grouping that needs them; a feature width that the heads do not divide; an argument that
            contradicts a ready encoder.
        TypeError: ``encoder``, ``features`` or ``model`` of another type.
        RuntimeError: the chosen backend cannot run; ``differentiable=True``.
    """

    checkpoint_key = checkpoint.KEY
    _members: Sequence[grouping_.Member]

    @devices.outside_inference_mode
    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float | Tensor = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        capturable: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        differentiable: bool = False,
        model: nn.Module | None = None,
        grouping: grouping_.Grouping = "auto",
        features: FeatureConfig | str = "basic",
        encoder: EncoderConfig | GroupEncoder | None = None,
        lr_scale_range: float = 1.0,
        wd_scale_range: float = 1.0,
        head_init: str = "identity",
        total_steps: int | None = None,
        seed: int = 0,
        max_grad_norm: float | None = None,
        statistics: str = "exact",
        state_dtype: torch.dtype | None = None,
        master_weights: bool = False,
        stochastic_rounding: bool = False,
        skip_nonfinite: bool = False,
        ema_decay: float | None = None,
        variant: str = "paper",
        backend: str = "auto",
        encoder_graph: bool = False,
        allocate: str = "eager",
    ) -> None:
        for name, value, choices in (
            ("statistics", statistics, ("exact", "lagged")),
            ("variant", variant, ("paper", "released")),
        ):
            if value not in choices:
                raise ValueError(f"Invalid {name}: {value!r} ({' or '.join(choices)})")
        if total_steps is not None and not (isinstance(total_steps, Real) and total_steps > 0):
            raise ValueError(f"Invalid total_steps: {total_steps!r}")
        if ema_decay is not None and not 0.0 < ema_decay < 1.0:
            raise ValueError(f"Invalid ema_decay: {ema_decay} (must be between 0 and 1)")
        if model is not None and not isinstance(model, nn.Module):
            raise TypeError(f"model should be a torch.nn.Module, but got {type(model).__name__}")
        encoder, config = check_encoder(encoder, features, head_init, None if stochastic_rounding else seed)
        reads = encoder.features if isinstance(encoder, GroupEncoder) else config
        self._counting = reads.enhanced
        self.ema_decay = ema_decay
        self._learner: OnlineLearner | None = None
        self._last: LastUpdate | None = None  # of the rule online_adamw
        # Of a checkpoint that was loaded before there was a learner, and how many steps were done then.
        self._online: tuple[dict[str, Any], int] | None = None
        self.rule = self._rule()
        self.total_steps = total_steps
        self.variant = variant
        self.statistics_mode = statistics
        self.groups: list[grouping_.Group] = []
        self._features: Tensor
        self._model = None if model is None else weakref.ref(model)
        self._grouping: grouping_.Grouping = grouping
        self._group_ids: list[int] = []
        self._scales = torch.ones(4, 0, dtype=torch.float32, device="cpu")
        self._lagged: Tensor | None = None
        self._table: FeatureTable | None = None
        self._encoder_graph = EncoderGraph() if encoder_graph else None
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "capturable": capturable,
        }
        super().__init__(
            params,
            defaults,
            differentiable=differentiable,
            max_grad_norm=max_grad_norm,
            state_dtype=state_dtype,
            master_weights=master_weights,
            rounding_seed=rounding.signed(seed) if stochastic_rounding else None,
            skip_nonfinite=skip_nonfinite,
            backend=backend,
            allocate=allocate,
        )
        if isinstance(encoder, GroupEncoder):  # touched only now, when nothing else can be wrong
            if len(encoder.group_embeddings) > len(self.groups):
                raise ValueError(
                    f"Invalid encoder: it has {len(encoder.group_embeddings)} group embeddings for {len(self.groups)} groups"
                )
            self.encoder = encoder
            self.encoder.set_ranges(lr_scale_range, wd_scale_range)
            self.encoder.add_groups(len(self.groups) - len(encoder.group_embeddings))
        else:
            self.encoder = GroupEncoder(
                encoder,
                config,
                len(self.groups),
                lr_scale_range=lr_scale_range,
                wd_scale_range=wd_scale_range,
                head_init=head_init,
                seed=seed,
            )
        self._cache()

    def _rule(self) -> Rule:
        if self._learner is None and self.ema_decay is None:
            return ADAMW_COUNTING if self._counting else ADAMW
        return online_rule(ADAMW_COUNTING, ema=self.ema_decay is not None, learns=self._learner is not None)

    # ------------------------------------------------------------------------------------------------------------ the groups

    def _describe(self) -> list[grouping_.Member]:
        return grouping_.describe(listed(self.param_groups), None if self._model is None else self._model())

    def _check_params(self, params: Sequence[Tensor]) -> None:
        super()._check_params(params)
        if self._model is not None:
            check_supported((), self._model())

    def _regroup(self, members: Sequence[Any], origins: Sequence[int | None]) -> list[int | None]:
        """Sets groups and their numbers; returns the old number of each group, None for a new one."""
        self._grouping = grouping_.resolve(self._grouping, members)
        before = grouping_.Groups(self.groups, self._group_ids)
        (self.groups, self._group_ids), old_numbers = grouping_.regroup(before, members, origins, self._grouping)
        return old_numbers

    def _follow(self, moved: Moved) -> None:
        """Brings encoder, and what can be read of the last step, in the order of groups and members."""
        kept = [number for number in moved.groups if number is not None]
        self.encoder.keep_groups(kept)
        self.encoder.add_groups(len(moved.groups) - len(kept))  # behind the others: they are numbered as they came
        self._scales = self._scales[:, kept]
        features = self._features.new_zeros(len(moved.groups), self._features.shape[1])
        features[: len(kept)] = self._features[kept]
        self._features = features
        if self._lagged is not None:  # the statistics of the last step are useless where a parameter was not among them
            there = [origin for origin in moved.origins if origin is not None]
            self._lagged = self._lagged[there] if len(there) == len(moved.origins) else None
        if self._last is not None:
            self._last.follow(moved.origins, self._counts[:-1])
        if self._learner is not None:
            self._learner.follow(kept, len(moved.groups), self.encoder)
        super()._follow(moved)

    def _cache(self) -> None:
        super()._cache()
        device = self._counts.device
        self._group_of = torch.tensor(self._group_ids, dtype=torch.long, device=device)
        if self.encoder.head.weight.device != device:  # torch moves no parameter that is a FakeTensor, not even to where it is
            self.encoder.to(device)
        like = self.encoder.head.weight.detach()
        scales = like.new_zeros(4, len(self.groups))
        scales[:2] = 1
        scales[:, : self._scales.shape[1]] = self._scales  # groups that existed before keep what the last step gave them
        self._scales = scales
        features = getattr(self, "_features", None)
        shape = (len(self.groups), self.encoder.dim)
        self._features = features.to(like) if features is not None and features.shape == shape else like.new_zeros(shape)
        if self._lagged is not None:
            self._lagged = self._lagged.to(like)
        if self.rule.name == "online_adamw":
            if self._last is None:
                self._last = LastUpdate(len(self._members), self.ema_decay or 0.0, device)
            self._last.to(device)
        if self._learner is not None:
            self._learner.cache(device, self._group_ids, len(self.groups))

    def _forget(self, written: Sequence[int]) -> None:
        if self._last is not None and written:
            self._last.forget(None if len(written) == len(self._members) else written)

    def _check_capture(self) -> None:
        super()._check_capture()
        if self._learner is not None:
            self._learner.check_capture()

    def attach(self, learner: OnlineLearner) -> None:
        """Gives the step a learner; its constructor does so.

        Raises:
            ValueError: there is one already.
        """
        if self._learner is not None:
            raise ValueError("the optimizer has an OnlineLearner already")
        before = dict(self.__dict__)
        saved, steps_done = self._online or (None, -1)
        as_saved = saved is not None and steps_done == self.steps_done
        if self.ema_decay is None and not as_saved:
            for member in self._members:  # of a checkpoint, and not moved since
                self.state.get(member.param, {}).pop(ema.AVERAGE, None)
        self._learner = learner
        self.ema_decay = self.ema_decay or learner.trace or None
        self.rule, self._last = self._rule(), None
        try:
            self._prepare(allocated=self._states is not None)
            self._cache()
            learner.check(saved, self)
            learner.restore(saved, self)
            if not as_saved:  # the last update is another
                self._forget(range(len(self._members)))
        except Exception:
            self.__dict__.update(before)
            raise
        self._online = None

    def _drop_tables(self) -> None:
        super()._drop_tables()
        self._table = None

    def release(self) -> None:
        """As :meth:`~metaadamw_fast.core.tracking.TrackingOptimizer.release`; also of a captured encoder graph."""
        super().release()
        self.encoder.float64_copies = []
        if self._encoder_graph is not None:
            self._encoder_graph = EncoderGraph()

    def _kept(self) -> list[Tensor | None]:
        own = [self._group_of, self._features, self._scales, self._lagged]
        own += [] if self._last is None else self._last.kept()
        own += [] if self._learner is None else self._learner.kept()
        return [*super()._kept(), *own, *([] if self._table is None else self._table.kept()), *self.encoder.kept()]

    # ---------------------------------------------------------------------------------------------------------- the decision

    def needs_sums(self) -> bool:
        """Lagged mode decides by the sums of the step before. The update makes those of this step, if it can make all of them."""
        return self.statistics_mode == "exact" or self.statistics_columns() > self.rule.found

    def sums_dtype(self) -> torch.dtype:
        """The encoder's, which features are in; a learner's is float64."""
        return self.encoder.head.weight.dtype if self._learner is None else torch.float64

    def measured(self) -> Sequence[str]:
        """What features are made of, and what is learned from."""
        names = [*self.rule.sums]
        if self._last is None:
            return names
        learned = () if self._learner is None else self._learner.measured(self)
        counts = names[-2:] if self._counting else ()
        wanted = [*names[: ADAMW.found], *learned, *counts]
        # An update makes the first ones, so many that all that are wanted are among them.
        return wanted if self.needs_sums() else names[: next(width for width in FOUND if names.index(wanted[-1]) < width)]

    def measured_with(self) -> Tensor | None:
        """What is known of the last update."""
        return None if self._last is None else self._last.of_sums

    def statistics_columns(self) -> int:
        """Those of AdamW."""
        return len(ADAMW_COUNTING.sums if self._counting else ADAMW.sums)

    def statistics_of(self, sums: Tensor) -> Tensor:
        """Those of AdamW: the first, and its counts, which are the last."""
        if sums.shape[1] == self.statistics_columns():
            return sums
        first = sums[:, : ADAMW.found]
        return torch.cat([first, sums[:, -2:]], dim=1) if self._counting else first

    def decide(self, sums: Tensor | None, step: Step) -> Decision:
        """Features, scales and vectors, from the sums of this step or, in lagged mode, of the step before."""
        if self._learner is not None:
            self._learner.begin(self, step)
            if sums is not None and self.statistics_mode == "exact":
                self._learner.learn(self, sums, step)
        decision = self._decide(sums, step)
        if self._last is None:
            return decision
        return decision._replace(vectors=torch.cat([decision.vectors, self._last.of_update]))

    def updated(self, sums: Tensor | None, step: Step, decision: Decision) -> None:
        """Learns in lagged mode; remembers the update."""
        if self._learner is not None:
            if sums is not None and self.statistics_mode == "lagged":
                self._learner.learn(self, sums, step)
            self._learner.remember(self, step, decision)

    def _decide(self, sums: Tensor | None, step: Step) -> Decision:
        if self._learner is not None and self._learner.policy == "scales":
            scales = self._learner.scales(self._scales)
            return Decision(self._modulation(scales, step), {"_scales": scales})
        ahead, dtype = 1, self.encoder.head.weight.dtype
        if self.statistics_mode == "lagged":
            ahead, sums = 0, None if self._lagged is None else self._lagged.to(dtype)
        if sums is None:
            return Decision(self._modulation(self._scales, step), {})
        sums = self.statistics_of(sums).to(dtype).contiguous()

        def encode(written: Sequence[Any], replaced: Sequence[Any]) -> Encoding:
            sums, grad_factor, counted = written
            features, scales = self._encode(sums, ahead)
            now = Step(Hyperparameters(*replaced), grad_factor, step.counts, counted)
            return Encoding(features, scales, self._modulation(scales, now))

        written = (sums, step.grad_factor, step.counted)
        if self._encoder_graph is None:
            features, scales, vectors = encode(written, step.hyper)
        else:
            # The counts are read where they lie.
            objects = (self._feature_table(sums.dtype), self._group_of, self._backend, step.counts)
            options = (ahead, self.total_steps, self.variant, self.clamps_decay)
            sources = Sources(written, step.hyper, self.encoder, objects, options)
            features, scales, vectors = self._encoder_graph(encode, sources)
        if self.statistics_mode == "lagged" and self._lagged is not None:
            features = torch.where(self._lagged[0, 0] != _NO_SUM, features, self._features)
        return Decision(vectors, {"_features": features, "_scales": scales})

    def _encode(self, statistics: Tensor, ahead: int) -> tuple[Tensor, Tensor]:
        """Features [G, D] and scales [4, G] when ``ahead`` more steps are taken; with their graph if gradients are enabled."""
        table = self._feature_table(statistics.dtype)
        features = self._backend.group_features(statistics, table, self._counts[-1], ahead, self.total_steps)
        features = self.encoder.embed(features)
        return features, self.encoder(features)

    def _feature_table(self, dtype: torch.dtype) -> FeatureTable:
        if self._table is None or self._table.template.dtype != dtype:
            like = torch.empty(0, dtype=dtype, device=self._group_of.device)
            config, dim = self.encoder.features, self.encoder.dim
            self._table = feature_table(self._members, self._group_ids, len(self.groups), config, dim, like)
        return self._table

    def _modulation(self, scales: Tensor, step: Step) -> Tensor:
        """The vectors of the update, [V, T], with step size lr·lr_scale and decay factor 1 - lr·lr_scale·wd_scale·λ."""
        hyper = step.hyper
        vectors: Tensor = self._backend.modulation(
            scales, self._group_of, hyper.lr, hyper.weight_decay, hyper.beta1, hyper.beta2, hyper.eps, step.grad_factor,
            step.counts[:-1], step.counted, self.variant == "released",
        )  # fmt: skip
        if self.clamps_decay:
            vectors[_DECAY_FACTOR].clamp_(min=LEAST_DECAY_FACTOR)  # it is never above 1
        return vectors

    @property
    def clamps_decay(self) -> bool:
        """Whether the decay factor stays in [½, 1], since the product of the scales may be large."""
        online = self._learner is not None and self._learner.policy == "scales"
        return online or getattr(self.encoder, "scale_form", "linear") == "log"

    def _publish(self, should_step: Tensor | bool, **tensors: Tensor) -> None:
        if self.statistics_mode == "lagged":
            self._lagged = self.lagged_statistics()
            tensors["_lagged"] = tensors["_statistics"]
        super()._publish(should_step, **tensors)

    # ---------------------------------------------------------------------------------------------- the step that is not taken

    @property
    def rank_sums(self) -> RankSums:
        """Makes sums over this rank's shards of the parameters those of whole tensors, [T, S] to [T, S].

        Raises:
            RuntimeError, ValueError: the parameters are none that a step could update; see :meth:`step`.
        """
        self._current_states().let_go()
        return self._rank_sums

    @devices.outside_inference_mode
    def look_ahead(self, g1: Sequence[Tensor | None], last_grads: Sequence[Tensor | None] = ()) -> LookAhead:
        """What :meth:`step` would do with the gradients ``g1``, as a function of the scales, without doing it.

        MetaAdamW algorithm 2; docs/algorithm.md, section 6. u is m̂′/(√v̂′ + ε) for the moments that the step would leave. The
        released code takes the features from the ``.grad`` of the last training step, and the moments as that step left them.
        Parameters, states, ``.grad`` and the launch table of the steps stay as they are; states that are missing are made.

        Args:
            g1: of what is minimized, for each of the T parameters in the order of ``param_groups``: a tensor of its shape (of a
                DTensor, of this rank's shard), or None where there is none.
            last_grads: likewise the ``.grad`` of the last training step, for ``variant="released"`` only.

        Raises:
            ValueError: fewer or more than T gradients; see also :meth:`step`.
            RuntimeError: a gradient that is sparse, or of another shape or device; an ``OnlineLearner(policy="scales")``, whose
                scales do not come from the encoder; see also :meth:`step`.
        """
        if self._learner is not None and self._learner.policy == "scales":
            raise RuntimeError(
                "look_ahead has no encoder to learn for: an OnlineLearner with policy='scales' sets the scales. One with"
                " policy='encoder' may learn beside a MetaLearner"
            )
        total = sum(len(group["params"]) for group in self.param_groups)
        for name, grads in (("g1", g1), *([("last_grads", last_grads)] if self.variant == "released" else [])):
            if len(grads) != total:
                raise ValueError(f"look_ahead needs an entry of {name} for each of the {total} parameters, got {len(grads)}")
        states = self._current_states(g1)
        try:
            return self._look_ahead(states, g1, last_grads)
        finally:
            states.let_go()

    def _look_ahead(self, states: States, g1: Sequence[Tensor | None], last_grads: Sequence[Tensor | None]) -> LookAhead:
        released, backend = self.variant == "released", self._backend
        ahead = 0 if released else 1
        self._record_stream()

        def scaled(grads: list[Tensor | None], sign: Tensor | None) -> Scaled:
            wanted = self.encoder.head.weight.dtype
            dtype = torch.float64 if self._rank_sums.active else wanted
            columns = self._bits([*(ADAMW_COUNTING if self._counting else ADAMW).sums])
            sums = sums_beside(states, backend.launch, self.rule.name, columns, grads, dtype, self.measured_with())
            return scale(backend, self._rank_sums(states.whole(sums)).to(wanted), sign, None, self.max_grad_norm)

        with torch.no_grad():
            states.counts.take_writes()
            hyper = self._hyperparameters.update(self.param_groups)
            step = self._counts[:-1] + ahead
            ours = gradients_of_rows(states, g1)
            if released:
                # A .grad is the gradient of loss_fn, which an optimizer with maximize=True negates. g1 has been negated already.
                _, _, sums = scaled(gradients_of_rows(states, last_grads), hyper.sign)
                factor = None if self.max_grad_norm is None else scaled(ours, None).factor
                directions = stored_directions(states, step, hyper)
            else:
                factor, _, sums = scaled(ours, None)
                ones = torch.ones_like(step)
                vectors = backend.update_vectors(-ones, ones, step, hyper.beta1, hyper.beta2, hyper.eps, factor)
                directions = next_directions(states, backend.launch, ours, vectors)
        with torch.enable_grad():
            _, scales = self._encode(sums, ahead)
        return LookAhead(
            scales=scales,
            clip=1.0 if factor is None else factor[0].to(scales.dtype),
            lr=hyper.lr,
            weight_decay=released_decay(hyper, step) if released else hyper.weight_decay,
            directions=[
                torch.view_as_complex(u) if u is not None and p.is_complex() else u
                for p, u in zip(states.held.leaves, states.spread(directions), strict=True)
            ],
            group_of=self._group_of,
            moves_wd_scale=not released,
            backend=backend.name,
            rank_sums=self._rank_sums,
        )

    # ------------------------------------------------------------------------------------------------------- what can be read

    @contextmanager
    def ema_params(self) -> Iterator[None]:
        """For the time of a ``with`` block the model has its averaged parameters; it then has its own again, bit for bit.

        Masters are averaged, too. A parameter that was never updated stays. Needs room for a copy of the parameters. For version
        counters the parameters have been written, so that an :class:`~metaadamw_fast.OnlineLearner` learns nothing from the next
        step. Take no steps within the block.

        Raises:
            RuntimeError: the optimizer was built without ``ema_decay``.
        """
        if self.ema_decay is None:
            raise RuntimeError("ema_params() needs an average of the parameters: build the optimizer with ema_decay=")
        with ema.averaged(self.state, None if self._model is None else self._model()):
            yield

    @property
    def lr_scale(self) -> Tensor:
        """[G] learning-rate scales of the last step (the paper's alpha); 1 before the first."""
        return self._scales[0]

    @property
    def wd_scale(self) -> Tensor:
        """[G] weight-decay scales of the last step (the paper's beta); 1 before the first."""
        return self._scales[1]

    @property
    def flatness_weight(self) -> Tensor:
        """[G] weights of ‖g2‖² in the alignment objective (lambda1); 0 before the first step."""
        return self._scales[2]

    @property
    def alignment_weight(self) -> Tensor:
        """[G] weights of cos(g1, g2) in the alignment objective (lambda2); 0 before the first step."""
        return self._scales[3]

    @property
    def features(self) -> Tensor:
        """[G, D] features of the last step, before gating and standardisation; 0 before the first."""
        return self._features

    @property
    def statistics(self) -> Tensor:
        """[T, S] sums per tensor of the last step, of the clipped (and with maximize negated) gradient; 0 before the first.

        Columns: Σg², Σg·m, Σm², Σp², Σv², for enhanced features then the non-zeros of g and of m. g is this step's gradient; m, p
        and v are as the step found them.
        """
        return self._statistics.to(self.encoder.head.weight.dtype)

    def lagged_statistics(self) -> Tensor:
        """[T, S] what the next step of lagged mode takes its scales from; -1 everywhere if there is none yet."""
        return torch.full_like(self._statistics, _NO_SUM) if self._lagged is None else self._lagged

    # ----------------------------------------------------------------------------------------------------------- checkpoints

    def saved(self) -> dict[str, Any]:
        """The encoder, the groups, and what the last step left."""
        lagged = None
        if self.statistics_mode == "lagged":
            lagged = [self.lagged_statistics().clone(), training_progress(self.steps_done, self.total_steps)]
        return {
            "group_ids": list(self._group_ids),
            checkpoint.NAMED: self._has_names(),
            checkpoint.CONFIG: self.encoder.description(),
            "encoder": {name: x.clone() for name, x in self.encoder.state_dict().items()},
            # torch.distributed.checkpoint broadcasts the memory of tensors, from one device only: so contiguous, on one device.
            "generator": self.encoder.generator.get_state().to(self._scales.device),
            "scales": self._scales.clone(memory_format=torch.contiguous_format),
            "lagged": lagged,
            "online": None if self._learner is None else self._learner.saved(self),
        }

    def check_saved(self, extra: dict[str, Any], state_dict: dict[str, Any]) -> None:
        """Raises ValueError on other groups or another encoder; names of the parameters may be known on one side only."""
        check_keys(extra, checkpoint.OWN, checkpoint.KEY)
        if self._finds_its_encoder(extra, state_dict):
            checkpoint.check_encoder(extra, self.encoder, self._scales)
            if self._learner is not None:
                self._learner.check(extra.get("online"), self)
        checkpoint.check_lagged(extra["lagged"], self._statistics)

    def restore(self, extra: dict[str, Any] | None, state_dict: dict[str, Any]) -> None:
        """Takes over the encoder, in its saved dtype; a checkpoint of plain AdamW leaves it as it is and says so."""
        self._lagged = None
        if extra is None:
            self._restore_online(None)
            warnings.warn("checkpoint of a plain AdamW: moments and steps are loaded, the encoder stays as it is", stacklevel=4)
            return
        if self._finds_its_encoder(extra, state_dict):
            self.encoder.to(extra["encoder"]["head.weight"].dtype)
            self.encoder.load_state_dict(extra["encoder"])
            self.encoder.generator.set_state(extra["generator"].cpu())
            self._scales = extra["scales"].detach().clone()
        else:
            warnings.warn(
                f"the checkpoint has {len(set(extra['group_ids']))} groups, the optimizer has {len(self.groups)}: moments and"
                f" steps are loaded, the encoder stays as it is. {self.hint(state_dict)}",
                stacklevel=4,
            )
        if extra["lagged"] is not None:
            self._lagged = extra["lagged"][0].detach().clone()
        self._restore_online(extra.get("online") if self._finds_its_encoder(extra, state_dict) else None)

    def _restore_online(self, saved: dict[str, Any] | None) -> None:
        """Hands a learner what a checkpoint has of one; keeps it, until there is a learner."""
        if self._learner is not None:
            self._learner.restore(saved, self)
        self._online = None if self._learner is not None or saved is None else (copy.deepcopy(saved), self.steps_done)

    def hint(self, state_dict: Any) -> str:
        """Names of parameters, which decide the groups, that are known on one side only."""
        return checkpoint.difference_in_names(self._has_names(), state_dict)

    def _has_names(self) -> bool:
        return any(member.name is not None for member in self._members)

    def _finds_its_encoder(self, extra: dict[str, Any], state_dict: dict[str, Any]) -> bool:
        return checkpoint.has_encoder(extra, self._group_ids, len(self.groups), bool(self.hint(state_dict)))

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_model": None}
