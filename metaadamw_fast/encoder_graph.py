"""A step's way from the statistics to what the update takes, replayed as one CUDA graph that the optimizer captures itself.

A default step has some forty small operations there, each launched by the host. A replay is one launch: the GPU runs the captured
kernels on the captured addresses, and no Python runs at all. From this come the hazards:

- Numbers that change from step to step would stay what they were in the capture. So they are copied into tensors of the graph's
  own before each replay.
- The encoder's parameters are read where they lie, and a meta-optimizer that writes in place is seen. Other memory under a
  parameter (``p.data = x``, a moved model) would not be. So addresses, strides and dtypes are compared in every step.
- Whatever else Python decides (options, ranges, groups, shapes, devices, the backend) is compared in every step, too. A difference
  drops the graph, and a few steps later the next one is captured.
- The graph would read freed memory. So it holds all that it reads.
- The next replay overwrites what the last one wrote. So the user is shown copies.
- Hooks and subclasses of the encoder may do in Python whatever they like. So they are not captured.
- The user may be capturing the whole step. Then the operations themselves go into the user's graph, and none of ours is replayed.

A step that is not captured is carried out operation by operation. The reason is logged, once for each.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .core import devices
from .encoder import GroupEncoder

_log = logging.getLogger("metaadamw_fast")

# Equal steps before a capture: the first compile kernels and allocate workspaces, and what changes at every step is not captured.
_STEPS_BEFORE = 2


class Encoding(NamedTuple):
    """Features [G, D] and scales [4, G] of a step, and for its update the vectors [V, T] that ``modulation`` makes of them."""

    features: Tensor
    scales: Tensor
    vectors: Tensor


class Sources(NamedTuple):
    """All that a decision is made of.

    Attributes:
        written: tensors whose numbers change in place or that are others in every step; None for one that is not there.
        replaced: tensors that nobody writes: where their numbers change, they are others.
        encoder: whose parameters are read where they lie.
        objects: whatever else is read; others where it changes.
        options: likewise, compared by value.
    """

    written: Sequence[Tensor | None]
    replaced: Sequence[Tensor | None]
    encoder: GroupEncoder
    objects: Sequence[Any]
    options: tuple[Any, ...]


Decide = Callable[[Sequence[Any], Sequence[Any]], Encoding]


class EncoderGraph:
    """Carries out decisions, most of them by replaying a graph; see the head of this file.

    A copy or a pickle of it starts without a graph.
    """

    def __init__(self) -> None:
        self._logged: set[str] = set()
        self._key: Any = None  # of the last step
        self._equal_steps = 0  # that have had this key
        self._captured: _Captured | None = None

    def __reduce__(self) -> tuple[type[EncoderGraph], tuple[()]]:
        return EncoderGraph, ()

    def __call__(self, decide: Decide, sources: Sources) -> Encoding:
        """Returns ``decide(sources.written, sources.replaced)``; features and scales are the caller's own."""
        device = sources.encoder.head.weight.device
        obstacle = _obstacle(sources.encoder, device)
        if obstacle is not None:
            self._log(obstacle)
            return decide(sources.written, sources.replaced)
        key = _key(sources)
        if key != self._key:
            self._key, self._equal_steps, self._captured = key, 0, None
        if self._captured is None and self._equal_steps == _STEPS_BEFORE:
            try:
                self._captured = _Captured(decide, sources, device)
            except RuntimeError as error:
                self._log(f"the capture failed: {error}")
        self._equal_steps += 1  # past a failed capture: there is no second attempt before something changes
        return decide(sources.written, sources.replaced) if self._captured is None else self._captured.replay(sources)

    def _log(self, reason: str) -> None:
        if reason not in self._logged:
            self._logged.add(reason)
            _log.warning("encoder_graph: a step is carried out without the graph: %s", reason)


class _Captured:
    """A captured graph with all that it reads and writes."""

    def __init__(self, decide: Decide, sources: Sources, device: torch.device) -> None:
        encoder = sources.encoder
        self._device = device
        with torch.inference_mode(False):  # a tensor made in inference mode could not be written outside of it
            self._written = [None if x is None else torch.empty_like(x) for x in sources.written]
            self._replaced = [None if x is None else torch.empty_like(x) for x in sources.replaced]
        self._streams = {_stream(device)}  # on which torch knows that these tensors are used
        self._copied: Sequence[Tensor | None] = [None] * len(self._replaced)  # whose numbers `_replaced` has

        def run() -> tuple[Encoding, Tensor]:
            decision = decide(self._written, self._replaced)
            return decision, torch.cat([decision.features.flatten(), decision.scales.flatten()])

        self._graph, (self._decision, self._shown) = capture(run, device)
        # Held, so that the graph finds them, and nothing else can come to have their addresses or ids.
        parameters = [x.detach() for x in encoder.read_in_place()]
        self._held = [encoder, encoder.constants(), parameters, list(encoder.float64_copies), sources.objects]

    def replay(self, sources: Sources) -> Encoding:
        """The decision for the numbers of now."""
        self._use_on_this_stream()
        pairs = list(zip(self._written, sources.written, strict=True))
        replaced = zip(self._replaced, sources.replaced, self._copied, strict=True)
        pairs += [(mine, x) for mine, x, copied in replaced if x is not copied]
        self._copied = sources.replaced
        by_dtype: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
        for mine, x in pairs:
            if mine is not None and x is not None:
                targets, origins = by_dtype.setdefault(x.dtype, ([], []))
                targets.append(mine)
                origins.append(x)
        for targets, origins in by_dtype.values():
            torch._foreach_copy_(targets, origins)  # one launch: a foreach operation takes one dtype
        self._graph.replay()
        features, scales, vectors = self._decision
        of_features, of_scales = self._shown.clone().split([features.numel(), scales.numel()])
        return Encoding(of_features.view(features.shape), of_scales.view(scales.shape), vectors)

    def _use_on_this_stream(self) -> None:
        """Keeps torch from giving the inputs' memory away, when the graph is dropped, before this stream is through with it."""
        stream = _stream(self._device)
        if stream not in self._streams:
            for x in (*self._written, *self._replaced):
                if x is not None:
                    x.record_stream(stream)
            self._streams.add(stream)


def _obstacle(encoder: GroupEncoder, device: torch.device) -> str | None:
    """Why a step is not captured; None if it can be."""
    if not can_capture(device):
        return f"the parameters are on {device}, not on a CUDA device"
    if devices.capturing(device):
        return "step() itself is being captured in a CUDA graph"
    if not encoder.is_plain:
        return "the encoder is of a subclass or has hooks"
    return None


def _key(sources: Sources) -> Any:
    """Equal for steps that one graph serves."""
    kinds = [None if x is None else (x.shape, x.dtype, x.device) for x in (*sources.written, *sources.replaced)]
    read = sources.encoder.read_in_place()
    places = [*map(Tensor.data_ptr, read)], [*map(Tensor.stride, read)], [x.dtype for x in read]
    objects = [id(x) for x in (sources.encoder, *sources.objects, *sources.encoder.constants())]
    return kinds, places, objects, sources.options


def can_capture(device: torch.device) -> bool:
    """Whether there are CUDA graphs on this device."""
    return device.type == "cuda"


def _stream(device: torch.device) -> Any:
    return torch.cuda.current_stream(device) if device.type == "cuda" else None


def capture(run: Callable[[], Any], device: torch.device) -> tuple[Any, Any]:
    """A CUDA graph of what ``run`` does, and what ``run`` returns: its numbers come with each replay.

    torch captures on a stream of its own and waits for the GPU before. Other threads may go on using the GPU. The graph has a
    memory pool of its own: torch takes no pool again whose graphs are gone.
    """
    graph = torch.cuda.CUDAGraph()
    # A capture that fails leaves torch's capturing stream the current one: `stream` brings back the one before.
    with (
        torch.cuda.device(device),
        torch.cuda.stream(torch.cuda.current_stream(device)),
        torch.cuda.graph(graph, capture_error_mode="thread_local"),
    ):
        result = run()
    return graph, result
