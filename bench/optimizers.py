"""The sides of the step benchmark: optimizers on equal parameters and the same gradients, each with its own state."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bench.shapes import named_shapes

LR, WEIGHT_DECAY = 1e-4, 1e-2
Named = list[tuple[str, torch.nn.Parameter]]


class Workload:
    """Random parameters and two sets of gradients.

    Two, because a training step brings new gradient tensors: whoever remembers pointers has to look again, and
    the cosine of gradient and momentum does not sit at 1. All optimizers share the gradients; each has parameters of
    its own, because MetaAdamW carries sums of the parameters it wrote and must not find another optimizer's.
    """

    def __init__(self, model: str, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        shapes = named_shapes(model)
        # 0.02 is the usual initial scale of weights; gradients of 1e-3 stay far from subnormal squares.
        self.named: Named = [
            (name, torch.nn.Parameter(torch.randn(shape, generator=generator).mul_(0.02))) for name, shape in shapes
        ]
        self.gradients: list[list[Tensor]] = [
            [torch.randn(shape, generator=generator).mul_(1e-3) for _, shape in shapes] for _ in range(2)
        ]
        self.numel = sum(p.numel() for _, p in self.named)
        self.copies: list[list[torch.nn.Parameter]] = []
        self.use_gradients(0)

    def use_gradients(self, i: int) -> None:
        """Gives every parameter its gradient of set i mod 2."""
        for parameters in self.copies:
            for p, g in zip(parameters, self.gradients[i % 2], strict=True):
                p.grad = g

    def parameters_for_one(self) -> Named:
        """Parameters for one optimizer, equal to those of the others."""
        named = [(name, torch.nn.Parameter(p.detach().clone())) for name, p in self.named]
        self.copies.append([p for _, p in named])
        return named


@dataclass
class Contender:
    """One optimizer with everything the table says about it."""

    name: str
    step: Callable[[], object]
    optimizer: torch.optim.Optimizer
    reads: int | None  # words of an element that a step reads; None: not counted
    writes: int | None
    rival: str | None = None  # what does the same in torch, where that is not the fused step

    @property
    def words(self) -> int | None:
        """Read and written per parameter element."""
        return None if self.reads is None or self.writes is None else self.reads + self.writes

    def warm_up(self, workload: Workload, steps: int = 3) -> None:
        """Takes a few steps, so that no state is zero, and makes sure that they move parameters and moments."""
        last = self.optimizer.param_groups[-1]["params"][-1]
        before = last.detach().clone()
        for i in range(steps):
            workload.use_gradients(i)
            self.step()
        state = self.optimizer.state[last]
        if torch.equal(before, last) or not all(bool(state[k].any()) for k in ("exp_avg", "exp_avg_sq")):
            raise RuntimeError(f"{self.name}: the step left its parameters or its state as they were")


def torch_fused(workload: Workload) -> Contender:
    """Reads p, g, m, v; writes p, m, v."""
    optimizer = torch.optim.AdamW(workload.parameters_for_one(), lr=LR, weight_decay=WEIGHT_DECAY, fused=True)
    return Contender("torch fused", optimizer.step, optimizer, 4, 3)


def torch_foreach(workload: Workload) -> Contender:
    """One pass per operation, each of which writes a word.

    p*= reads 1, lerp m 2, v*= 1, addcmul v 2, sqrt 1, div 1, add eps 1, addcdiv p 3.
    """
    optimizer = torch.optim.AdamW(workload.parameters_for_one(), lr=LR, weight_decay=WEIGHT_DECAY, foreach=True)
    return Contender("torch foreach", optimizer.step, optimizer, 12, 8)


def torch_clip_fused(workload: Workload) -> Contender:
    """The norm reads g, clipping reads and writes g, the update takes 7.

    The bound is far above the norm: the coefficient is 1, torch multiplies all the same, and the gradients that the
    other sides see stay as they are.
    """
    optimizer = torch.optim.AdamW(workload.parameters_for_one(), lr=LR, weight_decay=WEIGHT_DECAY, fused=True)

    def step() -> None:
        torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], max_norm=1e30)
        optimizer.step()

    return Contender("clip_grad_norm_ + fused", step, optimizer, 6, 4)


def ours(workload: Workload, name: str = "MetaAdamW", reads: int | None = 6, **options: Any) -> Contender:
    """Exact statistics read g and m (the last update summed p and v); the update reads p, g, m, v and writes p, m, v.

    The head starts from Xavier, not at the identity: every scale differs from 1 and no short cut is possible.
    """
    from metaadamw_fast import MetaAdamW  # here, so that torch alone can be timed without the library

    options = {"backend": "cpp", "head_init": "xavier", **options}
    optimizer = MetaAdamW(workload.parameters_for_one(), lr=LR, weight_decay=WEIGHT_DECAY, **options)
    return Contender(name, optimizer.step, optimizer, reads, 3)


def ours_clip(workload: Workload) -> Contender:
    """Clipping is a factor in the update, taken from the statistics: no word more. The bound is below the norm, 11 at 124 M."""
    contender = ours(workload, "MetaAdamW, max_grad_norm", max_grad_norm=0.1)
    return replace(contender, rival="clip_grad_norm_ + fused")


def ours_lagged(workload: Workload) -> Contender:
    """The update itself makes the statistics, for the next step."""
    return ours(workload, "MetaAdamW, lagged", 4, statistics="lagged")


def ours_reference(workload: Workload) -> Contender:
    """The plain PyTorch backend; the number of its passes is no claim, so no words are counted."""
    return ours(workload, "MetaAdamW, reference", None, backend="reference")


def learning(
    name: str, trace: float, every: int = 1, policy: str = "scales", rate: float = 1e-3
) -> Callable[[Workload], Contender]:
    """Lagged, with an OnlineLearner; against lagged without one. The average of a trace is a word read and a word written."""

    def contender(workload: Workload) -> Contender:
        from metaadamw_fast import OnlineLearner

        made = ours(workload, f"MetaAdamW, {name}", 4 + (trace > 0), statistics="lagged")
        assert made.writes is not None
        OnlineLearner(made.optimizer, policy=policy, trace=trace, every=every, rate=rate)  # type: ignore[arg-type]
        return replace(made, writes=made.writes + (trace > 0), rival="MetaAdamW, lagged")

    return contender


BASE = torch_fused
CONTENDERS: dict[str, Callable[[Workload], Contender]] = {
    "fused": torch_fused,
    "foreach": torch_foreach,
    "clip": torch_clip_fused,
    "ours": ours,
    "ours-clip": ours_clip,
    "ours-lagged": ours_lagged,
    "reference": ours_reference,
}
# Not in the table of all: `python -m bench.step --optimizers ours-lagged online online-trace online-encoder`.
LEARNERS: dict[str, Callable[[Workload], Contender]] = {
    "online": learning("online scales", 0.0),
    "online-trace": learning("online scales, trace", 0.995),
    "online-encoder": learning("online encoder, every 10", 0.0, 10, "encoder"),
    "online-encoder-each": learning("online encoder", 0.0, 1, "encoder"),
}
