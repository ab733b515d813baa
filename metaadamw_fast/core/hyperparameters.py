"""The hyper-parameters of ``param_groups``, checked, and spread over the tensors as float64 vectors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import devices


def pair_of(betas: Sequence[Any]) -> tuple[Any, Any]:
    """Both betas.

    Raises:
        ValueError: fewer or more of them, as optimizers of three moments have.
    """
    if len(betas) != 2:
        raise ValueError(f"Invalid betas: {betas} (two are needed, got {len(betas)})")
    return betas[0], betas[1]


def refuse_differentiable(values: Mapping[str, Any]) -> None:
    """Raises RuntimeError, as torch's fused optimizers, if a graph of the step is asked for."""
    if values.get("differentiable"):
        raise RuntimeError("the optimizer does not support `differentiable`: its kernels write in place and leave no graph")


def check_hyperparameters(values: Mapping[str, Any]) -> None:
    """Raises what ``torch.optim.AdamW`` raises of hyper-parameters that cannot be; a NaN is as invalid as a negative number.

    Raises:
        ValueError: a number or a length out of range.
        RuntimeError: ``differentiable``.
    """
    refuse_differentiable(values)
    lr, betas, eps, weight_decay = values["lr"], pair_of(values["betas"]), values["eps"], values["weight_decay"]
    named = (("lr", lr), ("betas[0]", betas[0]), ("betas[1]", betas[1]), ("eps", eps), ("weight_decay", weight_decay))
    for name, x in named:
        if isinstance(x, Tensor) and x.numel() != 1:
            raise ValueError(f"Tensor {name} must be 1-element")
    if not lr >= 0.0:
        raise ValueError(f"Invalid learning rate: {lr}")
    if not eps >= 0.0:
        raise ValueError(f"Invalid epsilon value: {eps}")
    for index, beta in enumerate(betas):
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"Invalid beta parameter at index {index}: {beta}")
    if not weight_decay >= 0.0:
        raise ValueError(f"Invalid weight_decay value: {weight_decay}")
    if isinstance(betas[0], Tensor) != isinstance(betas[1], Tensor):
        raise ValueError("betas must be either both floats or both Tensors")


class Hyperparameters(NamedTuple):
    """One [T] float64 vector each; ``sign`` is -1 where maximizing, None if nowhere."""

    lr: Tensor
    weight_decay: Tensor
    beta1: Tensor
    beta2: Tensor
    eps: Tensor
    sign: Tensor | None


class HyperparameterTable:
    """Follows ``param_groups`` from step to step and rebuilds the vectors only when a value changed.

    A tensor on a device (lr or weight decay) is read there every step, so that a scheduler or a captured graph changes it live;
    a tensor on the CPU is a number. The host never waits for the device.

    Args:
        param_group_of: for each of the T tensors the index of its entry of ``param_groups``.
        device: of the vectors.
    """

    def __init__(self, param_group_of: Sequence[int], device: torch.device) -> None:
        self._index = torch.tensor(param_group_of, dtype=torch.long, device=device)
        self._device = device
        self._key: list[tuple[float, ...]] | None = None
        self._table = torch.empty(0, device=device)
        self._vectors: Hyperparameters | None = None

    def kept(self) -> list[Tensor]:
        """The tensors on the device that it keeps from step to step."""
        vectors = () if self._vectors is None else (x for x in self._vectors if x is not None)
        return [self._index, self._table, *vectors]

    def update(self, param_groups: Sequence[Mapping[str, Any]]) -> Hyperparameters:
        """The vectors for these values, cached while the values stay.

        Raises:
            ValueError: a param group with fewer or more than two betas.
            RuntimeError: a param group that is to be differentiable.
        """
        live = [
            (row, column, group[name])
            for row, group in enumerate(param_groups)
            for column, name in enumerate(("lr", "weight_decay"))
            if isinstance(group[name], Tensor) and not devices.readable(group[name])
        ]
        key = [_numbers(group) for group in param_groups]
        if self._vectors is not None and not live and key == self._key:
            return self._vectors
        table = self._table
        if key != self._key:
            table = devices.upload(key, torch.float64, self._device)
        cached = not devices.capturing(self._device)  # what is captured has no content until the graph is replayed
        if cached:
            self._table, self._key = table, key
        if live:
            table = table.clone()
            for row, column, value in live:
                table[row, column].copy_(value.reshape(()))
        lr, weight_decay, beta1, beta2, eps, sign = table.index_select(0, self._index).t().contiguous().unbind()
        maximize = any(numbers[-1] < 0 for numbers in key)
        vectors = Hyperparameters(lr, weight_decay, beta1, beta2, eps, sign if maximize else None)
        if cached:
            self._vectors = None if live else vectors
        return vectors


def _numbers(group: Mapping[str, Any]) -> tuple[float, ...]:
    """The numbers of one param group, in the order of :class:`Hyperparameters`."""
    refuse_differentiable(group)
    beta1, beta2 = pair_of(group["betas"])
    sign = -1.0 if group["maximize"] else 1.0
    return _number(group["lr"]), _number(group["weight_decay"]), float(beta1), float(beta2), float(group["eps"]), sign


def _number(value: float | Tensor) -> float:
    """A value as a key: tensors elsewhere than on the CPU are read live and do not count."""
    return 0.0 if isinstance(value, Tensor) and not devices.readable(value) else float(value)
