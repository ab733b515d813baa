"""MetaAdamW: states, lists and the step. No arithmetic on elements happens here; see ops.py.

The file is one class, read top to bottom: what it is made of, the step, what can be read, checkpoints.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from . import checkpoint, rounding
from . import grouping as grouping_
from .core import devices
from .core.hyperparameters import Hyperparameters, HyperparameterTable, check_hyperparameters
from .core.sharding import RankSums, check_supported, local_gradient, refuse_zero
from .core.states import States, reason_against
from .encoder import EncoderConfig, GroupEncoder, check_encoder
from .encoder_graph import Decision, EncoderGraph, Sources
from .features import FeatureConfig, FeatureTable, feature_table, of_scaled_gradient
from .ops import FakeBackend, resolve_backend
from .reference import gradient_factor

# Instead of a sum of squares: lagged mode has none yet. Its square root is NaN, so the encoder leaves every group at scale 1.
_NO_SUM = -1.0


class _Moved(NamedTuple):
    """Where parameters and groups stood before ``param_groups`` changed; None for one that is new."""

    members: list[int | None]
    groups: list[int | None]


class MetaAdamW(Optimizer):
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
        variant: ``paper``, or ``released`` for the arithmetic of the authors' code.
        backend: ``auto``, ``cpp``, ``triton`` or ``reference``; see :func:`metaadamw_fast.backend_report`.
        allocate: ``eager``: parameters that require a gradient and have data get their moments here, all others with their first
            gradient. ``lazy`` puts all of it off to the first step, for an optimizer that is built before the model is sharded.
        encoder_graph: replay features, encoder and what the update takes of the scales as one CUDA graph, captured after the first
            steps and again when something changes. The same numbers in fewer launches; a capture waits for the GPU once. Where
            it is not possible, the logger ``metaadamw_fast`` says why.

    Raises:
        ValueError: a hyper-parameter out of range; parameters that require a gradient and are sparse, expanded or on several
            devices; missing names for a grouping that needs them; a feature width that the heads do not divide; an argument that
            contradicts a ready encoder.
        TypeError: ``encoder``, ``features`` or ``model`` of another type.
        RuntimeError: the chosen backend cannot run; ``differentiable=True``.
    """

    _step_supports_amp_scaling = True  # torch.amp.GradScaler leaves unscaling and skipping to the step

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
        variant: str = "paper",
        backend: str = "auto",
        encoder_graph: bool = False,
        allocate: str = "eager",
    ) -> None:
        for name, value, choices in (
            ("allocate", allocate, ("eager", "lazy")),
            ("statistics", statistics, ("exact", "lagged")),
            ("variant", variant, ("paper", "released")),
        ):
            if value not in choices:
                raise ValueError(f"Invalid {name}: {value!r} ({' or '.join(choices)})")
        if max_grad_norm is not None and not max_grad_norm > 0.0:
            raise ValueError(f"Invalid max_grad_norm: {max_grad_norm}")
        if total_steps is not None and not (isinstance(total_steps, Real) and total_steps > 0):
            raise ValueError(f"Invalid total_steps: {total_steps!r}")
        if model is not None and not isinstance(model, nn.Module):
            raise TypeError(f"model should be a torch.nn.Module, but got {type(model).__name__}")
        encoder, config = check_encoder(encoder, features, head_init, None if stochastic_rounding else seed)
        defaults: dict[str, Any] = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "capturable": capturable,
        }
        check_hyperparameters({**defaults, "differentiable": differentiable})
        refuse_zero()
        defaults["betas"] = tuple(float(beta) for beta in betas)
        if state_dtype not in (None, torch.float32, torch.float64, torch.bfloat16, torch.float16):
            raise ValueError(f"Invalid state_dtype: {state_dtype}")
        self.total_steps = total_steps
        self.max_grad_norm = max_grad_norm
        self.variant = variant
        self._features: Tensor
        self._statistics: Tensor
        self._grad_norm: Tensor | None = None
        # Steps taken by each parameter and, last, by the optimizer; on the parameters' device, which may decide that one is none.
        self._counts = torch.zeros(1, dtype=torch.float64, device="cpu")
        self._allocate = allocate
        # How often `step` was called, and how often the count of steps was set, and to what: known without a wait for the device.
        self._step_calls, self._set_steps = 0, (0, 0)
        self.groups: list[grouping_.Group] = []
        self.statistics_mode = statistics
        self._state_dtype, self._master_weights = state_dtype, master_weights
        self._rounding_seed = rounding.signed(seed) if stochastic_rounding else None
        self._skipped = torch.zeros((), dtype=torch.float32, device="cpu") if skip_nonfinite else None
        self._model = None if model is None else weakref.ref(model)
        self._grouping: grouping_.Grouping = grouping
        self._backend_name = backend
        self._members: list[grouping_.Member] = []
        self._group_ids: list[int] = []
        self._scales = torch.ones(4, 0, dtype=torch.float32, device="cpu")
        self._lagged: Tensor | None = None
        self._rank_sums = RankSums([])
        self._lists: States | None = None
        self._table: FeatureTable | None = None
        self._stream: torch.Stream | None = None  # of the last step
        self._encoder_graph = EncoderGraph() if encoder_graph else None
        self._built = False
        super().__init__(params, defaults)

        self._grouping = grouping_.resolve(grouping, self._describe())
        self._arrange()
        self._prepare()  # before a ready encoder is touched
        if isinstance(encoder, GroupEncoder):
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
        self._built = True
        self._cache()

    # ------------------------------------------------------------------------------------------------------- construction

    @devices.outside_inference_mode
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds parameters, as ``torch.optim.Optimizer.add_param_group``; groups that exist keep their ids.

        Raises:
            ValueError, RuntimeError: as the constructor. Nothing has changed then.
        """
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group must be a dict, but got {type(param_group)}")
        check_hyperparameters({**self.defaults, **param_group})
        if self._built:
            self._take_up_params()
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        names = ("_members", "_group_ids", "groups", "_counts", "_backend", "_rank_sums", "_lists")
        before = {name: getattr(self, name) for name in names if hasattr(self, name)}
        try:
            group["betas"] = tuple(float(beta) for beta in group["betas"])
            self._check_params(group["params"])
            if self._built:
                moved = self._arrange()
                self._prepare()
        except Exception:
            self.param_groups.pop()
            for name, value in before.items():
                setattr(self, name, value)
            raise
        if self._built:
            self._follow(moved)

    def _check_params(self, params: Sequence[Tensor]) -> None:
        """Raises ValueError on new parameters that require a gradient and that no backend can update.

        Others are left alone. What can be said against them is said when a gradient comes.
        """
        device = self._device()
        for p in params:
            if p.requires_grad and not is_lazy(p):
                reason = reason_against(p, p.device)
                if reason is not None:
                    raise ValueError(reason)
        listed = [p for group in self.param_groups for p in group["params"]]
        if len(set(listed)) < len(listed):
            raise ValueError("MetaAdamW got a parameter group with duplicate parameters")
        check_supported(listed, None if self._model is None else self._model())
        devices = sorted({str(p.device) for p in listed if p.requires_grad})
        if len(devices) > 1:
            raise ValueError(f"MetaAdamW needs all parameters on one device, got {', '.join(devices)}")
        if device.type != "cuda" and listed and any(g["capturable"] for g in self.param_groups):
            raise ValueError(f"capturable=True needs parameters on a CUDA device, got {device}")

    def _describe(self) -> list[grouping_.Member]:
        rows = []
        for index, group in enumerate(self.param_groups):
            names = group.get("param_names", [None] * len(group["params"]))
            rows += [(name, param, index) for name, param in zip(names, group["params"], strict=True)]
        return grouping_.describe(rows, None if self._model is None else self._model())

    def _device(self) -> torch.device:
        """Of the first parameter that is trained."""
        params = [p for group in self.param_groups for p in group["params"]]
        trained = (p for p in params if p.requires_grad or "exp_avg" in self.state.get(p, ()))
        first = next(trained, params[0] if params else None)
        return torch.device("cpu") if first is None else first.device

    def _prepare(self, grads: Sequence[Tensor | None] | None = None, *, listed: bool | None = None) -> None:
        """Chooses the backend and lists the states, with those that are missing.

        Args:
            grads: T gradients, for parameters that get their state with the first.
            listed: whether the states are listed; default: unless that waits for the first step.
        """
        device = self._device()
        on_meta = device.type == "meta"  # no data yet: states and the choice of a backend wait for the first step
        device = torch.device("cpu") if on_meta else device
        self._backend = resolve_backend(self._backend_name, device)
        if any(devices.is_fake(member.param) for member in self._members):
            self._backend = FakeBackend
        self._rank_sums = RankSums([m.param for m in self._members], self._rank_sums)
        self._counts = self._counts if self._counts.device == device else self._counts.to(device)
        frozen_sums, self._lists = None if self._lists is None else self._lists.frozen_sums, None
        if listed is None:
            listed = self._allocate == "eager" and not on_meta
        if listed:
            self._lists = States(
                self._members,
                [None] * len(self._members) if grads is None else grads,
                self.state,
                self.param_groups,
                device,
                self._backend.launch,
                self._counts,
                early=True,
                state_dtype=self._state_dtype,
                master_weights=self._master_weights,
                frozen_sums=frozen_sums,
            )
            self._lists.let_go()

    def _cache(self) -> None:
        """Caches everything else that only a change of the parameters changes."""
        device = self._counts.device
        checkpoint.reserve(self)
        self._hyperparameters = HyperparameterTable([m.param_group for m in self._members], device)
        self._group_of = torch.tensor(self._group_ids, dtype=torch.long, device=device)
        if self.encoder.head.weight.device != device:  # torch moves no parameter that is a FakeTensor, not even to where it is
            self.encoder.to(device)
        self._table = None
        like = self.encoder.head.weight.detach()
        scales = like.new_zeros(4, len(self.groups))
        scales[:2] = 1
        scales[:, : self._scales.shape[1]] = self._scales  # groups that existed before keep what the last step gave them
        self._scales = scales
        shapes = {
            "_features": (len(self.groups), self.encoder.dim),
            "_statistics": (len(self._members), 7 if self.encoder.features.enhanced else 5),
            "_grad_norm": (),
        }
        for name, shape in shapes.items():  # of a model that moved, or a copy, they stay what the last step left
            old = getattr(self, name, None)
            setattr(self, name, like.new_zeros(shape) if old is None or old.shape != shape else old.to(like))
        if self.max_grad_norm is None:
            self._grad_norm = None
        if self._skipped is not None:
            self._skipped = self._skipped.to(device)
        if self._lagged is not None:
            self._lagged = self._lagged.to(like)

    def _current_lists(self, grads: Sequence[Tensor | None] | None = None) -> States:
        """The lists, made anew if somebody replaced a parameter, a state or the data of one, or if one gets its first gradient.

        They hold the tensors until the caller lets them go.

        Args:
            grads: T gradients; default: those that the parameters have.

        Raises:
            RuntimeError: the parameters have no data.
            ValueError: a parameter that no backend can update has a gradient; one is listed twice.
        """
        lists = self._lists
        if lists is not None and lists.take_up(self.state, self.param_groups):
            if not lists.lacks(lists.gradients() if grads is None else grads):
                return lists
            lists.let_go()
        self._take_up_params()
        device = self._device()
        if device.type == "meta":
            raise RuntimeError("the parameters are on the meta device: give the model its data before using the optimizer")
        on_device = device == self._counts.device and self._backend is not None and self._lists is not None
        self._prepare([local_gradient(m.param) for m in self._members] if grads is None else grads, listed=True)
        if on_device:
            self._hyperparameters = HyperparameterTable([m.param_group for m in self._members], device)
            self._table = None
        else:
            self._cache()
        lists = self._lists
        found = lists is not None and lists.take_up(self.state, self.param_groups)
        assert lists is not None
        assert found
        return lists

    # ---------------------------------------------------------------------------------- parameters that join, move and leave

    def _repeats(self) -> bool:
        """Whether ``param_groups`` list a parameter twice, as others can make them."""
        listed = [p for group in self.param_groups for p in group["params"]]
        return len(set(listed)) < len(listed)

    def _take_up_params(self) -> None:
        """Makes the members those that ``param_groups`` list now, in their order, whoever changed them.

        What joined gets a group, what left leaves with its state, and what takes the place of another of the same shape takes its
        name and group.

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
        self._follow(self._arrange())
        self._lists = None
        checkpoint.reserve(self)
        present = {p for p, _ in now}
        for p in [p for p in self.state if isinstance(p, Tensor) and p not in present]:
            del self.state[p]

    def _arrange(self) -> _Moved:
        """Members, groups and counts for what ``param_groups`` list; changes nothing if the grouping raises."""
        described = self._describe()
        before = {m.param: t for t, m in enumerate(self._members)}
        present = {m.param for m in described}
        gone = [t for t, m in enumerate(self._members) if m.param not in present]
        fresh = [m.param for m in described if m.param not in before]
        if len(gone) == len(fresh) and all(_alike(self._members[t].param, p) for t, p in zip(gone, fresh, strict=True)):
            before.update(zip(fresh, gone, strict=True))
        origins = [before.get(m.param) for m in described]
        # What is known stays: a copy of an optimizer has no model to ask for names.
        members = [
            new if t is None else replace(self._members[t], param=new.param, param_group=new.param_group)
            for new, t in zip(described, origins, strict=True)
        ]
        grouping_.resolve(self._grouping, members)
        groups = [replace(group, members=[], names=[], params=[]) for group in self.groups]
        ids = [None if t is None else self._group_ids[t] for t in origins]
        if self._grouping == "param_groups":  # whose numbers may have changed
            for number, member in zip(ids, members, strict=True):
                if number is not None:
                    groups[number] = replace(groups[number], key=member.param_group, name=f"param_group {member.param_group}")
        joined = [t for t, number in enumerate(ids) if number is None]
        for t, number in zip(joined, grouping_.assign(groups, members, self._grouping, joined), strict=True):
            ids[t] = number
        numbers = [number for number in ids if number is not None]
        used = sorted(set(numbers))
        names = {t: name for group in self.groups for t, name in zip(group.members, group.names, strict=True)}
        for number in used:
            of_group = [t for t, x in enumerate(numbers) if x == number]
            groups[number].members[:] = of_group
            groups[number].params[:] = [members[t].param for t in of_group]
            groups[number].names[:] = [
                (members[t].name or f"parameter {t}") if origin is None else names[origin]
                for t, origin in ((t, origins[t]) for t in of_group)
            ]
        counts = self._counts.new_zeros(len(members) + 1)
        kept = [t for t, origin in enumerate(origins) if origin is not None and self._members[origin].param is members[t].param]
        counts[[*kept, len(members)]] = self._counts[[*(origins[t] for t in kept), -1]]
        known = len(self.groups)
        self._members, self._counts = members, counts
        self._group_ids = [used.index(number) for number in numbers]
        self.groups = [groups[number] for number in used]
        return _Moved(origins, [number if number < known else None for number in used])

    def _follow(self, moved: _Moved) -> None:
        """Brings encoder, and what can be read of the last step, in the order of members and groups."""
        kept = [number for number in moved.groups if number is not None]
        self.encoder.keep_groups(kept)
        self.encoder.add_groups(len(moved.groups) - len(kept))  # behind the others: they are numbered as they came
        self._scales = self._scales[:, kept]
        features = self._features.new_zeros(len(moved.groups), self._features.shape[1])
        features[: len(kept)] = self._features[kept]
        statistics = self._statistics.new_zeros(len(moved.members), self._statistics.shape[1])
        here = [t for t, origin in enumerate(moved.members) if origin is not None]
        there = [origin for origin in moved.members if origin is not None]
        statistics[here] = self._statistics[there]
        if self._lagged is not None:  # the statistics of the last step are useless where a parameter was not among them
            self._lagged = self._lagged[there] if len(there) == len(moved.members) else None
        self._features, self._statistics = features, statistics
        self._cache()

    def release(self) -> None:
        """Lets go of all memory that the next step can make anew: tables, caches, a captured encoder graph.

        States stay, but for those of parameters that are no longer in ``param_groups``. Nothing that is left refers to the memory
        of a parameter, a gradient or a state, whether or not this is called: that is free as soon as it is replaced.
        """
        if not self._repeats():
            self._take_up_params()
        self._lists = self._table = None
        self.encoder.float64_copies = []
        self._hyperparameters = HyperparameterTable([m.param_group for m in self._members], self._counts.device)
        if self._encoder_graph is not None:
            self._encoder_graph = EncoderGraph()

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
        self._step_calls += 1
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not any(group["params"] for group in self.param_groups):
            return loss
        go = self._go()
        if go is False:
            return loss
        if devices.capturing(self._counts.device):
            self._check_capture()
        lists = self._current_lists()
        try:
            self._update_all(lists, go)
        finally:
            lists.let_go()
        return loss

    def _update_all(self, lists: States, go: Tensor | bool) -> None:
        """A step of all parameters that have a gradient."""
        self._record_stream()
        hyper = self._hyperparameters.update(self.param_groups)
        lists.counts.take_writes()
        if not lists.rows:
            lists.count(go)
            return
        loss_scale = getattr(self, "grad_scale", None)
        lists.set_gradients(lists.gradients())
        lists.take_up_copies()
        grad_norm = None
        if go is True and self._one_pass(lists):
            grad_scale, _ = gradient_factor(len(self._members), hyper.sign, self._loss_scale(loss_scale))
            sums = torch.empty(len(lists.rows), 5, dtype=torch.float64, device=lists.device)
            features, scales, vectors = self._decide(lists, hyper, grad_scale, None, go)
            self._update(lists, vectors, sums, go)
            sums = torch.cat([sums[:, :3], lists.exchange_sums(sums[:, 3:])], dim=1)
            statistics = of_scaled_gradient(self._rank_sums(lists.whole(sums)).to(self._statistics.dtype), grad_scale)
        else:
            sums, statistics = self._measure(lists)
            if self._skipped is not None:
                go = self._count_skipped(go, statistics)
                if go is False:
                    return
            grad_scale, grad_norm, statistics = self._scaled(statistics, hyper.sign, loss_scale)
            features, scales, vectors = self._decide(lists, hyper, grad_scale, statistics, go)
            self._update(lists, vectors, lists.new_sums(sums, go), go)
        lists.warm = True
        self._publish(go, _features=features, _scales=scales, _statistics=statistics)
        if grad_norm is not None:
            self._publish(go, _grad_norm=grad_norm)
        if self.statistics_mode == "lagged":
            self._lagged = self.lagged_statistics()
            self._publish(go, _lagged=statistics)

    _step_untraced = torch._disable_dynamo(_step)  # type: ignore[attr-defined]

    def _go(self) -> Tensor | bool:
        """Whether this step counts: True, False, or a 0-dim bool on the device, where the host must not wait to know.

        ``torch.amp.GradScaler`` sets ``found_inf`` and ``grad_scale`` for the time of a step.
        """
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        if found_inf is None:
            return True
        return not found_inf.item() if devices.readable(found_inf) else found_inf.reshape(()) == 0

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
        kept = [
            self._counts,
            self._group_of,
            self._features,
            self._scales,
            self._statistics,
            self._grad_norm,
            self._lagged,
            self._skipped,
        ]
        for holder in (self._lists, self._hyperparameters, self._table, self.encoder):
            kept += [] if holder is None else holder.kept()
        for x in kept:
            if x is not None:
                x.record_stream(stream)

    def _count_skipped(self, go: Tensor | bool, statistics: Tensor) -> Tensor | bool:
        """``go``, unless the gradients are not finite; counts that. A step that GradScaler calls off is not counted here."""
        assert self._skipped is not None
        finite = statistics[:, 0].sum().isfinite()
        self._skipped += ~finite & go
        go = finite & go
        return bool(go) if devices.readable(go) else go

    def _check_capture(self) -> None:
        """Raises RuntimeError on a step that a CUDA graph would not repeat as it is meant."""
        if not all(group["capturable"] for group in self.param_groups):
            raise RuntimeError("capturing step() in a CUDA graph needs capturable=True in all param groups")
        if self._lists is None or not self._lists.warm or not self._lists.take_up(self.state, self.param_groups):
            raise RuntimeError(
                "take a step before one is captured in a CUDA graph, also after parameters or states have changed: the first"
                " compiles kernels and fills tables"
            )
        self._lists.let_go()
        for index, member in enumerate(self._members):
            if member.param.requires_grad and member.param.grad is None:
                raise RuntimeError(
                    f"parameter {member.name or index} has no gradient: a captured step would leave it out at every replay."
                    " Call backward() before, or requires_grad_(False) if it is not to be trained"
                )

    def _publish(self, go: Tensor | bool, **tensors: Tensor) -> None:
        """What can be read of the step, unless it did not count. Where a graph may be replayed, in the tensors that are there."""
        in_place = any(group["capturable"] for group in self.param_groups)
        for name, new in tensors.items():
            old = getattr(self, name)
            new = torch.where(go, new, old) if isinstance(go, Tensor) else new
            if in_place:
                old.copy_(new)
            else:
                setattr(self, name, new)

    def _one_pass(self, lists: States) -> bool:
        """Whether the update itself can make the statistics: lagged, all gradients there, nothing to know of them before."""
        return (
            self.statistics_mode == "lagged"
            and self.max_grad_norm is None
            and self._skipped is None
            and not self.encoder.features.enhanced
            and lists.complete
            and lists.carried() is not None
        )

    def _measure(self, lists: States) -> tuple[Tensor, Tensor]:
        """Sums [T, S] of the gradients that ``lists`` has and of the state, a missing gradient counting as zeros.

        Returns:
            Those of this rank's shards, of the R parameters that have a state, and the statistics: those of all T whole tensors.
            One and the same where nothing is sharded or frozen.
        """
        counts, wanted = self.encoder.features.enhanced, self.encoder.head.weight.dtype
        dtype = torch.float64 if self._rank_sums.active else wanted
        # What the last update summed need not be read again: only g and m are. (A row that it left out has its sum in the dtype of
        # the statistics of then.)
        carried = lists.carried() if wanted == self._statistics.dtype else None
        if carried is None:
            sums = lists.launch.tensor_stats(True, True, counts, dtype)
        else:
            sums = lists.launch.tensor_stats(False, False, counts, dtype, carried)
        return sums, self._rank_sums(lists.whole(sums)).to(wanted)

    def _scaled(
        self, statistics: Tensor, sign: Tensor | None, loss_scale: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor]:
        """Unscaling (by 0-dim ``loss_scale``), clipping and maximizing (``sign`` [T]); the gradients themselves stay as they are.

        Returns:
            What the update multiplies the gradients with, float64 [T] (None if 1), the norm of the unscaled gradients before
            clipping (None without clipping), and the statistics of the gradients that are multiplied so.
        """
        if sign is None and loss_scale is None and self.max_grad_norm is None:
            return None, None, statistics
        scaled = self._backend.scaled_gradients(statistics, sign, self._loss_scale(loss_scale), self.max_grad_norm or 0.0)
        factors, norm, statistics = scaled
        return factors, None if self.max_grad_norm is None else norm, statistics

    def _loss_scale(self, loss_scale: Tensor | None) -> Tensor | None:
        return None if loss_scale is None else loss_scale.to(self._counts.device, torch.float32).reshape(())

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

    def _decide(
        self,
        lists: States,
        hyper: Hyperparameters,
        grad_scale: Tensor | None,
        statistics: Tensor | None,
        go: Tensor | bool,
    ) -> Decision:
        """What this step makes of its ``statistics`` [T, S], in lagged mode of those of the step before.

        The update multiplies the gradients with ``grad_scale``, float64 [T]; None is 1.
        """
        ahead, count = 1, go if isinstance(go, Tensor) else None
        if self.statistics_mode == "lagged":
            ahead, statistics = 0, None if self._lagged is None else self._lagged.to(self.encoder.head.weight.dtype)
        if statistics is None:
            return Decision(self._features, self._scales, self._modulation(lists, self._scales, hyper, grad_scale, count))

        def decide(written: Sequence[Any], replaced: Sequence[Any]) -> Decision:
            statistics, grad_scale, count = written
            features, scales = self._encode(statistics, ahead)
            return Decision(features, scales, self._modulation(lists, scales, Hyperparameters(*replaced), grad_scale, count))

        written = (statistics, grad_scale, count)
        if self._encoder_graph is None:
            decision = decide(written, hyper)
        else:
            # The counts are read where they lie.
            objects = (self._feature_table(statistics.dtype), self._group_of, self._backend, self._counts, lists.index)
            options = (ahead, self.total_steps, self.variant)
            decision = self._encoder_graph(decide, Sources(written, hyper, self.encoder, objects, options))
        if self.statistics_mode == "lagged" and self._lagged is not None:
            known = self._lagged[0, 0] != _NO_SUM
            decision = decision._replace(features=torch.where(known, decision.features, self._features))
        return decision

    def _modulation(
        self, lists: States, scales: Tensor, hyper: Hyperparameters, grad_scale: Tensor | None, go: Tensor | None
    ) -> Tensor:
        """The vectors of the update, [V, R], with step size lr·lr_scale and decay factor 1 - lr·lr_scale·wd_scale·λ."""
        vectors: Tensor = self._backend.modulation(
            scales, self._group_of, hyper.lr, hyper.weight_decay, hyper.beta1, hyper.beta2, hyper.eps, grad_scale,
            self._counts[:-1], go, self.variant == "released",
        )  # fmt: skip
        return lists.of_rows(vectors)

    def _update(
        self,
        lists: States,
        vectors: Tensor,
        new_sums: Tensor,
        go: Tensor | bool,
    ) -> None:
        """The update with the vectors that :meth:`_decide` returned."""
        lists.launch.adamw_update_(vectors, new_sums, self._rounding_seed)
        lists.after_update(go)
        if any(group["capturable"] for group in self.param_groups):
            # A CUDA graph replays the kernels but not this Python: it would miss a user's write to p, and Python would miss the
            # replay's. So the sums are never reused.
            lists.forget_sums()

    # ------------------------------------------------------------------------------------------------------- what can be read

    @property
    def steps_done(self) -> int:
        """How many steps have been taken; steps that a GradScaler skipped do not count. Waits for the device."""
        return int(self._counts[-1])

    @steps_done.setter
    def steps_done(self, value: int) -> None:
        self._counts[-1] = value
        self._set_steps = (self._set_steps[0] + 1, int(value))

    @property
    def skipped_steps(self) -> int:
        """How many steps ``skip_nonfinite`` left out. Waits for the device."""
        return 0 if self._skipped is None else int(self._skipped)

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
        return self._statistics

    @property
    def grad_norm(self) -> Tensor:
        """0-dim total 2-norm of the last step's gradient, before clipping; 0 before the first step."""
        return self._statistics[:, 0].sum().sqrt() if self._grad_norm is None else self._grad_norm

    def lagged_statistics(self) -> Tensor:
        """[T, S] what the next step of lagged mode takes its scales from; -1 everywhere if there is none yet."""
        return torch.full_like(self._statistics, _NO_SUM) if self._lagged is None else self._lagged

    def invalidate_statistics(self) -> None:
        """Tells that parameters or second moments were written where torch cannot see it.

        That is: in place through ``.data``, through numpy, or by kernels that raise no version counter: another library's, or those
        of another optimizer of torch's with ``fused=True`` on the same parameters, after each of its steps. The update sums what it
        writes, and the next step's statistics rely on these sums. In-place operations, ``p.data = x``, other tensors in ``state``,
        ``load_state_dict`` and ``add_param_group`` are noticed without this call. Of DTensors, two more need it, which torch does
        not count either: ``torch._foreach_*_``, and in place through ``p.detach().to_local()``.

        What such a write changes without this call are statistics, and through them the scales: with exact statistics also those of
        a frozen parameter, whose norm is read once, and with ``master_weights`` those of the one step that takes the write up. In a
        captured CUDA graph the norms of frozen parameters are those of the capture.
        """
        if self._lists is not None:
            self._lists.invalidate()

    # ----------------------------------------------------------------------------------------------------------- checkpoints

    # Both methods call the user's hooks themselves, where torch would call them. A hook of ours, registered for the time of a call,
    # would change a dict that the call of another thread iterates over.

    @devices.outside_inference_mode
    def state_dict(self) -> dict[str, Any]:
        """Torch's state dict with one key more, ``metaadamw``: encoder, step count and what else a bitwise resume needs.

        Raises:
            ValueError: ``param_groups`` list a new parameter that no backend can update.
        """
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        if not self._repeats():  # else they are numbered as torch numbers them
            self._take_up_params()
        state_dict = checkpoint.saved(self)
        for after in self._optimizer_state_dict_post_hooks.values():
            replaced = after(self, state_dict)
            state_dict = state_dict if replaced is None else replaced
        return state_dict

    @devices.outside_inference_mode
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a checkpoint of MetaAdamW, or of ``torch.optim.AdamW`` (the encoder then stays as it is, with a warning).

        Moments keep their saved dtypes. ``state_dict`` is copied, never changed or referred to. Where only one side knows the
        parameters' names, which decide the groups, parameters match by their positions; the encoder is loaded, too, if there are
        as many groups.

        Raises:
            ValueError: a checkpoint of another model, grouping or encoder; the optimizer is unchanged then.
            RuntimeError: parameters on the meta device.
        """
        state_dict = copy.copy(state_dict)  # pre-hooks may change it
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = before(self, state_dict)
            state_dict = state_dict if replaced is None else replaced
        if self._device().type == "meta":
            raise RuntimeError("the parameters are on the meta device: give the model its data before loading a checkpoint")
        if not self._repeats():
            self._take_up_params()
        checkpoint.load(self, state_dict)
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def __getstate__(self) -> dict[str, Any]:
        # As torch's optimizers leave it to who copies or loads: hooks, and the `step` that an LR scheduler wraps.
        kept = {name: x for name, x in self.__dict__.items() if name != "step" and not name.startswith("_optimizer_")}
        # The first step of the copy makes these anew. A backend is a class that need not have a name to be pickled by.
        anew = {"_model": None, "_stream": None, "_lists": None, "_backend": None, "_rank_sums": RankSums([])}
        # By value: a spawned process gets the memory of tensors, and that of a copy made here would be gone before it starts.
        counts = self._counts if devices.is_fake(self._counts) else self._counts.tolist()
        return {**kept, **anew, "_counts": counts}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if not isinstance(self._counts, Tensor):
            self._counts = torch.tensor(self._counts, dtype=torch.float64, device="cpu")
        for group in self.param_groups:
            for name in ("amsgrad", "maximize", "capturable"):
                group.setdefault(name, False)


def _alike(old: Tensor, new: Tensor) -> bool:
    """Whether a parameter may stand for another: of one shape."""
    return not is_lazy(old) and not is_lazy(new) and old.shape == new.shape
