"""The meta-update: training the encoder while the model trains. MetaAdamW sections 3.4 and 3.5, algorithm 2.

One class in one file, read top to bottom as the algorithm is: what is asked for, the update, its objective, the meta-optimizer.
Losses and gradients are in evaluation.py, the hypothetical step in lookahead.py, how the model stays as it was in model_state.py.
Longer than 300 lines: two fifths of it document and check what is asked for.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import torch
from torch import Tensor, nn

from .core import devices
from .core.sharding import check_supported, is_sharded, local, local_gradient
from .encoder import threads_for
from .evaluation import Evaluation, Gradients, LossFn, MicroBatches, no_second_derivative, warn_of_differences, write
from .features import NORM_FLOOR
from .lookahead import LookAhead
from .meta_checkpoint import check_learner, with_adam_states
from .model_state import ModelState
from .optimizer import MetaAdamW
from .parallel import has_static_graph, replicas, reshard
from .schedule import Endless, Schedule
from .weighting import TERM_KINDS, clamp_log_vars_, homoscedastic_sum

TERMS = ("gradient", "loss_decrease", "gen_gap")  # the order of log_vars, priorities, kinds and fixed weights
__all__ = ["MetaLearner", "MetaReport", "MicroBatches"]


@dataclass(frozen=True)
class MetaReport:
    """What one meta-update saw; 0-dim tensors unless noted, read without a host sync until you ask for numbers.

    Attributes:
        total: the meta-objective, regularisers included.
        gradient_alignment, loss_decrease, generalization_gap: its terms; None where the objective has no such term.
        log_vars: [3], after the update.
        lr_scale, wd_scale: [G], the scales that the look-ahead used.
        applied: bool, on the CPU: whether the meta-optimizer stepped. Not where the objective or its gradient is not finite.
    """

    total: Tensor
    gradient_alignment: Tensor | None
    loss_decrease: Tensor | None
    generalization_gap: Tensor | None
    log_vars: Tensor
    lr_scale: Tensor
    wd_scale: Tensor
    applied: Tensor


class MetaLearner:
    """Trains the encoder of a :class:`~metaadamw_fast.MetaAdamW` by looking one step ahead.

    Args:
        optimizer: whose encoder is trained. It may be inside the wrappers of Lightning, Fabric or Accelerate.
        model: the model that ``optimizer`` trains. With ``DistributedDataParallel``, compiled or inside another module too, and
            ``fully_shard`` (FSDP2) all ranks make the same update, from the mean of their losses and gradients.
        loss_fn: ``loss_fn(model, batch) -> scalar tensor``. A batch is whatever it takes.
        objective: ``gradient``, ``loss_decrease``, ``gen_gap`` or ``combined``.
        balance: how ``combined`` adds its terms: ``huw`` (learned, homoscedastic), ``fixed`` or ``sum``.
        priorities, term_kinds: per term, for ``huw``; see :func:`metaadamw_fast.weighting.homoscedastic_sum`.
        fixed_weights: per term, for ``fixed``.
        lr, make_optimizer: of the meta-optimizer, called as ``make_optimizer(params, lr=lr)``.
        encoder_decay: c_wd, on the sum of the 2-norms (not squared) of the encoder layers' tensors and of head.weight.
        gate_l1: c_gate, on Σ|gate|, with feature gating.
        hvp: how the gradient-alignment term is differentiated, which needs one Hessian-vector product: ``exact`` by a second
            backward pass through the model at the look-ahead; ``finite_difference`` by a central difference of two gradients, which
            works with every model, flash attention and activation checkpointing too; ``auto``: exact, or differences from the first
            update on in which torch says that an operation has no second derivative (one warning), and with sharded
            parameters.
        gap_at: where the generalization gap is evaluated: ``theta`` (the paper: it then has no gradient to the encoder) or
            ``lookahead``.
        scaler: the ``torch.amp.GradScaler`` of the training loop, if any: its scale keeps float16 gradients from vanishing.

    Raises:
        TypeError: an optimizer that is no MetaAdamW, nor a wrapper of one.
        ValueError: an unknown choice, a weight that is not finite, a parameter of the optimizer that is not in the model,
            ``hvp="exact"`` with DTensors, ``DistributedDataParallel`` modules on different ranks.
    """

    @devices.outside_inference_mode
    def __init__(
        self,
        optimizer: MetaAdamW,
        model: nn.Module,
        loss_fn: LossFn,
        *,
        objective: str = "combined",
        balance: str = "huw",
        priorities: Sequence[float] = (1.0, 1.0, 1.0),
        term_kinds: Sequence[str] = ("regression",) * 3,
        fixed_weights: Sequence[float] = (1.0, 0.3, 0.3),
        lr: float = 1e-3,
        make_optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.Adam,
        encoder_decay: float = 1e-4,
        gate_l1: float = 1e-4,
        hvp: str = "auto",
        gap_at: str = "theta",
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        unwrapped = _unwrapped(optimizer)
        if unwrapped is None:
            raise TypeError(f"a MetaLearner trains the encoder of a MetaAdamW, got {type(optimizer).__name__}")
        optimizer = unwrapped
        for name, value, choices in (
            ("objective", objective, (*TERMS, "combined")),
            ("balance", balance, ("huw", "fixed", "sum")),
            ("hvp", hvp, ("auto", "exact", "finite_difference")),
            ("gap_at", gap_at, ("theta", "lookahead")),
        ):
            if value not in choices:
                raise ValueError(f"Invalid {name}: {value!r} (one of {', '.join(choices)})")
        for name, values in (("priorities", priorities), ("term_kinds", term_kinds), ("fixed_weights", fixed_weights)):
            if len(values) != len(TERMS):
                raise ValueError(f"{name} needs one entry per term ({', '.join(TERMS)}), got {len(values)}")
        if any(kind not in TERM_KINDS for kind in term_kinds):
            raise ValueError(f"Invalid term_kinds: {tuple(term_kinds)} (each one of {', '.join(TERM_KINDS)})")
        factors = {"priorities": priorities, "fixed_weights": fixed_weights, "encoder_decay": [encoder_decay], "gate_l1": [gate_l1]}
        for name, numbers in factors.items():
            if not all(math.isfinite(x) for x in numbers):
                raise ValueError(f"Invalid {name}: {numbers} (must be finite)")
        if scaler is not None and not hasattr(scaler, "get_scale"):
            raise ValueError(f"Invalid scaler: {type(scaler).__name__} (a torch.amp.GradScaler or None)")
        reshard(model)
        params = [p for group in optimizer.groups for p in group.params]
        check_supported(params, model)
        replicas(model)
        if any(map(is_sharded, params)):
            if hvp == "exact":
                raise ValueError('hvp="exact" cannot differentiate twice through sharded parameters: use "finite_difference"')
            hvp = "finite_difference"
        owned = set(model.parameters())
        for group in optimizer.groups:
            for name, param in zip(group.names, group.params, strict=True):
                if param not in owned:
                    raise ValueError(f"the optimizer's {name} is not a parameter of the model")
        self.optimizer = optimizer
        self.model = model
        self.loss_fn = loss_fn
        self.terms = TERMS if objective == "combined" else (objective,)
        self.balance = balance if objective == "combined" else "sum"
        self.priorities = tuple(priorities)
        self.term_kinds = tuple(term_kinds)
        self.fixed_weights = tuple(fixed_weights)
        self.encoder_decay = encoder_decay
        self.gate_l1 = gate_l1
        self.gap_at = gap_at
        self.hvp = hvp
        self._exact_works = False  # known from the first update on
        self.scaler = scaler
        self.updates = 0
        self._idle_since = optimizer.step_calls if has_static_graph(model) else None
        device = optimizer.encoder.head.weight.device
        self.log_vars = nn.Parameter(torch.zeros(len(TERMS), dtype=optimizer.encoder.head.weight.dtype, device=device))
        self.meta_optimizer = make_optimizer(self._trained(), lr=lr)

    # ---------------------------------------------------------------------------------------------------------- the update

    @devices.outside_inference_mode
    def update(self, batch_a: Any, batch_b: Any, val_batch: Any = None, gap_batch: Any = None) -> MetaReport:
        """One meta-update. The model and the optimizer's state stay as they are, bit for bit.

        That is: parameters, gradients, buffers, modes, plain attributes of modules, torch's random state; also after an exception,
        even one that Ctrl-C or a signal handler raises while they are put back. (Frozen parameters are not copied: what a forward
        pass writes into their memory stays.) If the objective or its gradient is not finite, encoder, log-variances and
        meta-optimizer stay as they are too; ``applied`` of the report tells.

        Gradients are those of ``loss_fn``. Backward hooks do not run, neither those of parameters and modules nor a communication
        hook of ``DistributedDataParallel``: they would take a look-ahead for a training step.

        Args:
            batch_a: B1, whose gradient the hypothetical step takes.
            batch_b: B2, whose gradient is compared after it.
            val_batch: Bv, for the loss decrease and the generalization gap.
            gap_batch: for the generalization gap, if it is to draw a batch of its own; default ``val_batch``.

        Returns:
            The terms and the scales.

        Raises:
            ValueError: an objective that needs a validation batch got none; a loss that is not a scalar or has no gradient;
                param groups of which only some maximize; bfloat16 or float16 parameters, in which a look-ahead is lost in rounding.
            RuntimeError: a version of torch in which an unreduced gradient of FSDP2 is not found; no training step yet with
                ``DistributedDataParallel(static_graph=True)``.
        """
        if val_batch is None and self.terms != ("gradient",):
            raise ValueError("this objective needs val_batch")
        if self._idle_since is not None:
            if self.optimizer.step_calls == self._idle_since:
                raise RuntimeError(
                    "DistributedDataParallel(static_graph=True) takes the first backward pass for the model of all others: take a"
                    " training step before the first meta-update"
                )
            self._idle_since = None
        gap_batch = val_batch if gap_batch is None else gap_batch
        reshard(self.model)  # a forward pass without a backward may have left an FSDP2 module gathered
        released = self.optimizer.variant == "released"
        rank_sums = self.optimizer.rank_sums
        leaves = [p for group in self.optimizer.param_groups for p in group["params"]]
        last_grads = [local_gradient(p) for p in leaves] if released else []
        self._check_dtypes(leaves)
        # The released code's θ′ is made from stored moments, so that parameters which have been frozen since move, too.
        state = ModelState(self.model, leaves, frozen=released)
        with state, state, torch.enable_grad():
            state.set_aside()
            params = [local(p) for p in leaves]
            theta = [state.values.get(p, shard) for p, shard in zip(leaves, params, strict=True)]
            evaluation = Evaluation(self.loss_fn, self.model, leaves, self._sign(), state, rank_sums, self.scaler)
            loss_a, g1 = evaluation.gradient(batch_a)
            ahead = self.optimizer.look_ahead(g1, last_grads)
            g1 = [None if g is None else g * ahead.clip for g in g1]
            before = evaluation.loss(val_batch) if "loss_decrease" in self.terms else None
            terms = {}
            if "gen_gap" in self.terms and self.gap_at == "theta":
                gap_loss = before if before is not None and gap_batch is val_batch else evaluation.loss(gap_batch)
                terms["gen_gap"] = (loss_a - gap_loss).abs()
            # Each loss at θ′, and its gradient with respect to the scales [4, G]. That with respect to θ′ is as large as the model,
            # and is free as soon as its dot products are known.
            values: dict[str, tuple[Tensor, Tensor]] = {}

            def loss_ahead(batch: Any) -> tuple[Tensor, Tensor]:
                value, gradient = evaluation.gradient(batch)
                return value.requires_grad_(), ahead.gradient_of_scales(theta, gradient)

            write(params, ahead.parameters(theta))
            gap_ahead = "gen_gap" in self.terms and self.gap_at == "lookahead"
            if "loss_decrease" in self.terms or (gap_ahead and gap_batch is val_batch):
                values["val"] = loss_ahead(val_batch)
            if gap_ahead:
                values["a"] = loss_ahead(batch_a)
                if gap_batch is not val_batch:
                    values["gap"] = loss_ahead(gap_batch)
                terms["gen_gap"] = (values["a"][0] - values["val" if gap_batch is val_batch else "gap"][0]).abs()
            if before is not None:
                terms["loss_decrease"] = values["val"][0] - before
            if "gradient" in self.terms:  # last: a central difference leaves the parameters at θ′ - h·w
                terms["gradient"], gradient = self._alignment(evaluation, batch_b, ahead, g1)
                values["gradient"] = terms["gradient"], ahead.gradient_of_scales(theta, gradient)
            total = self._total(terms)
            of_scales = torch.zeros_like(ahead.scales)
            if values:
                factors = torch.autograd.grad(total, [value for value, _ in values.values()], retain_graph=True)
                of_scales = sum((f * change for f, (_, change) in zip(factors, values.values(), strict=True)), of_scales)
            with threads_for(ahead.scales.shape[1], ahead.scales.device):
                applied = self._descend(total, ahead.scales, of_scales)
        scales = ahead.scales
        return MetaReport(
            total.detach(),
            *(terms[name].detach() if name in terms else None for name in TERMS),  # type: ignore[arg-type, call-arg]
            self.log_vars.detach().clone(),
            scales[0].detach(),
            scales[1].detach(),
            torch.tensor(applied, device="cpu"),
        )

    def every(
        self, steps: int, train: Iterable[Any], val: Iterable[Any] | None = None, *, warm_up: int = 0
    ) -> Callable[[], MetaReport | None]:
        """A function to call after every ``optimizer.step()``: it updates after each ``steps`` of them.

        It follows the optimizer's own count: steps that a GradScaler or ``skip_nonfinite`` leaves out are none, and a checkpoint
        that is loaded later goes on where it was saved. It waits for the device only where an update may be due.

        Args:
            steps: from one meta-update to the next, which comes where ``steps_done`` of the optimizer is a multiple of it.
            train, val: where batches come from: two of ``train`` and, if given, one of ``val`` for each update. What can be
                iterated again, as a DataLoader, is begun again at its end.
            warm_up: steps of the optimizer before the first update is possible.

        Returns:
            A function without arguments: the report of the update, or None where there was none.

        Raises:
            ValueError: ``steps`` is less than 1; ``train`` or ``val`` has no (more) batches when one is needed.
        """
        if steps < 1:
            raise ValueError(f"Invalid steps: {steps}")
        batches = Endless(train, "train")
        val_batches = repeat(None) if val is None else Endless(val, "val")
        schedule = Schedule(self.optimizer, steps, warm_up)

        def after_step() -> MetaReport | None:
            if not schedule.due():
                return None
            return self.update(next(batches), next(batches), next(val_batches))

        return after_step

    def _check_dtypes(self, params: Iterable[Tensor]) -> None:
        low = {str(p.dtype) for p in params if p.requires_grad and p.dtype.itemsize < 4}
        if low:
            raise ValueError(
                f"a meta-update needs float32 or float64 parameters, got {', '.join(sorted(low))}: a look-ahead is lost in"
                " their rounding. Keep the parameters in float32 and compute under torch.autocast"
            )

    def _sign(self) -> float:
        """-1 if the optimizer maximizes: the meta-objective then minimizes -loss_fn."""
        signs = {-1.0 if group["maximize"] else 1.0 for group in self.optimizer.param_groups}
        if len(signs) > 1:
            raise ValueError("a meta-update needs all param groups to maximize, or none")
        return signs.pop()

    # -------------------------------------------------------------------------------------------------------- the objective

    def _alignment(self, evaluation: Evaluation, batch: Any, ahead: LookAhead, g1: Gradients) -> tuple[Tensor, Gradients]:
        """(1/G) Σ_g flatness_weight·‖g2‖² - alignment_weight·cos(g1, g2), over each group's concatenated tensors; g2 = ∇L(θ′).

        ``g1`` may be empty afterwards, and the parameters moved.

        Returns:
            The term, with the graph of the two weights, and its gradient with respect to θ′: H·w for w = ∂term/∂g2, which is a
            linear combination of g1 and g2 within each group.
        """
        scales = ahead.scales
        term = scales.new_zeros(())

        def weights(g2: Gradients) -> Gradients:
            nonlocal term
            squared1, dot, squared2 = (x.clone() for x in ahead.group_sums(g1, g2).unbind(1))
            dot.requires_grad_()
            squared2.requires_grad_()
            floor = NORM_FLOOR**2  # under the root: the gradient of a root at 0 is infinite
            norms = squared1.clamp(min=floor).sqrt() * squared2.clamp(min=floor).sqrt()
            term = (scales[2] * squared2 - scales[3] * dot / norms).mean()
            of_dot, of_squared = torch.autograd.grad(term, (dot, squared2), retain_graph=True)
            factors = torch.stack([of_dot, 2 * of_squared]).index_select(1, ahead.group_of).unbind(1)
            return [
                None if y is None else f[1] * y if x is None else f[0] * x + f[1] * y
                for x, y, f in zip(g1, g2, factors, strict=True)
            ]

        if self.hvp != "finite_difference":
            try:
                product = evaluation.exact_product(batch, weights, check=not self._exact_works)
                self._exact_works = True
                return term, product
            except RuntimeError as error:
                if self.hvp == "exact" or not no_second_derivative(error):
                    raise
                warn_of_differences(error)
                self.hvp = "finite_difference"
        w = weights(evaluation.gradient(batch)[1])
        g1.clear()  # memory: two more gradients follow
        return term, evaluation.difference_product(batch, w)

    def _total(self, terms: dict[str, Tensor]) -> Tensor:
        values = [terms[name].to(self.log_vars.dtype) for name in self.terms]
        if self.balance == "huw":
            total = homoscedastic_sum(values, self.log_vars, self.priorities, self.term_kinds)
        elif self.balance == "fixed":
            total = torch.stack([w * x for w, x in zip(self.fixed_weights, values, strict=True)]).sum()
        else:
            total = torch.stack(values).sum()
        encoder = self.optimizer.encoder
        regularized = [*encoder.encoder.parameters(), encoder.head.weight]
        total = total + self.encoder_decay * torch.stack([p.norm() for p in regularized]).sum()
        if encoder.features.gating:
            total = total + self.gate_l1 * encoder.feature_gates.abs().sum()
        return total

    # ------------------------------------------------------------------------------------------------- the meta-optimizer

    def _trained(self) -> list[nn.Parameter]:
        """What the meta-optimizer moves. The released code never hands it the gates.

        Group embeddings come last, so that those of later groups do not move the others in a checkpoint.
        """
        encoder = self.optimizer.encoder
        left_out = {"feature_gates"} if self.optimizer.variant == "released" else set()
        trained = [p for name, p in encoder.named_parameters() if name not in left_out and not name.startswith("group_embeddings.")]
        return trained + ([self.log_vars] if self.balance == "huw" else []) + list(encoder.group_embeddings)

    def _adopt(self) -> list[nn.Parameter]:
        """:meth:`_trained`, after handing embeddings of groups that came after the learner to the meta-optimizer."""
        trained = self._trained()
        known = {p for group in self.meta_optimizer.param_groups for p in group["params"]}
        # Into the first group, where a learner that is built now has them: the checkpoints of both look the same.
        self.meta_optimizer.param_groups[0]["params"] += [p for p in trained if p not in known]
        return trained

    def _descend(self, total: Tensor, scales: Tensor, of_scales: Tensor) -> bool:
        """One step of the meta-optimizer down the gradient of ``total``, if both are finite: NaN would stay for good.

        ``of_scales`` [4, G] is the part of the gradient that reaches the encoder through θ′ and ``scales``.

        Returns:
            Whether the step was taken.
        """
        trained = self._adopt()
        encoder = self.optimizer.encoder
        gates = [encoder.feature_gates] if encoder.features.gating and encoder.feature_gates not in set(trained) else []
        outputs, starts = [total, scales], [torch.ones_like(total), of_scales]
        gradients = torch.autograd.grad(outputs, [*trained, *gates], starts, allow_unused=True)
        # The one wait for the device. The device could not undo a step instead: Adam counts its steps on the host.
        if not torch.cat([total.detach().reshape(1), *(g.flatten() for g in gradients if g is not None)]).isfinite().all():
            return False
        for param, grad in zip(trained, gradients[: len(trained)], strict=True):
            param.grad = grad
        for gate, grad in zip(gates, gradients[len(trained) :], strict=True):
            if grad is not None:  # it accumulates, as in the released code
                gate.grad = grad if gate.grad is None else gate.grad + grad
        self.meta_optimizer.step()
        self.meta_optimizer.zero_grad(set_to_none=True)
        clamp_log_vars_(self.log_vars)
        self.updates += 1
        return True

    @devices.outside_inference_mode
    def state_dict(self) -> dict[str, Any]:
        """Log-variances, the meta-optimizer's state and the number of updates. The encoder is in the optimizer's own state dict.

        With Adam or AdamW as meta-optimizer the structure is the same before the first update and after it, so that
        ``torch.distributed.checkpoint`` can load into it: ``dcp.load({"meta": meta_learner}, ...)``.
        """
        self._adopt()
        return {
            "log_vars": self.log_vars.detach().clone(),  # a copy, since dcp.load writes into it, and may fail midway
            "meta_optimizer": with_adam_states(self.meta_optimizer),
            "updates": self.updates,
        }

    @devices.outside_inference_mode
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what :meth:`state_dict` returned.

        Raises:
            ValueError: something does not fit, is missing or cannot be; nothing has changed then.
        """
        self._adopt()
        check_learner(self.meta_optimizer, self.log_vars, state_dict)
        # torch's load_state_dict casts moments to the parameters' dtypes, and keeps the caller's tensors where it need not cast.
        self.log_vars.data = self.log_vars.data.to(state_dict["log_vars"].dtype)
        self.meta_optimizer.load_state_dict(copy.deepcopy(state_dict["meta_optimizer"]))
        self.log_vars.data.copy_(state_dict["log_vars"])
        self.updates = int(state_dict["updates"])


def _unwrapped(optimizer: Any) -> MetaAdamW | None:
    """The innermost MetaAdamW of nested wrappers, each of which has what it wraps as ``_optimizer`` or ``optimizer``.

    Lightning's wrapper passes for a MetaAdamW and shows the attributes of the one that it wraps. But what is written to it stays in
    it: the wrapped optimizer would not see the lists and counts that a meta-update makes anew.
    """
    for name in ("_optimizer", "optimizer"):
        inner = getattr(optimizer, name, None)
        found = None if inner is None or inner is optimizer else _unwrapped(inner)
        if found is not None:
            return found
    return optimizer if isinstance(optimizer, MetaAdamW) and "state" in vars(optimizer) else None
