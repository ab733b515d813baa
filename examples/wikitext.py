"""Does MADA repair betas that were chosen badly? A small GPT on the bytes of WikiText-2, AdamW beside MADA, from three starts.

    python examples/wikitext.py [--data DIR] [--steps N] [--seeds N]

Of the three starts one is usual and two are deliberately wrong. All runs of a seed train the same initial model on the same batches
with the same schedule of the learning rate. MADA's other four coefficients start where MADA is AdamW; its rates are the library's,
or those that its authors took for a small model on characters.
DIR holds wikitext-2/train.txt and valid.txt; without it they are downloaded.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

import torch
from data import DataError, load_wikitext2
from fsdp_train import CONTEXT, GPT, loss_fn
from torch import Tensor
from tqdm import tqdm

from metaadamw_fast import MADA

STARTS = ((0.9, 0.95), (0.5, 0.6), (0.99, 0.99))
LR, EPS, WEIGHT_DECAY = 2e-3, 1e-8, 0.1
BATCH, LAYERS, WARM_UP = 16, 2, 50
VALIDATION_BYTES = 2**17
CHARACTER_MOMENTA = {"beta1": 0.5, "beta2": 0.5, "beta3": 0.5, "rho": 0.5, "c": 0.5, "gamma": 0.0}


def adamw(params: list[Tensor], betas: tuple[float, float]) -> torch.optim.Optimizer:
    """Betas stay as they are."""
    return torch.optim.AdamW(params, lr=LR, betas=betas, eps=EPS, weight_decay=WEIGHT_DECAY, fused=True)


def mada(params: list[Tensor], betas: tuple[float, float]) -> torch.optim.Optimizer:
    """With the library's rates."""
    return MADA(params, lr=LR, betas=betas, eps=EPS, weight_decay=WEIGHT_DECAY)


def mada_fast(params: list[Tensor], betas: tuple[float, float]) -> torch.optim.Optimizer:
    """With the rates that its authors took for a small model on characters; on the betas they act ten times as much."""
    start = {"lr": LR, "betas": betas, "eps": EPS, "weight_decay": WEIGHT_DECAY}
    return MADA(params, **start, hyper_lr=2.5e-3, hyper_momentum=CHARACTER_MOMENTA, freeze_steps=0)


OPTIMIZERS = {"AdamW": adamw, "MADA": mada, "MADA, character rates": mada_fast}


@dataclass
class Run:
    """One training."""

    loss: float  # mean cross-entropy of a validation byte, in nats
    coefficients: list[float] | None  # of MADA at the end, in the order of docs/mada.md section 1


def train(
    name: str, betas: tuple[float, float], seed: int, texts: dict[str, Tensor], steps: int, on_step: Callable[[], object]
) -> Run:
    """Train a model from scratch. A text is [bytes], int64; a batch is BATCH windows of texts["train"]."""
    data = texts["train"]
    torch.manual_seed(seed)
    model = GPT(LAYERS)
    opt = OPTIMIZERS[name](list(model.parameters()), betas)
    # A linear warm-up, then a cosine down to a hundredth.
    warm_up = torch.optim.lr_scheduler.LinearLR(opt, 1 / WARM_UP, total_iters=WARM_UP)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(opt, max(steps - WARM_UP, 1), eta_min=LR / 100)
    schedule = torch.optim.lr_scheduler.SequentialLR(opt, [warm_up, cosine], [WARM_UP])
    generator = torch.Generator().manual_seed(seed)
    window = torch.arange(CONTEXT + 1)
    for _ in range(steps):
        starts = torch.randint(len(data) - CONTEXT, (BATCH, 1), generator=generator)
        opt.zero_grad()
        loss_fn(model, data[starts + window]).backward()
        opt.step()
        schedule.step()
        on_step()
    return Run(validation_loss(model, texts["valid"]), opt.coefficients[0].tolist() if isinstance(opt, MADA) else None)


@torch.no_grad()
def validation_loss(model: GPT, data: Tensor) -> float:
    """Mean cross-entropy of a byte, in nats, over windows that do not overlap."""
    windows = data.unfold(0, CONTEXT + 1, CONTEXT)
    return mean(loss_fn(model, batch).item() for batch in windows.split(256) if len(batch) == 256)


def summary(values: list[float], digits: int) -> str:
    """Mean and, from two values on, the sample's standard deviation."""
    return f"{mean(values):.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")


def print_table(runs: dict[tuple[float, float], dict[str, list[Run]]]) -> None:
    """A block for each start: losses, what MADA's differ from AdamW's by, seed by seed, and where its coefficients ended."""
    names = "".join(f"{name:<6}" for name in ("β1", "β2", "β3", "ρ", "c", "γ"))
    print(f"{'start (β1, β2)':<16}{'optimizer':<24}{'validation loss':>18}{'less AdamW, paired':>22}   {names}")
    for betas, by_name in runs.items():
        for name, seeds in by_name.items():
            losses = [run.loss for run in seeds]
            row = f"{betas!s:<16}{name:<24}{summary(losses, 4):>18}"
            ends = [run.coefficients for run in seeds if run.coefficients is not None]
            if ends:
                less = [run.loss - base.loss for run, base in zip(seeds, by_name["AdamW"], strict=True)]
                row += f"{summary(less, 4):>22}   " + " ".join(f"{mean(column):.3f}" for column in zip(*ends, strict=True))
            print(row)


def main() -> int:
    """Train everything and print the table; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder with wikitext-2/train.txt and valid.txt (else downloaded)")
    parser.add_argument("--steps", type=int, default=1000, metavar="N", help="of each run")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="runs of each optimizer from each start")
    options = parser.parse_args()
    try:
        texts = {
            part: torch.frombuffer(bytearray(load_wikitext2(part, options.data)), dtype=torch.uint8).long()
            for part in ("train", "valid")
        }
    except DataError as error:
        print(f"wikitext.py: {error}", file=sys.stderr)
        return 1
    texts["valid"] = texts["valid"][:VALIDATION_BYTES]
    runs: dict[tuple[float, float], dict[str, list[Run]]] = {betas: {name: [] for name in OPTIMIZERS} for betas in STARTS}
    total = options.steps * options.seeds * len(STARTS) * len(OPTIMIZERS)
    interval = 0.2 if sys.stderr.isatty() else 10  # in a log file every refresh is a line's worth of text
    with tqdm(total=total, unit="step", leave=False, mininterval=interval) as bar:
        for seed in range(options.seeds):
            for betas in STARTS:
                for name in OPTIMIZERS:
                    bar.set_description(f"{name}, {betas}, seed {seed}", refresh=False)
                    runs[betas][name].append(train(name, betas, seed, texts, options.steps, bar.update))
    print(
        f"WikiText-2 as bytes, GPT of {LAYERS} layers, {options.steps} steps of {BATCH} × {CONTEXT} bytes, lr {LR:g} (warm-up "
        f"{WARM_UP}, cosine),\nweight decay {WEIGHT_DECAY:g}; losses in nats per byte at the end, mean ± std over {options.seeds} "
        "seed(s); coefficients at the end, means\n"
    )
    print_table(runs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
