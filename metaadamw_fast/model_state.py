"""Leaving a model exactly as it was, and letting it be differentiated twice."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterable, Iterator
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.nn.parallel import DistributedDataParallel

from .core.sharding import local
from .parallel import UnreducedGradients

# Every module has these, and they are restored otherwise or not at all. The last three say what the reducer of
# DistributedDataParallel has done, which no attribute undoes.
_NOT_PLAIN = {*vars(nn.Module()), "_lazy_init_ran", "_has_rebuilt_buckets", "_static_graph_delay_allreduce_enqueued"}
_CONTAINERS = (dict, OrderedDict, defaultdict, list, set, deque)  # not their subclasses: some forbid update() or clear()
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Restoring(ABC):
    """A context manager whose exit calls :meth:`restore`. Enter it twice: ``with x, x:``.

    Ctrl-C and signal handlers that raise can stop Python anywhere, also in an exit. Things are half restored if they stop the inner
    exit; the outer one then restores all of them.
    """

    def __enter__(self) -> None:
        return None  # what changes, changes inside: an interrupt in here would skip the exit

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.restore(failed=kind is not None)

    @abstractmethod
    def restore(self, *, failed: bool) -> None:
        """Puts everything back, whatever an earlier call has put back. ``failed``: an exception ends the block."""


class ModelState(Restoring):
    """What of a model a meta-update leaves as it was, bit for bit.

    Parameters, gradients (also those that FSDP2 has not reduced yet), ``requires_grad``, buffers, train/eval modes, torch's random
    states and grad mode. Plain attributes of modules too, with the lists, dicts and sets in them: old-style weight_norm,
    spectral_norm and prune keep the weight of the last forward pass in one, rotary embeddings keep tables.

    Args:
        model: the model.
        params: parameters that will be written, whether they are the model's or not. Those of the model that require a gradient may
            be written by any forward pass: that of ``nn.Embedding(max_norm=...)`` does.
        frozen: whether those of ``params`` that require no gradient will be written. If not, no frozen parameter is copied: most of
            the model may be frozen.

    Attributes:
        values: the values of the parameters that were copied; of DTensors, of this rank's shards.

    Raises:
        RuntimeError: a torch in which unreduced gradients of FSDP2 are not found.
    """

    def __init__(self, model: nn.Module, params: Iterable[Tensor], *, frozen: bool) -> None:
        written = set(params)
        leaves = list(dict.fromkeys((*model.parameters(), *written)))
        modules = list(model.modules())
        self._unreduced = UnreducedGradients(model)
        self.values = {p: local(p).detach().clone() for p in leaves if p.requires_grad or (frozen and p in written)}
        self._data = [(p, p.data) for p in leaves if type(p) in (Tensor, nn.Parameter)]
        self._gradients = {p: p.grad for p in leaves}
        self._requires_grad = [(p, p.requires_grad) for p in leaves]
        self._modes = [(module, module.training) for module in modules]
        self._replicas = [module for module in modules if isinstance(module, DistributedDataParallel)]
        self._attributes: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self._containers: list[tuple[Any, Any]] = []
        self._tensors: list[tuple[Tensor, Tensor, Tensor]] = []
        seen = set(map(id, leaves))
        for module in modules:
            plain = {name: x for name, x in vars(module).items() if name not in _NOT_PLAIN}
            self._attributes.append((vars(module), plain))
            for x in (module._buffers, *module._buffers.values(), *plain.values()):
                self._keep(x, seen)
        hooks = [x for module in modules for x in (module._backward_pre_hooks, module._backward_hooks)]
        hooks += [x for p in leaves for x in _hooks_of_tensor(p)]
        self._hooks = [(x, x.copy()) for x in hooks]
        self._devices = sorted({p.device.index or 0 for p in leaves if p.is_cuda})
        self._random = torch.get_rng_state(), [torch.cuda.get_rng_state(d) for d in self._devices]
        self._grad_enabled = torch.is_grad_enabled()
        self._reached: set[Tensor] = set()
        self._restored = False

    def _keep(self, x: Any, seen: set[int]) -> None:
        """Takes down the tensors and containers that ``x`` is or contains."""
        if isinstance(x, Tensor):
            shard = local(x)
            # Others, such as sparse ones, are restored as attributes only.
            dense = type(shard) in (Tensor, nn.Parameter) and shard.layout is torch.strided and not shard.is_meta
            if dense and id(x) not in seen:
                self._tensors.append((shard, shard.data, shard.detach().clone()))
            seen.add(id(x))
        elif type(x) in (tuple, *_CONTAINERS) and id(x) not in seen:
            seen.add(id(x))
            if type(x) is not tuple:
                self._containers.append((x, copy.copy(x)))
            for part in x.values() if isinstance(x, dict) else x:
                self._keep(part, seen)

    def set_aside(self) -> None:
        """Takes away the gradients, to which autograd would add in place, and the backward hooks of parameters and modules.

        A hook would take the gradient of a look-ahead for that of a training step. If it is an optimizer, it would move the model.
        DistributedDataParallel would hand that gradient to its communication hook, and write it into the buckets that gradients may
        be views of: it synchronizes none meanwhile.
        """
        for replica in self._replicas:
            replica.require_backward_grad_sync = False
        self._unreduced.set_aside()
        for hooks, _ in self._hooks:
            hooks.clear()
        for p in self._gradients:
            p.grad = None

    def set_aside_at(self, leaves: Iterable[Tensor]) -> None:
        """The same for leaves to whose ``.grad`` a backward pass is about to add. They may be those of another model.

        Unlike ``torch.autograd.grad``, such a pass also runs the hooks of a leaf's node in the graph.
        """
        for p in leaves:
            hooks = [] if p in self._gradients else _hooks_of_tensor(p)
            if p not in self._reached and p.requires_grad:
                hooks += _hooks_of_node(p)
                self._reached.add(p)
            self._gradients.setdefault(p, p.grad)
            self._hooks += [(x, x.copy()) for x in hooks]
            for x in hooks:
                x.clear()
            p.grad = None

    def rewind(self) -> None:
        """Puts the random states back: evaluations that start from there draw equal dropout masks."""
        cpu, cuda = self._random
        torch.set_rng_state(cpu)
        for device, state in zip(self._devices, cuda, strict=True):
            torch.cuda.set_rng_state(state, device)

    def restore(self, *, failed: bool) -> None:
        """Puts everything back.

        A write to a buffer breaks a backward pass that is still to come and needs it. So a buffer is written only if it changed.
        """
        if self._restored:
            return
        for p, data in self._data:
            if _place(p) != _place(data):
                p.data = data
        for p, value in self.values.items():
            local(p).data.copy_(value)  # through .data: no version counter shows it
        torch.clear_autocast_cache()  # it holds low-precision copies of the look-ahead
        torch.set_grad_enabled(self._grad_enabled)
        self.rewind()
        for p, requires_grad in self._requires_grad:
            if p.requires_grad != requires_grad:
                p.requires_grad = requires_grad
        for p, grad in self._gradients.items():
            if p.grad is not grad:
                p.grad = grad
        for module, training in self._modes:
            if module.training != training:
                module.training = training
        for found, kept in self._attributes:
            for name in found.keys() - kept.keys() - _NOT_PLAIN:
                del found[name]
            for name, x in kept.items():
                if found.get(name, found) is not x:
                    found[name] = x
        for found, kept in (*self._containers, *self._hooks):
            if not _same_objects(found, kept):
                found.clear()
                (found.extend if isinstance(found, (list, deque)) else found.update)(kept)
        for x, data, value in self._tensors:
            if _place(x) != _place(data):
                x.data = data
            if not _same_bits(data, value):
                x.detach().copy_(value)
        self._unreduced.restore(failed=failed)
        self._restored = True


def _place(x: Tensor) -> tuple[Any, ...]:
    return x.data_ptr(), x.dtype, x.shape, x.stride()


def _same_bits(x: Tensor, y: Tensor) -> bool:
    """Also true of NaN and NaN, and false of 0 and -0."""
    if x.is_floating_point():
        x, y = (z.view(_INTEGERS[z.element_size()]) for z in (x, y))
    return torch.equal(x, y)


def _same_objects(x: Any, y: Any) -> bool:
    """Whether two containers have the same objects in the same order."""
    parts = [[*z, *z.values()] if isinstance(z, dict) else [*z] for z in (x, y)]
    return len(parts[0]) == len(parts[1]) and all(map(is_, *parts))


def _hooks_of_tensor(x: Tensor) -> list[dict[int, Any]]:
    return [hooks for hooks in (x._backward_hooks, x._post_accumulate_grad_hooks) if hooks is not None]


def _hooks_of_node(leaf: Tensor) -> Iterator[dict[int, Any]]:
    """Yields the hooks that run before and after a gradient is added to ``leaf.grad``."""
    node = get_gradient_edge(leaf).node  # it shows its hooks to nobody but a hook that is registered
    for register in (node.register_prehook, node.register_hook):
        handle: Any = register(lambda *_: None)
        hooks = handle.hooks_dict_ref()
        handle.remove()
        yield hooks


class TwiceDifferentiable(Restoring):
    """Lets torch choose kernels whose backward has a backward, from :meth:`begin` to the exit.

    Of the attention kernels only MATH has one; of the recurrent ones on the CPU, those without oneDNN.
    """

    _ATTENTION = ("flash", "mem_efficient", "math", "cudnn")

    def __init__(self, model: nn.Module) -> None:
        self._recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
        self._kernels = {name: getattr(torch.backends.cuda, f"{name}_sdp_enabled")() for name in self._ATTENTION}
        self._one_dnn = bool(torch.backends.mkldnn.enabled)

    def begin(self) -> None:
        """Makes the choice, by single switches: torch's ``sdpa_kernel`` leaves them off if an interrupt stops its exit."""
        self._switch({name: name == "math" for name in self._ATTENTION}, self._one_dnn and not self._recurrent)

    def restore(self, *, failed: bool) -> None:
        """Puts the switches back."""
        self._switch(self._kernels, self._one_dnn)

    def _switch(self, kernels: dict[str, bool], one_dnn: bool) -> None:
        for name, enabled in kernels.items():
            getattr(torch.backends.cuda, f"enable_{name}_sdp")(enabled)
        settings: Any = torch.backends.mkldnn
        if settings.enabled != one_dnn:  # not mkldnn.flags(): it sets the precisions too, and warns of its own defaults
            settings.enabled = one_dnn
