"""Losses, gradients and Hessian-vector products of a user's loss function."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import Node

from .core.sharding import RankSums, is_sharded, local, local_gradient
from .core.watch import as_real
from .model_state import ModelState, TwiceDifferentiable
from .parallel import replicas, reshard

LossFn = Callable[[nn.Module, Any], Tensor]
Gradients = list[Tensor | None]


class MicroBatches(list[Any]):
    """Several batches that count as one, as in gradient accumulation: the loss is their mean."""


class Evaluation:
    """A loss function on a model, as a function of where the parameters stand.

    Args:
        loss_fn, model: the loss of a batch is ``loss_fn(model, batch)``.
        params: what gradients are taken with respect to. Of DTensors, gradients and products are this rank's shards.
        sign: -1 to minimize -loss_fn.
        state: what is restored after all evaluations, of which every one begins with the same random state.
        rank_sums: of ``params``.
        scaler: a ``torch.amp.GradScaler`` whose scale keeps the gradients of an fp16 autocast from vanishing, or None.

    With ``torch.nn.parallel.DistributedDataParallel``, wherever in the model, and with DTensors every loss and gradient is the mean
    over the ranks, whose batches may differ.
    """

    def __init__(
        self,
        loss_fn: LossFn,
        model: nn.Module,
        params: Sequence[Tensor],
        sign: float,
        state: ModelState,
        rank_sums: RankSums,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        self._loss_fn, self._model, self._sign, self._state = loss_fn, model, sign, state
        self.params = list(params)
        self._trainable = [p for p in self.params if p.requires_grad]
        self._shards = [local(p) for p in self.params]
        group = replicas(model)
        self._group = rank_sums.group if group is None else group
        # The backward pass itself averages these over the ranks (FSDP2) or makes them whole (tensor parallelism).
        self._averaged = {t for t, p in enumerate(self.params) if is_sharded(p)}
        self._rank_sums = rank_sums
        self._loss_scale = 1.0 if scaler is None else float(scaler.get_scale())

    def _parts(self, batch: Any) -> tuple[list[Any], float]:
        parts = list(batch) if isinstance(batch, MicroBatches) else [batch]
        if not parts:
            raise ValueError("MicroBatches without a batch")
        return parts, self._sign / len(parts)

    def _begin(self) -> None:
        reshard(self._model)  # FSDP2 would compute with parameters that it gathered before the last write
        self._state.rewind()

    def _value(self, batch: Any) -> Tensor:
        value = self._loss_fn(self._model, batch)
        if not isinstance(value, Tensor) or value.numel() != 1:
            shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"loss_fn must return a scalar tensor, got {shape}")
        return value.reshape(())

    def loss(self, batch: Any) -> Tensor:
        """The loss, 0-dim."""
        parts, factor = self._parts(batch)

        def values(with_graph: bool) -> list[Tensor]:
            self._begin()
            with torch.set_grad_enabled(with_graph):
                return [self._value(part).detach() for part in parts]

        try:
            found = values(False)
        except RuntimeError as error:
            if "does not require grad" not in str(error):
                raise
            found = values(True)  # the loss differentiates on its way, as a gradient penalty does
        reshard(self._model)
        return self._mean_over_ranks(torch.stack(found).sum() * factor, [])[0]

    def gradient(self, batch: Any) -> tuple[Tensor, Gradients]:
        """The loss and its gradient, None where it does not depend on a parameter. Micro-batches are gone through one by one."""
        if not self._averaged:
            try:
                return self._gradient(batch, self._backward)
            except RuntimeError as error:
                if "incompatible with .grad()" not in str(error):
                    raise
        return self._gradient(batch, self._accumulated)  # FSDP2 and reentrant checkpointing hand gradients to ``.grad`` only

    def _gradient(self, batch: Any, backward: Callable[..., Sequence[Tensor | None]]) -> tuple[Tensor, Gradients]:
        parts, factor = self._parts(batch)
        self._begin()
        values: list[Tensor] = []
        sums: Gradients = [None] * len(self.params)
        for part in parts:
            value = self._value(part)
            found = self._listed(backward(value, factor * self._loss_scale))
            sums = [_sum(a, b) for a, b in zip(sums, found, strict=True)]
            values.append(value.detach())
        if self._loss_scale != 1.0:
            sums = [None if x is None else x / self._loss_scale for x in sums]
        return self._mean_over_ranks(torch.stack(values).sum() * factor, sums)

    def _mean_over_ranks(self, value: Tensor, gradients: Gradients) -> tuple[Tensor, Gradients]:
        """By one all-reduce for each dtype. A gradient that only some ranks have counts as zeros on the others."""
        if self._group is None:
            return value, gradients
        present = [0.0 if x is None or t in self._averaged else 1.0 for t, x in enumerate(gradients)]
        flags = torch.cat([value.reshape(1).double(), torch.tensor(present, dtype=torch.float64, device=value.device)])
        dist.all_reduce(flags, group=self._group)
        ranks = dist.get_world_size(self._group)
        found = {t for t, count in enumerate(flags[1:].tolist()) if count}
        means: Gradients = [x if t in self._averaged else None for t, x in enumerate(gradients)]
        for dtype in sorted({self.params[t].dtype for t in found}, key=str):
            mine = [t for t in sorted(found) if self.params[t].dtype == dtype]
            dense = [torch.zeros_like(self.params[t]) if (x := gradients[t]) is None else x for t in mine]
            flat = torch.cat([x.reshape(-1) for x in dense])
            dist.all_reduce(flat, group=self._group)
            for t, x in zip(mine, torch.split(flat / ranks, [x.numel() for x in dense]), strict=True):
                means[t] = x.view(self.params[t].shape)
        return (flags[0] / ranks).to(value.dtype), means

    def _accumulated(self, value: Tensor, factor: float) -> Sequence[Tensor | None]:
        """As :meth:`_backward`, by way of ``.grad``."""
        # The pass adds to every leaf that it reaches, also to one of another model.
        reached = [node.variable for node in _nodes([value]) if node.name() == "torch::autograd::AccumulateGrad"]  # type: ignore[attr-defined]
        self._state.set_aside_at([*self._trainable, *reached])
        torch.autograd.backward(value * factor)
        return [local_gradient(p) for p in self._trainable]

    def _backward(self, value: Tensor, factor: float, create_graph: bool = False) -> Sequence[Tensor | None]:
        if not value.requires_grad:
            raise ValueError(
                "the loss has no gradient: loss_fn must compute it from the model's parameters, with gradients enabled"
            )
        return torch.autograd.grad(value * factor, self._trainable, create_graph=create_graph, allow_unused=True)

    def _listed(self, found: Sequence[Tensor | None]) -> Gradients:
        rest = iter(found)
        return [next(rest) if p.requires_grad else None for p in self.params]

    def exact_product(self, batch: Any, weights: Callable[[Gradients], Gradients], *, check: bool) -> Gradients:
        """The gradient's Jacobian, the Hessian H, times w = ``weights(gradient)``, by differentiating the gradient again.

        Args:
            batch: of the gradient.
            weights: of the gradient; called once.
            check: look for operations that are differentiable once only: torch leaves out what goes through them without a word.

        Raises:
            RuntimeError: an operation of the model has no second derivative.
        """
        parts, factor = self._parts(batch)
        self._state.rewind()
        kernels = TwiceDifferentiable(self._model)
        with kernels, kernels:
            kernels.begin()
            found = [self._listed(self._backward(self._value(part), factor, create_graph=True)) for part in parts]
            if check:
                _refuse_differentiable_once(found[0])
            whole, whole_loss = found[0], torch.zeros((), device=self.params[0].device)
            for more in found[1:]:
                whole = [_sum(a, b) for a, b in zip(whole, more, strict=True)]
            w = weights(self._mean_over_ranks(whole_loss, [None if x is None else x.detach() for x in whole])[1])
            pairs = [(x, y) for x, y in zip(whole, w, strict=True) if x is not None and y is not None and x.requires_grad]
            outputs, vectors = [x for x, _ in pairs], [y.to(x.dtype) for x, y in pairs]
            product: Gradients = [None] * len(self.params)
            if pairs:  # none if the loss is linear in every parameter
                product = self._listed(torch.autograd.grad(outputs, self._trainable, vectors, allow_unused=True))
            return self._mean_over_ranks(whole_loss, product)[1]

    def difference_product(self, batch: Any, w: Gradients) -> Gradients:
        """H·w by a central difference of the gradient along w, (∇L(θ + h·w) - ∇L(θ - h·w)) / 2h with h = ε·‖θ‖/‖w‖.

        ε is 1e-3, or 1e-5 where all is float64: the error from the third derivative falls with ε², that from rounding grows
        with 1/ε. The parameters are left at θ - h·w: the caller puts them back. The list ``w`` is emptied after its last use: its
        memory is free while the second gradient is made.
        """
        moved = [(p, x) for p, x in zip(self._shards, w, strict=True) if x is not None]
        epsilon = 1e-5 if all(as_real(p).dtype == torch.float64 for p, _ in moved) else 1e-3
        length = self._norm(w)
        at = self._norm([None if x is None else p for p, x in zip(self._shards, w, strict=True)])
        h = torch.where(length > 0, epsilon * at / length, 0.0)
        ends: list[Gradients] = []
        for distance in (h, -2 * h):
            _move(moved, distance)
            if ends:
                moved.clear()
                w.clear()
            ends.append(self.gradient(batch)[1])
        scale = torch.where(h > 0, 0.5 / h, 0.0)
        return [None if a is None or b is None else ((a - b) * scale).to(a.dtype) for a, b in zip(*ends, strict=True)]

    def _norm(self, tensors: Gradients) -> Tensor:
        """The 2-norm of all tensors together; of shards, that of the whole tensors."""
        zero = torch.zeros((), dtype=torch.float64, device=self._shards[0].device)
        squares = [zero if x is None else as_real(x.detach()).double().square().sum() for x in tensors]
        return self._rank_sums(torch.stack(squares)[:, None]).sum().sqrt()


def write(params: Sequence[Tensor], values: Sequence[Tensor | None]) -> None:
    """Writes parameters through ``.data``, so that no version counter tells: :class:`ModelState` will put their own bits back."""
    for p, value in zip(params, values, strict=True):
        if value is not None:
            p.data.copy_(value)
    torch.clear_autocast_cache()  # it holds low-precision copies of the parameters before the write


def _move(along: Sequence[tuple[Tensor, Tensor]], distance: Tensor) -> None:
    for p, x in along:
        p.data.add_(distance * x)
    torch.clear_autocast_cache()


_NO_SECOND_DERIVATIVE = (  # parts of torch's messages
    "is not implemented",  # a kernel of torch
    "once_differentiable",  # an autograd function
    "double backward",  # torch.compile
    "donated buffers",  # torch.compile
    "incompatible with .grad()",  # reentrant activation checkpointing
)


def no_second_derivative(error: RuntimeError) -> bool:
    """Whether an error says that an operation can be differentiated once only."""
    return any(part in str(error) for part in _NO_SECOND_DERIVATIVE)


def warn_of_differences(error: RuntimeError) -> None:
    """Says once why second derivatives are not exact."""
    warnings.warn(
        f"the model has no exact second derivative ({str(error).splitlines()[0]}): Hessian products are central differences from"
        ' now on; hvp="finite_difference" says that this is meant',
        stacklevel=4,
    )


def _refuse_differentiable_once(gradients: Gradients) -> None:
    if any(node.name() == "torch::autograd::Error" for node in _nodes(gradients)):
        raise RuntimeError("the model has a function that is marked with @once_differentiable")


def _nodes(outputs: Gradients) -> Iterator[Node]:
    """Yields the nodes of the graph behind some tensors."""
    todo = [x.grad_fn for x in outputs if x is not None]
    seen = set()
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            todo += [following for following, _ in node.next_functions]


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return a if b is None else b if a is None else a + b
