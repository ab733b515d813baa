"""The meta-update: training the encoder while the model trains. MetaAdamW sections 3.4 and 3.5, algorithm 2."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoint import check_learner
from .features import NORM_FLOOR
from .lookahead import look_ahead
from .model_state import parameters_replaced, preserved, twice_differentiable
from .optimizer import MetaAdamW
from .weighting import TERM_KINDS, clamp_log_vars_, homoscedastic_sum

TERMS = ("gradient", "loss_decrease", "gen_gap")  # the order of log_vars, priorities, kinds and fixed weights
LossFn = Callable[[nn.Module, Any], Tensor]


class MicroBatches(list[Any]):
    """Several batches that count as one, as in gradient accumulation: the loss is their mean."""


@dataclass(frozen=True)
class MetaReport:
    """What one meta-update saw; 0-dim tensors unless noted, read without a host sync until you ask for numbers.

    Attributes:
        total: the meta-objective, regularisers included.
        gradient_alignment, loss_decrease, generalization_gap: its terms; None where the objective has no such term.
        log_vars: [3], after the update.
        lr_scale, wd_scale: [G], the scales that the look-ahead used.
    """

    total: Tensor
    gradient_alignment: Tensor | None
    loss_decrease: Tensor | None
    generalization_gap: Tensor | None
    log_vars: Tensor
    lr_scale: Tensor
    wd_scale: Tensor


class MetaLearner:
    """Trains the encoder of a :class:`~metaadamw_fast.MetaAdamW` by looking one step ahead.

    Args:
        optimizer: whose encoder is trained.
        model: the model that ``optimizer`` trains.
        loss_fn: ``loss_fn(model, batch) -> scalar tensor``. A batch is whatever it takes.
        objective: ``gradient``, ``loss_decrease``, ``gen_gap`` or ``combined``.
        balance: how ``combined`` adds its terms: ``huw`` (learned, homoscedastic), ``fixed`` or ``sum``.
        priorities, term_kinds: per term, for ``huw``; see :func:`metaadamw_fast.weighting.homoscedastic_sum`.
        fixed_weights: per term, for ``fixed``.
        lr, make_optimizer: of the meta-optimizer, called as ``make_optimizer(params, lr=lr)``.
        encoder_decay: c_wd, on the sum of the 2-norms (not squared) of the encoder layers' tensors and of head.weight.
        gate_l1: c_gate, on Σ|gate|, with feature gating.
        hvp: ``auto`` and ``exact`` differentiate the gradient at the look-ahead a second time.
        gap_at: where the generalization gap is evaluated: ``theta`` (the paper: it then has no gradient to the encoder) or
            ``lookahead``.

    Raises:
        ValueError: an unknown choice, a parameter of the optimizer that is not in the model, param groups of which only some
            maximize.
        NotImplementedError: ``hvp="finite_difference"`` or a ``scaler``, which this version does not have.
    """

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
        scaler: Any = None,
    ) -> None:
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
        if hvp == "finite_difference" or scaler is not None:
            raise NotImplementedError("finite-difference Hessian products and gradient scaling are not in this version")
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
        self.updates = 0
        device = optimizer.encoder.head.weight.device
        self.log_vars = nn.Parameter(torch.zeros(len(TERMS), dtype=optimizer.encoder.head.weight.dtype, device=device))
        self.meta_optimizer = make_optimizer(self._trained(), lr=lr)

    # ---------------------------------------------------------------------------------------------------------- the update

    def update(self, batch_a: Any, batch_b: Any, val_batch: Any = None, gap_batch: Any = None) -> MetaReport:
        """One meta-update. The model, its gradients, buffers, modes, the optimizer's state and the random state stay as they are.

        If the objective or its gradient is not finite, encoder, log-variances and meta-optimizer stay as they are too; the report
        tells.

        Args:
            batch_a: B1, whose gradient the hypothetical step takes.
            batch_b: B2, whose gradient is compared after it.
            val_batch: Bv, for the loss decrease and the generalization gap.
            gap_batch: for the generalization gap, if it is to draw a batch of its own; default ``val_batch``.

        Returns:
            The terms and the scales.

        Raises:
            ValueError: an objective that needs a validation batch got none; a loss that is not a scalar or has no gradient;
                param groups of which only some maximize.
        """
        if val_batch is None and self.terms != ("gradient",):
            raise ValueError("this objective needs val_batch")
        gap_batch = val_batch if gap_batch is None else gap_batch
        sign = self._sign()
        with preserved(self.model) as rewind, twice_differentiable(self.model), torch.enable_grad():

            def loss(batch: Any) -> Tensor:
                rewind()
                return sign * _evaluate(self.loss_fn, self.model, batch)

            params = self.optimizer._current_lists().params
            loss_a, g1 = _gradient(loss, batch_a, params, create_graph=False)
            scales, clip, theta = look_ahead(self.optimizer, g1)
            g1 = [None if g is None else g * clip for g in g1]
            with parameters_replaced(self.model, dict(zip(params, theta, strict=True))):
                terms = {}
                if "gradient" in self.terms:
                    _, g2 = _gradient(loss, batch_b, theta, create_graph=True)
                    terms["gradient"] = self._alignment(scales, g1, g2)
                after = loss(val_batch) if "loss_decrease" in self.terms else None
                if "gen_gap" in self.terms and self.gap_at == "lookahead":
                    gap_after = after if after is not None and gap_batch is val_batch else loss(gap_batch)
                    terms["gen_gap"] = (loss(batch_a) - gap_after).abs()
            with torch.no_grad():
                before = loss(val_batch) if after is not None else None
                if "gen_gap" in self.terms and self.gap_at == "theta":
                    gap_loss = before if before is not None and gap_batch is val_batch else loss(gap_batch)
                    terms["gen_gap"] = (loss_a - gap_loss).abs()
            if after is not None and before is not None:
                terms["loss_decrease"] = after - before
            total = self._total(terms)
            self._descend(total)
        return MetaReport(
            total.detach(),
            *(terms[name].detach() if name in terms else None for name in TERMS),  # type: ignore[arg-type, call-arg]
            self.log_vars.detach().clone(),
            scales[0].detach(),
            scales[1].detach(),
        )

    def _sign(self) -> float:
        """-1 if the optimizer maximizes: the meta-objective then minimizes -loss_fn."""
        signs = {-1.0 if group["maximize"] else 1.0 for group in self.optimizer.param_groups}
        if len(signs) > 1:
            raise ValueError("a meta-update needs all param groups to maximize, or none")
        return signs.pop()

    # -------------------------------------------------------------------------------------------------------- the objective

    def _alignment(self, scales: Tensor, g1: Sequence[Tensor | None], g2: Sequence[Tensor | None]) -> Tensor:
        """(1/G) Σ_g flatness_weight·‖g2‖² - alignment_weight·cos(g1, g2), each over a group's concatenated tensors."""
        squared1 = self._group_dots(g1, g1, scales)
        squared2 = self._group_dots(g2, g2, scales)
        floor = NORM_FLOOR**2  # under the root: the gradient of a root at 0 is infinite
        norms = squared1.clamp(min=floor).sqrt() * squared2.clamp(min=floor).sqrt()
        cosine = self._group_dots(g1, g2, scales) / norms
        return (scales[2] * squared2 - scales[3] * cosine).mean()

    def _group_dots(self, xs: Sequence[Tensor | None], ys: Sequence[Tensor | None], like: Tensor) -> Tensor:
        """[G] Σ x·y over the tensors of each group; a missing gradient counts as zeros."""
        zero = like.new_zeros(())
        pairs = zip(xs, ys, strict=True)
        dots = [zero if x is None or y is None else (x * y).sum().to(like.dtype) for x, y in pairs]
        return like.new_zeros(like.shape[1]).index_add(0, self.optimizer._group_of, torch.stack(dots))

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
        # Into the group that is there: a checkpoint then looks the same whenever the learner was built.
        self.meta_optimizer.param_groups[0]["params"] += [p for p in trained if p not in known]
        return trained

    def _descend(self, total: Tensor) -> None:
        """One step of the meta-optimizer down the gradient of ``total``, if both are finite: NaN would stay for good."""
        trained = self._adopt()
        encoder = self.optimizer.encoder
        gates = [encoder.feature_gates] if encoder.features.gating and encoder.feature_gates not in set(trained) else []
        gradients = torch.autograd.grad(total, [*trained, *gates], allow_unused=True)
        # The one wait for the device. Undoing a step there instead is not possible for every optimizer: Adam counts on the host.
        if not torch.cat([total.detach().reshape(1), *(g.flatten() for g in gradients if g is not None)]).isfinite().all():
            return
        for param, grad in zip(trained, gradients[: len(trained)], strict=True):
            param.grad = grad
        for gate, grad in zip(gates, gradients[len(trained) :], strict=True):
            if grad is not None:  # it accumulates, as in the released code
                gate.grad = grad if gate.grad is None else gate.grad + grad
        self.meta_optimizer.step()
        self.meta_optimizer.zero_grad(set_to_none=True)
        clamp_log_vars_(self.log_vars)
        self.updates += 1

    def state_dict(self) -> dict[str, Any]:
        """Log-variances, the meta-optimizer's state and the number of updates. The encoder is in the optimizer's own state dict."""
        self._adopt()
        return {
            "log_vars": self.log_vars.detach(),
            "meta_optimizer": self.meta_optimizer.state_dict(),
            "updates": self.updates,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what :meth:`state_dict` returned.

        Raises:
            ValueError: something does not fit, is missing or cannot be; nothing has changed then.
        """
        self._adopt()
        check_learner(self.meta_optimizer, self.log_vars, state_dict)
        self.log_vars.data = self.log_vars.data.to(state_dict["log_vars"].dtype)  # torch casts the state to it
        self.meta_optimizer.load_state_dict(copy.deepcopy(state_dict["meta_optimizer"]))  # torch would keep the tensors
        self.log_vars.data.copy_(state_dict["log_vars"])
        self.updates = int(state_dict["updates"])


def _evaluate(loss_fn: LossFn, model: nn.Module, batch: Any) -> Tensor:
    """The loss of a batch, the mean of those of micro-batches; a ValueError if it is not a scalar tensor."""
    if isinstance(batch, MicroBatches):
        return torch.stack([_evaluate(loss_fn, model, part) for part in batch]).mean()
    value = loss_fn(model, batch)
    if not isinstance(value, Tensor) or value.numel() != 1:
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"loss_fn must return a scalar tensor, got {shape}")
    return value.reshape(())


def _gradient(
    loss: Callable[[Any], Tensor], batch: Any, params: Iterable[Tensor], *, create_graph: bool
) -> tuple[Tensor, list[Tensor | None]]:
    """The loss (detached) and its gradient with respect to each of ``params``, None where it does not depend on one."""
    params = list(params)
    value = loss(batch)
    if not value.requires_grad:
        raise ValueError("the loss has no gradient: loss_fn must compute it from the model's parameters, with gradients enabled")
    trainable = [p for p in params if p.requires_grad]
    found = iter(torch.autograd.grad(value, trainable, create_graph=create_graph, allow_unused=True))
    return value.detach(), [next(found) if p.requires_grad else None for p in params]
