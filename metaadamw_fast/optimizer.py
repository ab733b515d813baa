"""MetaAdamW: states, lists and the step. No arithmetic on elements happens here; see ops.py.

The file is one class, read top to bottom: what it is made of, the step, what can be read, checkpoints.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from . import checkpoint, rounding, sync
from . import grouping as grouping_
from .encoder import EncoderConfig, GroupEncoder, check_encoder
from .encoder_graph import Decision, EncoderGraph, Sources
from .features import FeatureConfig, FeatureTable, feature_table, of_scaled_gradient
from .hyperparameters import Hyperparameters, HyperparameterTable, check_hyperparameters
from .lists import StateLists
from .ops import FakeBackend, resolve_backend
from .reference import gradient_factor
from .sharding import RankSums, check_supported, refuse_zero

# Instead of a sum of squares: lagged mode has none yet. Its square root is NaN, so the encoder leaves every group at scale 1.
_NO_SUM = -1.0


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
            the parameter. Statistics are the copy's.
        stochastic_rounding: round bfloat16 and float16 parameters and moments up or down by chance, right in the mean, so that
            small updates are not lost. The same for the same ``seed``, step and parameters; a checkpoint brings its own seed.
        skip_nonfinite: take no step whose gradients are not finite (their sum of squares is not); decided on the device, counted in
            ``skipped_steps``. Without it the affected group alone is masked out of the encoder.
        variant: ``paper``, or ``released`` for the arithmetic of the authors' code.
        backend: ``auto``, ``cpp``, ``triton`` or ``reference``; see :func:`metaadamw_fast.backend_report`.
        encoder_graph: replay features, encoder and what the update takes of the scales as one CUDA graph, captured after the first
            steps and again when something changes. The same numbers in fewer launches; a capture waits for the GPU once. Where
            it is not possible, the logger ``metaadamw_fast`` says why.

    Raises:
        ValueError: a hyper-parameter out of range, parameters that are complex, not floating or on several devices, missing names
            for a grouping that needs them, a feature width that the heads do not divide, an argument that contradicts a ready
            encoder.
        TypeError: ``encoder``, ``features`` or ``model`` of another type.
        RuntimeError: the chosen backend cannot run; ``differentiable=True``.
    """

    _step_supports_amp_scaling = True  # torch.amp.GradScaler leaves unscaling and skipping to the step

    @sync.outside_inference_mode
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
    ) -> None:
        for name, value, choices in (
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
        # Steps taken; from the first lists on, on the parameters' device, which may decide that one is none.
        self._done = torch.zeros((), dtype=torch.float32, device="cpu")
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
        self._stream: torch.Stream | None = None  # of the last step
        self._encoder_graph = EncoderGraph() if encoder_graph else None
        self._built = False
        super().__init__(params, defaults)

        self._grouping = grouping_.resolve(grouping, self._describe())
        self._assign_groups()
        resolve_backend(backend, self._device())  # before a ready encoder is touched
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
        self._build()

    # ------------------------------------------------------------------------------------------------------- construction

    @sync.outside_inference_mode
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds parameters, as ``torch.optim.Optimizer.add_param_group``; groups that exist keep their ids.

        Raises:
            ValueError, RuntimeError: as the constructor.
            RuntimeError: parameters were added or removed by other means before.
        """
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group must be a dict, but got {type(param_group)}")
        check_hyperparameters({**self.defaults, **param_group})
        if self._built:
            self._take_up_params()
        super().add_param_group(param_group)
        try:
            self._check_params()
            before = len(self.groups)
            if self._built:
                self._assign_groups()
        except Exception:
            self.param_groups.pop()
            raise
        self.param_groups[-1]["betas"] = tuple(float(beta) for beta in self.param_groups[-1]["betas"])
        if self._built:
            self.encoder.add_groups(len(self.groups) - before)
            self._build()

    def _check_params(self) -> None:
        """Raises ValueError on parameters that no backend can update."""
        params = [p for group in self.param_groups for p in group["params"]]
        for p in params:
            if p.is_complex() or not p.is_floating_point() or p.layout is not torch.strided:
                raise ValueError(f"MetaAdamW needs dense real floating-point parameters, got {p.dtype}, {p.layout}")
            if p.numel() and any(stride == 0 and size > 1 for stride, size in zip(p.stride(), p.shape, strict=True)):
                raise ValueError("MetaAdamW cannot update an expanded parameter: its elements share memory")
        if len(set(params)) < len(params):
            raise ValueError("MetaAdamW got a parameter group with duplicate parameters")
        check_supported(params, None if self._model is None else self._model())
        devices = sorted({str(p.device) for p in params})
        if len(devices) > 1:
            raise ValueError(f"MetaAdamW needs all parameters on one device, got {', '.join(devices)}")
        if devices and not devices[0].startswith("cuda") and any(g["capturable"] for g in self.param_groups):
            raise ValueError(f"capturable=True needs parameters on a CUDA device, got {devices[0]}")

    def _describe(self) -> list[grouping_.Member]:
        rows = []
        for index, group in enumerate(self.param_groups):
            names = group.get("param_names", [None] * len(group["params"]))
            rows += [(name, param, index) for name, param in zip(names, group["params"], strict=True)]
        return grouping_.describe(rows, None if self._model is None else self._model())

    def _device(self) -> torch.device:
        return self._members[0].param.device if self._members else torch.device("cpu")

    def _assign_groups(self) -> None:
        """Extends groups by the parameters that came since the last call; changes nothing if the grouping raises."""
        known = len(self._members)
        members = self._members + self._describe()[known:]  # what is known stays: a copy of an optimizer has no model to ask
        grouping_.resolve(self._grouping, members)
        self._group_ids += grouping_.assign(self.groups, members, self._grouping, known)
        self._members = members

    def _build(self) -> None:
        """Caches everything that only a change of the parameters changes, and allocates the states that are missing."""
        device = self._device()
        on_meta = device.type == "meta"  # no data yet: states and the choice of a backend wait for the first step
        device = torch.device("cpu") if on_meta else device
        self._backend = resolve_backend(self._backend_name, device)
        if any(sync.is_fake(member.param) for member in self._members):
            self._backend = FakeBackend
        self._rank_sums = RankSums([m.param for m in self._members], self._rank_sums)
        self._lists = None if on_meta else self._list_states(device)
        checkpoint.reserve(self)
        self._hyperparameters = HyperparameterTable([m.param_group for m in self._members], device)
        self._group_of = torch.tensor(self._group_ids, dtype=torch.long, device=device)
        if self.encoder.head.weight.device != device:  # torch moves no parameter that is a FakeTensor, not even to where it is
            self.encoder.to(device)
        self._table: FeatureTable | None = None
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
        if self._lagged is not None:  # a model that moved; other parameters make the statistics of the last step useless
            self._lagged = self._lagged.to(like) if self._lagged.shape[0] == len(self._members) else None

    def _list_states(self, device: torch.device) -> StateLists:
        lists = StateLists(
            self._members,
            self.state,
            self.param_groups,
            device,
            self._backend.launch,
            self._done,
            state_dtype=self._state_dtype,
            master_weights=self._master_weights,
        )
        self._done = lists.done
        return lists

    def _current_lists(self) -> StateLists:
        """The lists, made anew if somebody replaced a parameter, a state or the data of one since they were made.

        Raises:
            RuntimeError: parameters were added or removed behind add_param_group's back, or have no data.
            ValueError: a parameter put in the place of another that no backend can update.
        """
        if self._lists is not None and not self._lists.stale(self.state, self.param_groups):
            return self._lists
        self._take_up_params()
        if self._device().type == "meta":
            raise RuntimeError("the parameters are on the meta device: give the model its data before using the optimizer")
        if self._lists is None or self._device() != self._lists.device:
            self._build()
        else:
            self._rank_sums = RankSums([m.param for m in self._members], self._rank_sums)
            self._hyperparameters = HyperparameterTable([m.param_group for m in self._members], self._device())
            self._lists = self._list_states(self._device())
            self._table = None
        assert self._lists is not None
        return self._lists

    def _take_up_params(self) -> None:
        """Makes the members those that ``param_groups`` list now, in their order: moved, or others in the places of some."""
        now = {p: index for index, group in enumerate(self.param_groups) for p in group["params"]}
        listed = sum(len(group["params"]) for group in self.param_groups)
        if listed != len(self._members):
            raise RuntimeError(
                f"param_groups list {listed} parameters instead of {len(self._members)}: use add_param_group. (A parameter without"
                " a gradient is left alone.)"
            )
        known = {member.param for member in self._members}
        if now.keys() != known:
            self._check_params()
        fresh = iter([p for p in now if p not in known])
        params = [member.param if member.param in now else next(fresh) for member in self._members]
        position = {p: i for i, p in enumerate(now)}
        order = sorted(range(len(params)), key=lambda t: position[params[t]])
        members = [replace(self._members[t], param=params[t], param_group=now[params[t]]) for t in order]
        both = zip(members, self._members, strict=True)
        if all(new.param is old.param and new.param_group == old.param_group for new, old in both):
            return
        self._members, self._lists = members, None
        self._group_ids = [self._group_ids[t] for t in order]
        for number, group in enumerate(self.groups):
            names = dict(zip(group.members, group.names, strict=True))
            group.members[:] = [t for t, g in enumerate(self._group_ids) if g == number]
            group.names[:] = [names[order[t]] for t in group.members]
            group.params[:] = [members[t].param for t in group.members]
        self._statistics = self._statistics[order]
        self._lagged = None if self._lagged is None else self._lagged[order]
        checkpoint.reserve(self)

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
            ValueError: a param group was given fewer or more than two betas. Nothing has changed then.
        """
        # torch.compile breaks its graph here: the launch table's addresses mean nothing to what it traces.
        return self._step_untraced(closure) if torch.compiler.is_compiling() else self._step(closure)

    @sync.outside_inference_mode
    @torch.no_grad()
    def _step(self, closure: Callable[[], Any] | None) -> Any:
        self._step_calls += 1
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self._members:
            return loss
        go = self._go()
        if go is False:
            return loss
        if sync.capturing(self._device()):
            self._check_capture()
        lists = self._current_lists()
        self._record_stream()
        hyper = self._hyperparameters.update(self.param_groups)
        loss_scale = getattr(self, "grad_scale", None)
        lists.set_gradients(lists.gradients())
        lists.take_up_copies()
        grad_norm = None
        if go is True and self._one_pass(lists):
            grad_scale, _ = gradient_factor(len(self._members), hyper.sign, self._loss_scale(loss_scale))
            sums = torch.empty(len(self._members), 5, dtype=torch.float64, device=lists.device)
            features, scales, vectors = self._decide(lists, hyper, grad_scale, None, go)
            self._update(lists, vectors, sums, go)
            sums = torch.cat([sums[:, :3], lists.exchange_sums(sums[:, 3:])], dim=1)
            statistics = of_scaled_gradient(self._rank_sums(sums).to(self._statistics.dtype), grad_scale)
        else:
            sums, statistics = self._measure(lists)
            if self._skipped is not None:
                go = self._count_skipped(go, statistics)
                if go is False:
                    return loss
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
        return loss

    _step_untraced = torch._disable_dynamo(_step)  # type: ignore[attr-defined]

    def _go(self) -> Tensor | bool:
        """Whether this step counts: True, False, or a 0-dim bool on the device, where the host must not wait to know.

        ``torch.amp.GradScaler`` sets ``found_inf`` and ``grad_scale`` for the time of a step.
        """
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        if found_inf is None:
            return True
        return not found_inf.item() if sync.readable(found_inf) else found_inf.reshape(()) == 0

    def _record_stream(self) -> None:
        """Tells torch's allocator when the optimizer's own tensors are used on another stream than before.

        The allocator hands a freed block at once to the next allocation on the stream that it was allocated on. A kernel on another
        stream may still read it: a launch table, say, that is replaced because a gradient came in another layout. So we name each
        stream to the allocator, which then waits for it, too.
        """
        stream = None if self._backend is FakeBackend else sync.current_stream(self._device())
        if stream is None or stream == self._stream or sync.capturing(self._device()):
            return
        self._stream = stream
        kept = [self._group_of, self._features, self._scales, self._statistics, self._grad_norm, self._lagged, self._skipped]
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
        return bool(go) if sync.readable(go) else go

    def _check_capture(self) -> None:
        """Raises RuntimeError on a step that a CUDA graph would not repeat as it is meant."""
        if not all(group["capturable"] for group in self.param_groups):
            raise RuntimeError("capturing step() in a CUDA graph needs capturable=True in all param groups")
        if self._lists is None or not self._lists.warm or self._lists.stale(self.state, self.param_groups):
            raise RuntimeError(
                "take a step before one is captured in a CUDA graph, also after parameters or states have changed: the first"
                " compiles kernels and fills tables"
            )
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

    def _one_pass(self, lists: StateLists) -> bool:
        """Whether the update itself can make the statistics: lagged, all gradients there, nothing to know of them before."""
        return (
            self.statistics_mode == "lagged"
            and self.max_grad_norm is None
            and self._skipped is None
            and not self.encoder.features.enhanced
            and lists.complete
            and lists.carried() is not None
        )

    def _measure(self, lists: StateLists) -> tuple[Tensor, Tensor]:
        """Sums [T, S] of the gradients that ``lists`` has and of the state, a missing gradient counting as zeros.

        Returns:
            Those of this rank's shards, and the statistics: those of whole tensors. One and the same where nothing is sharded.
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
        return sums, self._rank_sums(sums).to(wanted)

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
        return None if loss_scale is None else loss_scale.to(self._done.device, torch.float32).reshape(())

    def _encode(self, statistics: Tensor, ahead: int, done: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Features [G, D] and scales [4, G] when ``ahead`` more steps are taken; with their graph if gradients are enabled."""
        table, done = self._feature_table(statistics.dtype), self._done if done is None else done
        features = self._backend.group_features(statistics, table, done, ahead, self.total_steps)
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
        lists: StateLists,
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
            vectors = self._modulation(self._scales, hyper, grad_scale, lists.steps, count)
            return Decision(self._features, self._scales, vectors)

        def decide(written: Sequence[Any], replaced: Sequence[Any]) -> Decision:
            statistics, done, grad_scale, steps, count = written
            features, scales = self._encode(statistics, ahead, done)
            return Decision(features, scales, self._modulation(scales, Hyperparameters(*replaced), grad_scale, steps, count))

        written = (statistics, self._done, grad_scale, lists.steps, count)
        if self._encoder_graph is None:
            decision = decide(written, hyper)
        else:
            objects = (self._feature_table(statistics.dtype), self._group_of, self._backend)
            options = (ahead, self.total_steps, self.variant)
            decision = self._encoder_graph(decide, Sources(written, hyper, self.encoder, objects, options))
        if self.statistics_mode == "lagged" and self._lagged is not None:
            known = self._lagged[0, 0] != _NO_SUM
            decision = decision._replace(features=torch.where(known, decision.features, self._features))
        return decision

    def _modulation(
        self, scales: Tensor, hyper: Hyperparameters, grad_scale: Tensor | None, steps: Tensor, go: Tensor | None
    ) -> Tensor:
        """The vectors of the update, [V, T], with step size lr·lr_scale and decay factor 1 - lr·lr_scale·wd_scale·λ."""
        vectors: Tensor = self._backend.modulation(
            scales, self._group_of, hyper.lr, hyper.weight_decay, hyper.beta1, hyper.beta2, hyper.eps, grad_scale, steps, go,
            self.variant == "released",
        )  # fmt: skip
        return vectors

    def _update(
        self,
        lists: StateLists,
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
        return int(self._done)

    @steps_done.setter
    def steps_done(self, value: int) -> None:
        self._done.fill_(value)
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
        """
        if self._lists is not None:
            self._lists.invalidate()

    # ----------------------------------------------------------------------------------------------------------- checkpoints

    # Both methods call the user's hooks themselves, where torch would call them. A hook of ours, registered for the time of a call,
    # would change a dict that the call of another thread iterates over.

    @sync.outside_inference_mode
    def state_dict(self) -> dict[str, Any]:
        """Torch's state dict with one key more, ``metaadamw``: encoder, step count and what else a bitwise resume needs.

        Raises:
            RuntimeError: parameters were added or removed by other means than add_param_group.
        """
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        self._take_up_params()
        state_dict = checkpoint.saved(self)
        for after in self._optimizer_state_dict_post_hooks.values():
            replaced = after(self, state_dict)
            state_dict = state_dict if replaced is None else replaced
        return state_dict

    @sync.outside_inference_mode
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a checkpoint of MetaAdamW, or of ``torch.optim.AdamW`` (the encoder then stays as it is, with a warning).

        Moments keep their saved dtypes. ``state_dict`` is copied, never changed or referred to. Where only one side knows the
        parameters' names, which decide the groups, parameters match by their positions; the encoder is loaded, too, if there are
        as many groups.

        Raises:
            ValueError: a checkpoint of another model, grouping or encoder; the optimizer is unchanged then.
            RuntimeError: parameters on the meta device, or added or removed by other means than add_param_group.
        """
        state_dict = copy.copy(state_dict)  # pre-hooks may change it
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = before(self, state_dict)
            state_dict = state_dict if replaced is None else replaced
        if self._device().type == "meta":
            raise RuntimeError("the parameters are on the meta device: give the model its data before loading a checkpoint")
        self._take_up_params()
        checkpoint.load(self, state_dict)
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def __getstate__(self) -> dict[str, Any]:
        # As torch's optimizers leave it to who copies or loads: hooks, and the `step` that an LR scheduler wraps.
        kept = {name: x for name, x in self.__dict__.items() if name != "step" and not name.startswith("_optimizer_")}
        # The first step of the copy makes these anew. A backend is a class that need not have a name to be pickled by.
        return {**kept, "_model": None, "_stream": None, "_lists": None, "_backend": None, "_rank_sums": RankSums([])}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for name in ("amsgrad", "maximize", "capturable"):
                group.setdefault(name, False)
