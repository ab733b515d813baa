"""Parameters that are spread over ranks: DTensors, as FSDP2 (``fully_shard``) and tensor parallelism make them.

The kernels run on each rank's local shards. What is known of a whole tensor are sums over its elements; one all-reduce of them, for
all tensors together, makes those of the shards those of the tensors, the same bits on every rank.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def is_sharded(x: Tensor) -> bool:
    """Whether ``x`` is a DTensor, replicated ones too."""
    module = sys.modules.get("torch.distributed.tensor")  # half a second to import: who has a DTensor has done so
    return module is not None and isinstance(x, module.DTensor)


def local(x: Tensor) -> Tensor:
    """The shard that this rank has of a DTensor, the tensor itself and no view of it; other tensors as they are."""
    return x._local_tensor if is_sharded(x) else x  # type: ignore[attr-defined]


def local_gradient(param: Tensor) -> Tensor | None:
    """What :func:`local` is, of ``param.grad``, laid out over the ranks as ``param`` is."""
    grad: Any = param.grad
    if grad is None or not is_sharded(grad):
        return grad  # type: ignore[no-any-return]
    like: Any = param
    if grad._spec is not like._spec and grad.placements != like.placements:
        grad = grad.redistribute(like.device_mesh, like.placements)
    shard = grad._local_tensor
    # A collective that is still on its way.
    return shard.wait() if type(shard) is not Tensor and hasattr(shard, "wait") else shard  # type: ignore[no-any-return]


def laid_out_as(value: Tensor, param: Tensor) -> Tensor:
    """``value``, a whole tensor or a DTensor, with the mesh and placements of ``param``; whole if ``param`` is no DTensor."""
    found, like = value, param  # type: Any, Any
    if is_sharded(value):
        if is_sharded(param) and found.device_mesh == like.device_mesh:
            return found.redistribute(placements=like.placements)  # type: ignore[no-any-return]
        found = found.full_tensor()
    if not is_sharded(param):
        return found  # type: ignore[no-any-return]
    from torch.distributed.tensor import distribute_tensor

    # Every rank has the whole and keeps its part: no communication.
    return distribute_tensor(found.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def check_supported(params: Iterable[Tensor], model: nn.Module | None = None) -> None:
    """Raises ValueError on parameters whose statistics would be those of fragments."""
    for p in params:
        if is_sharded(p) and any(placement.is_partial() for placement in p.placements):  # type: ignore[attr-defined]
            raise ValueError(
                "the optimizer cannot update a DTensor with a Partial placement: it is not a parameter but a summand of one"
            )
    module = sys.modules.get("torch.distributed.fsdp")
    if module is None:
        return
    # With use_orig_params the parameters are views of a flat one, and marked so that nobody flattens them again.
    flat = any(isinstance(p, module.FlatParameter) or getattr(p, "_fsdp_flattened", False) for p in params)
    if flat or (model is not None and any(isinstance(x, module.FullyShardedDataParallel) for x in model.modules())):
        raise ValueError(
            "FullyShardedDataParallel gives an optimizer fragments of flattened parameters, whose norms mean nothing: shard the"
            " model with torch.distributed.fsdp.fully_shard (FSDP2)"
        )


def refuse_zero() -> None:
    """Raises ValueError if the optimizer is being built by a ZeroRedundancyOptimizer.

    It offers no hook to ask: it calls the constructor with its part of the parameters, so its frame is on the stack.
    """
    module = sys.modules.get("torch.distributed.optim.zero_redundancy_optimizer")
    frame = None if module is None else sys._getframe(1)
    while module is not None and frame is not None:
        if isinstance(frame.f_locals.get("self"), module.ZeroRedundancyOptimizer):
            raise ValueError(
                "ZeroRedundancyOptimizer would give every rank an optimizer that sees, sums and clips this rank's parameters only."
                " Shard the model with torch.distributed.fsdp.fully_shard (FSDP2) instead: states are sharded then, and sums are of"
                " all parameters"
            )
        frame = frame.f_back


class RankSums:
    """Makes sums over the elements of this rank's shards sums over those of the whole tensors.

    Every element counts once: a tensor that several ranks hold as a whole, or a shard that they hold all, counts on the first of
    them. All ranks that share a tensor must call it together.

    Args:
        params: T parameters. Those that are no DTensors count as replicated on all ranks that share the others.
        previous: what this one replaces: its process group is kept if it has the same ranks.

    Attributes:
        group: the ranks that share the parameters; None without DTensors.
        active: whether a tensor is really split, so that there is something to communicate.

    Raises:
        ValueError: DTensors on meshes of which none has the ranks of all others.
    """

    def __init__(self, params: Sequence[Tensor], previous: RankSums | None = None) -> None:
        self.group: dist.ProcessGroup | None = None
        self.active = False
        shards: dict[int, Any] = {t: p for t, p in enumerate(params) if is_sharded(p)}
        self._ranks: list[int] = []
        if not shards:
            return
        meshes = {p.device_mesh for p in shards.values()}
        largest = max(meshes, key=lambda mesh: mesh.size())
        self._ranks = sorted(largest.mesh.flatten().tolist())
        if any(not set(mesh.mesh.flatten().tolist()) <= set(self._ranks) for mesh in meshes):
            raise ValueError(
                "the optimizer needs one device mesh that has the ranks of all parameters, got "
                + ", ".join(sorted(map(str, meshes)))
            )
        self._device_type = largest.device_type
        self.group = self._make_group(largest, previous)
        self.active = any(
            size > 1 and not placement.is_replicate()
            for p in shards.values()
            for size, placement in zip(p.device_mesh.shape, p.placements, strict=True)
        )
        first = dist.get_rank() == self._ranks[0]
        counts = [_is_counted(shards[t], self._ranks[0]) if t in shards else first for t in range(len(params))]
        self._leaves_out = None if all(counts) else torch.tensor([[not counted] for counted in counts])

    def _make_group(self, mesh: Any, previous: RankSums | None) -> dist.ProcessGroup | None:
        if previous is not None and previous.group is not None and previous._ranks == self._ranks:
            return previous.group
        if len(self._ranks) == dist.get_world_size():
            return dist.group.WORLD
        if mesh.ndim == 1:
            return mesh.get_group()  # type: ignore[no-any-return]
        return dist.new_group(self._ranks, use_local_synchronization=True)  # type: ignore[no-any-return]

    def __call__(self, sums: Tensor) -> Tensor:
        """[T, S] of the whole tensors from [T, S] of the shards, the same bits on all ranks; one all-reduce, of float64."""
        if not self.active:
            return sums
        whole = sums.double()
        if self._leaves_out is not None:
            if self._leaves_out.device != sums.device:
                self._leaves_out = self._leaves_out.to(sums.device)
            whole = whole.masked_fill(self._leaves_out, 0.0)
        elif whole is sums:
            whole = sums.clone()
        return self._all_reduce(whole).to(sums.dtype)

    def _all_reduce(self, x: Tensor) -> Tensor:
        # With CPU offload the parameters are on the CPU and the ranks talk through their GPUs.
        there = x if x.device.type == self._device_type else x.to(self._device_type)
        dist.all_reduce(there, group=self.group)
        return there.to(x.device)


def _is_counted(param: Any, first_rank: int) -> bool:
    mesh = param.device_mesh
    if first_rank not in mesh.mesh.flatten().tolist():
        return False  # another part of the ranks has the same tensor on a mesh of its own
    return all(c == 0 for c, placement in zip(mesh.get_coordinate(), param.placements, strict=True) if placement.is_replicate())
