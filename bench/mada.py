"""MADA and AVGrad against torch.optim.AdamW(fused=True), and against MADA whose coefficients autograd differentiates.

    python -m bench.mada [--models minigpt-1.7m resnet18-11.7m gpt2-124m] [--threads N] [--json FILE]

Tables as bench/step.py has them: interleaved medians, bytes counted, and the ratio that the words alone predict at the measured
price of a word read and of a word written. What the words are is in docs/mada.md section 9. Gradients are random and change in
every round, so that no difference of gradients, and hence no state, is 0. Learning begins with the first update.

Autograd has a table of its own, because it holds so many words an element that beside all others a large model would not fit; it is
left out where the memory does not suffice, which is said. Its words are those of the operations that it dispatches. Before anything
is timed both take some steps on a small model and must agree.

`python -m bench.gpu_step --optimizer mada` times the same sides on a GPU.
"""

import argparse
import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from bench import timing
from bench.optimizers import LR, WEIGHT_DECAY, Contender, Workload, torch_fused
from bench.shapes import MODELS, named_shapes, numel
from bench.step import WORD, measure, show

ALL_FROZEN = {"hyper_lr": 0.0}
# Words of an element, read and written, of a step: docs/mada.md section 9.
WORDS = {"exact": (16, 7), "lagged": (9, 7), "frozen": (4, 3), "AVGrad": (5, 4)}
# What the process grows by at the peak of the autograd table; 59 words were measured on resnet18-11.7m. The graph of one step goes
# while that of the next comes, and malloc does not give everything back.
AUTOGRAD_WORDS = 64


class AutogradMADA(torch.optim.Optimizer):
    """MADA without a formula for its derivatives: the update stays in autograd's graph until the next gradient goes through it.

    That is how the authors' code learns; the arithmetic is that of docs/mada.md section 3. Coefficients are scalars that require
    gradients. An update leaves parameters that are functions of them; the next ``step`` sends its gradients back through these
    functions, moves the coefficients, cuts the graph and builds a new one. One tensor and one operation after the other.
    """

    NAMES = ("beta1", "beta2", "beta3", "rho", "c", "gamma")
    RATES = (5e-4, 5e-4, 0.1, 0.1, 0.1, 0.1)
    BOUNDS = ((0.01, 0.99), (0.501, 0.99), (0.0, 0.99), (0.0, 1.0), (0.0, 1.0), (0.0, 1.0))
    CLIP = 10.0

    def __init__(
        self, params: Any, lr: float, weight_decay: float, start: tuple[float, ...] = (0.9, 0.95, 0.0, 1.0, 1.0, 1.0)
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "eps": 1e-6, "lion_betas": (0.95, 0.98)})
        device = self.param_groups[0]["params"][0].device
        self.theta = [torch.tensor(x, dtype=torch.float64, device=device, requires_grad=True) for x in start]
        self.steps = 0
        self._moved: list[Tensor] = []  # the parameters as functions of theta

    @property
    def coefficients(self) -> Tensor:
        """[1, 6], as MADA's."""
        return torch.stack([x.detach() for x in self.theta])[None]

    def step(self) -> None:
        """Learns from the gradients, then updates with them."""
        pairs = [(group, p) for group in self.param_groups for p in group["params"]]
        if self._moved:
            torch.autograd.backward(self._moved, [p.grad for _, p in pairs])
            self._learn()
        self.steps += 1
        self._moved = [self._updated(p, group, self.state[p]) for group, p in pairs]
        for (_, p), moved in zip(pairs, self._moved, strict=True):
            p.data = moved.detach()

    @torch.no_grad()
    def _learn(self) -> None:
        for x, rate, (low, high) in zip(self.theta, self.RATES, self.BOUNDS, strict=True):
            h = x.grad * (self.CLIP / (x.grad.abs() + 1e-6)).clamp(max=1.0)
            x.sub_(rate * h).clamp_(low, high)
            x.grad = None

    @torch.enable_grad()
    def _updated(self, p: Tensor, group: dict[str, Any], state: dict[str, Tensor]) -> Tensor:
        beta1, beta2, beta3, rho, c, gamma = self.theta
        lion1, lion2 = group["lion_betas"]
        g, t = p.grad, self.steps
        if not state:
            names = ("exp_avg", "exp_avg_sq", "average_sq", "exp_avg_diff", "lion_exp_avg")
            state |= {name: torch.zeros_like(g) for name in names} | {"last_grad": g}
        d = g - state["last_grad"]
        g_hat_sq = (g + beta3 * d).square()
        v = state["exp_avg_sq"]
        sign = torch.sign(g_hat_sq.detach() - v)
        v = beta2 * v + (1 - beta2) * ((c + (1 - c) * sign) * g_hat_sq + (1 - c) * v)
        m = beta1 * state["exp_avg"] + (1 - beta1) * g
        n = beta3 * state["exp_avg_diff"] + (1 - beta3) * d
        average = state["average_sq"] + (v.detach() - state["average_sq"]) / t
        u = lion1 * state["lion_exp_avg"] + (1 - lion1) * g
        lion = lion2 * state["lion_exp_avg"] + (1 - lion2) * g
        denominator = ((rho * v + (1 - rho) * average) / (1 - beta2**t)).sqrt() + group["eps"]
        direction = gamma * ((m / (1 - beta1**t) + beta3 * n) / denominator) + (1 - gamma) * torch.sign(u)
        after = {"exp_avg": m, "exp_avg_sq": v, "average_sq": average, "exp_avg_diff": n, "lion_exp_avg": lion, "last_grad": g}
        state.update({name: x.detach() for name, x in after.items()})
        return (1 - group["lr"] * group["weight_decay"]) * p.detach() - group["lr"] * direction


def mada(workload: Workload, kind: str = "exact", **options: Any) -> Contender:
    """All six coefficients are learned, and every state is there."""
    from metaadamw_fast import MADA  # here, so that gpu_check can import this file before the extension is built

    options = {"backend": "cpp", "freeze_steps": 0, **options}
    optimizer = MADA(workload.parameters_for_one(), lr=LR, weight_decay=WEIGHT_DECAY, **options)
    return Contender(f"MADA, {kind}", optimizer.step, optimizer, *WORDS[kind])


def mada_lagged(workload: Workload) -> Contender:
    """The update itself makes the sums, for the next step."""
    return mada(workload, "lagged", statistics="lagged")


def mada_frozen(workload: Workload) -> Contender:
    """Nothing is learned and the coefficients are Adam's, so that only Adam's states are there."""
    return mada(workload, "frozen", **ALL_FROZEN)


def avgrad(workload: Workload) -> Contender:
    """Reads p, g, m, V, A; writes p, m, V, A."""
    from metaadamw_fast import AVGrad

    optimizer = AVGrad(workload.parameters_for_one(), lr=LR, weight_decay=WEIGHT_DECAY, backend="cpp")
    return Contender("AVGrad", optimizer.step, optimizer, *WORDS["AVGrad"])


def mada_autograd(workload: Workload) -> Contender:
    """Its words are those of the operations that it dispatches."""
    optimizer = AutogradMADA(workload.parameters_for_one(), LR, WEIGHT_DECAY)
    traffic, _ = autograd_traffic()
    return Contender("autograd's MADA", optimizer.step, optimizer, traffic.reads, traffic.writes)


class Traffic(TorchDispatchMode):
    """Counts what operations do with tensors of ``numel`` elements: the words of an element that they read and write."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.numel, self.reads, self.writes, self.operations = numel, 0, 0, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = function(*args, **(kwargs or {}))
        aliases = [x.alias_info for x in function._schema.returns]
        if not any(alias is not None and not alias.is_write for alias in aliases):  # a view moves nothing
            read, written = self._count((args, kwargs)), self._count(results)
            self.reads += read
            self.writes += written
            self.operations += read + written > 0
        return results

    def _count(self, xs: Any) -> int:
        return sum(isinstance(x, Tensor) and x.numel() == self.numel for x in pytree.tree_leaves(xs))


def autograd_traffic() -> tuple[Traffic, int]:
    """Of a step of ``AutogradMADA`` that learns; and the words of an element held until the next one, parameter included."""
    numel = 1_000
    p = torch.nn.Parameter(torch.randn(numel))
    optimizer, saved = AutogradMADA([p], LR, WEIGHT_DECAY), []
    for _ in range(3):
        p.grad = torch.randn(numel)
        saved.clear()
        with Traffic(numel) as traffic, torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
            optimizer.step()
    held = {x.untyped_storage().data_ptr() for x in (p, *optimizer.state[p].values(), *saved) if x.numel() == numel}
    return traffic, len(held)


SIDES: list[Callable[[Workload], Contender]] = [torch_fused, mada, mada_lagged, mada_frozen, avgrad]


def check_agreement(steps: int = 10) -> None:
    """MADA and autograd's take the same steps.

    Raises:
        RuntimeError: coefficients are apart by a thousandth of what they moved, or parameters by 1e-4 of a step.
    """
    workload = Workload("148-tiny")
    inside = (0.8, 0.9, 0.3, 0.6, 0.7, 0.8)  # no coefficient at a bound, every term there
    names = dict(zip(AutogradMADA.NAMES[2:], inside[2:], strict=True))
    ours = mada(workload, betas=inside[:2], **names).optimizer
    theirs = AutogradMADA(workload.parameters_for_one(), LR, WEIGHT_DECAY, inside)
    for i in range(steps):
        workload.use_gradients(i)
        ours.step()
        theirs.step()
    apart = (ours.coefficients.double().cpu() - theirs.coefficients).abs().max().item()
    moved = (theirs.coefficients - torch.tensor(inside, dtype=torch.float64)).abs().min().item()
    # A mean: where u of section 3 is 0 to rounding, the two may take its sign differently.
    mean = sum((a - b).abs().sum().item() for a, b in zip(*workload.copies, strict=True)) / workload.numel
    if not (apart <= 1e-3 * moved and mean <= 1e-4 * LR):
        raise RuntimeError(f"coefficients differ by {apart:.1e} (they moved by {moved:.1e}), parameters by {mean:.1e}")


def memory_available() -> float:
    """Bytes; infinity where the system does not tell."""
    file = Path("/proc/meminfo")
    lines = file.read_text(encoding="ascii").splitlines() if file.exists() else []
    return next((1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), float("inf"))


def main() -> None:
    """Reads the options, measures and prints two tables per model."""
    parser = argparse.ArgumentParser(description="One step of MADA and AVGrad, against torch.optim.AdamW(fused=True).")
    parser.add_argument("--models", nargs="+", default=["minigpt-1.7m", "resnet18-11.7m", "gpt2-124m"], choices=list(MODELS))
    parser.add_argument("--seconds", type=float, default=25.0, help="of interleaved timing per table")
    parser.add_argument("--threads", type=int, help="default: torch's own")
    parser.add_argument("--json", metavar="FILE", help="write the figures there too")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, float32")
    check_agreement()
    traffic, held = autograd_traffic()
    print(
        f"autograd's MADA reads {traffic.reads} words an element and writes {traffic.writes} in {traffic.operations} operations; "
        f"between two steps it holds {held}"
    )
    memory = timing.Memory()
    tables = []
    for model in options.models:
        for sides in (SIDES, [torch_fused, mada_autograd]):
            gc.collect()  # optimizers of the table before
            needed = AUTOGRAD_WORDS * WORD * numel(named_shapes(model))
            if mada_autograd in sides and needed > memory_available():
                print(f"\n{model}: autograd's MADA is left out, it would need some {needed / 1e9:.0f} GB")
                continue
            tables.append(measure(model, sides, options.seconds, memory, evict=False))
            show(tables[-1])
    if options.json:
        run = {"machine": timing.machine(), "tables": tables}
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(run, file, indent=1)


if __name__ == "__main__":
    main()
