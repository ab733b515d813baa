"""A meta-update against a training step: time, peak memory, and the error of central differences.

    python -m bench.meta_update [--seconds S] [--json FILE]

The model is the paper's for ETTh1: a Transformer of width 128 with 2 layers, 96 steps of 7 variables in, batch 64, all three
terms. Data are random: time does not depend on them. Sides take turns in one process; ratios are medians with their quartiles. A
training step is zero_grad, forward, backward and an optimizer step of MetaAdamW. Peak memory is what the process's resident
memory grows by during one call, in copies of the parameters, each side in a process of its own (Linux).
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench import timing

BATCH, STEPS, VARIABLES = 64, 96, 7
Batch = tuple[Tensor, Tensor]


class Forecaster(nn.Module):
    """A Transformer encoder over the input steps and a linear head on the last one."""

    def __init__(self, width: int = 128, layers: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Linear(VARIABLES, width)
        self.position = nn.Parameter(torch.randn(STEPS, width) * 0.02)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.1, activation="gelu", batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, 24 * VARIABLES)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 96, 7] → [B, 168]."""
        y: Tensor = self.head(self.encoder(self.embedding(x) + self.position)[:, -1])
        return y


def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
    """The mean squared error."""
    return nn.functional.mse_loss(model(batch[0]), batch[1])


def batches() -> list[Batch]:
    """Three."""
    return [(torch.randn(BATCH, STEPS, VARIABLES), torch.randn(BATCH, 24 * VARIABLES)) for _ in range(3)]


def sides() -> tuple[dict[str, Callable[[], object]], int]:
    """What is timed, each on a model of its own, and the number of parameters."""
    from metaadamw_fast import MetaAdamW, MetaLearner

    data, calls, count = batches(), {}, 0
    for name in ("training step", "finite_difference", "exact"):
        torch.manual_seed(0)
        model = Forecaster()
        count = sum(p.numel() for p in model.parameters())
        opt = MetaAdamW(model.named_parameters(), lr=1e-4, model=model, head_init="xavier")

        def train(model: nn.Module = model, opt: MetaAdamW = opt) -> None:
            opt.zero_grad()
            loss_fn(model, data[0]).backward()
            opt.step()

        train()
        train()
        if name == "training step":
            calls[name] = train
        else:
            meta = MetaLearner(opt, model, loss_fn, hvp=name)
            calls[name] = lambda meta=meta: meta.update(*data)
    return calls, count


def peak(name: str) -> float:
    """What one call of a side adds to this process's resident memory at most, in copies of the parameters."""

    def status(field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))

    calls, count = sides()
    for _ in range(3):
        calls[name]()
    peaks = []
    for _ in range(3):
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident
        before = status("VmRSS")
        calls[name]()
        peaks.append(status("VmHWM") - before)
    return max(peaks) / (4 * count)


def main() -> None:
    """Reads the options, measures and prints."""
    parser = argparse.ArgumentParser(description="A meta-update against a training step.")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        print(peak(options.peak))
        return
    calls, count = sides()
    for call in calls.values():
        call()
    times = timing.interleaved(calls, seconds=options.seconds)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {count:,} parameters, {times.note()}")
    found: dict[str, Any] = {"machine": timing.machine()}
    for name in calls:
        ratio = times.ratio(name, "training step")
        command = [sys.executable, "-m", "bench.meta_update", "--peak", name]
        # Without a fixed threshold glibc keeps what a call before has freed, more or less of it, and that growth is not seen.
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**16)}
        memory = float(subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout)
        found[name] = {"seconds": asdict(times.spread(name)), "ratio": asdict(ratio), "peak_parameters": memory}
        print(
            f"{name:<20}{times.spread(name).median * 1e3:>9.1f} ms  {ratio.median:>6.2f} [{ratio.q1:.2f}, {ratio.q3:.2f}]"
            f"  peak {memory:.1f} x parameters"
        )
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
