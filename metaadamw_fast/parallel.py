"""What a meta-update must know of a model that DistributedDataParallel or FSDP2 spreads over ranks: internals of both."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def replicas(model: nn.Module) -> dist.ProcessGroup | None:
    """The ranks of the ``DistributedDataParallel`` modules in a model, itself included; None if it has none.

    Raises:
        ValueError: several of them, with different ranks.
    """
    groups = [part.process_group for part in model.modules() if isinstance(part, DistributedDataParallel)]
    ranks = sorted({tuple(dist.get_process_group_ranks(group)) for group in groups})
    if len(ranks) > 1:
        raise ValueError(
            "the model has DistributedDataParallel modules on different ranks, so its losses have no mean over the replicas: "
            + ", ".join(map(str, map(list, ranks)))
        )
    return groups[0] if groups else None


def has_static_graph(model: nn.Module) -> bool:
    """Whether a ``DistributedDataParallel`` module in the model was told that its graph is always the same."""
    return any(isinstance(part, DistributedDataParallel) and part.static_graph for part in model.modules())


def _fsdp_modules(model: nn.Module) -> list[Any]:
    module = sys.modules.get("torch.distributed.fsdp")
    return [] if module is None else [part for part in model.modules() if isinstance(part, module.FSDPModule)]


def reshard(model: nn.Module) -> None:
    """Makes FSDP2 modules drop gathered parameters, so that the next forward pass gathers what the shards then hold."""
    for part in _fsdp_modules(model):
        part.reshard()


class UnreducedGradients:
    """What FSDP2 has accumulated without reducing it over the ranks, and where FSDP2 is in an iteration.

    Raises:
        RuntimeError: unknown internals of FSDP2, and no ``.grad`` stands that would show that the last gradient was reduced.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model, self._parts = model, _fsdp_modules(model)
        try:
            self._places = _unreduced(self._parts)
        except AttributeError as error:
            if all(p.grad is None for p in model.parameters()):
                raise RuntimeError(
                    f"this version of torch does not show whether FSDP2 has accumulated a gradient ({error}), which a meta-update"
                    " would lose: call update() after the optimizer's step() and before zero_grad()"
                ) from error
            self._parts, self._places = [], []
        self._kept = [(owner, name, getattr(owner, name)) for owner, name, _ in self._places]

    def set_aside(self) -> None:
        """Makes FSDP2 begin an iteration, and reduce every gradient over the ranks."""
        for owner, name, meanwhile in self._places:
            setattr(owner, name, meanwhile)

    def restore(self, *, failed: bool) -> None:
        """Puts it back. Nothing is gathered then: the next forward pass gathers what the shards hold.

        Args:
            failed: an exception may have come in the middle of a forward or backward pass, which FSDP2 would go on with.
        """
        for part in self._parts if failed else ():
            if getattr(part._get_fsdp_state(), "_is_root", False) and hasattr(part, "reset_iter_state"):  # torch 2.13
                part.reset_iter_state()
        for owner, name, meanwhile in _unreduced(self._parts):  # more than before: a first forward pass makes some
            setattr(owner, name, meanwhile)
        reshard(self._model)
        for owner, name, value in self._kept:
            setattr(owner, name, value)


def _unreduced(parts: Iterable[Any]) -> list[tuple[Any, str, Any]]:
    """Where FSDP2 holds gradients that it has not reduced, whether it reduces them, and where it is in an iteration.

    Returns:
        (object, attribute, its value between two iterations if all gradients are reduced at once)

    Raises:
        AttributeError: another version of FSDP2. None of it is public.
    """
    found: list[tuple[Any, str, Any]] = []
    for state in {part._get_fsdp_state(): None for part in parts}:
        context, idle = state._state_ctx, type(state._training_state).IDLE
        found += [(context, "is_last_backward", True), (context, "post_backward_final_callback_queued", False)]
        found += [(context, "iter_forward_root", None), (state, "_training_state", idle)]
        groups = state._fsdp_param_groups if hasattr(state, "_fsdp_param_groups") else [state._fsdp_param_group]  # torch 2.11
        for group in filter(None, groups):
            found += [(group, "reduce_grads", True), (group, "all_reduce_grads", True), (group, "_partial_reduce_output", None)]
            # In the middle of a forward pass the root does not reshard; what is gathered ahead of its use would be used after all.
            found += [(group, "_training_state", idle), (group, "_all_gather_result", None)]
            for param in group.fsdp_params:
                found.append((param, "unsharded_accumulated_grad", None))
                if hasattr(param, "_unsharded_param"):  # from the first forward pass on
                    found.append((param._unsharded_param, "grad", None))
    for owner, name, _ in found:
        getattr(owner, name)
    return found
