"""AdamW beside MetaAdamW or MADA on real data: a progress bar, a table and a picture.

    python examples/demo.py                                   digits, nothing to download
    python examples/demo.py --task etth1 [--data DIR]         the forecasting task of MetaAdamW's paper
    python examples/demo.py --optimizer mada                  MADA beside AdamW; "metaadamw mada" for both

All optimizers train the same initial models on the same batches with the same schedule.
"""

import argparse
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import NoReturn

import torch
from data import DataError
from picture import COEFFICIENT_COLOURS, draw
from scipy.stats import t as student_t
from tasks import Task, digits, etth1
from tqdm import tqdm
from training import Run, train

OPTIMIZERS = {"metaadamw": "MetaAdamW", "mada": "MADA"}


def main() -> int:
    """Run the demo; returns the exit status."""
    options = parse_arguments()
    try:
        task = choose_task(options)
        names = ["AdamW", *(name for key, name in OPTIMIZERS.items() if key in options.optimizer)]
        print_setting(task, names)
        runs = train_all(task, names)
        print_table(task, runs)
        draw(task, runs, options.output)
        print(f"\nPicture: {options.output}")
    except (DataError, OSError) as error:
        print(f"demo.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ndemo.py: interrupted", file=sys.stderr)
        return 130
    return 0


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, without the usage above it."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong with the command line and end."""
        self.exit(2, f"demo.py: {message} (see --help)\n")


def parse_arguments() -> argparse.Namespace:
    """The command line; what is wrong with it is said before anything is trained."""
    parser = OneLineParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", choices=("digits", "etth1"), default="digits")
    parser.add_argument(
        "--optimizer", nargs="+", choices=OPTIMIZERS, default=["metaadamw"], metavar="NAME", help="metaadamw, mada, or both"
    )
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder with ETT-small/ETTh1.csv (else downloaded)")
    parser.add_argument("--epochs", type=positive(int), metavar="N", help="passes over the data")
    parser.add_argument("--seeds", type=positive(int), metavar="N", help="runs per optimizer")
    parser.add_argument("--output", type=Path, default=Path("demo.png"), metavar="FILE", help="the picture")
    parser.add_argument("--meta-every", type=positive(int), metavar="K", help="training steps per meta-update")
    parser.add_argument("--meta-lr", type=positive(float), metavar="R", help="rate of the meta-optimizer")
    options = parser.parse_args()
    if options.data and options.task == "digits":
        parser.error("argument --data: it is for --task etth1; digits come with scikit-learn")
    if options.output.suffix != ".png":
        parser.error(f"argument --output: {options.output} does not end in .png")
    if not options.output.absolute().parent.is_dir():
        parser.error(f"argument --output: there is no folder {options.output.parent}")
    return options


def positive(kind: type[int] | type[float]) -> Callable[[str], int | float]:
    """An argument type for argparse: a positive number of `kind`."""

    def parse(text: str) -> int | float:
        value = kind(text)
        if not 0 < value < math.inf:
            raise argparse.ArgumentTypeError(f"{text} is not a positive number")
        return value

    parse.__name__ = "whole number" if kind is int else "number"  # argparse's word for a bad value
    return parse


def choose_task(options: argparse.Namespace) -> Task:
    """The task with the user's own settings in place of its defaults."""
    task = digits() if options.task == "digits" else etth1(options.data)
    return replace(
        task,
        epochs=options.epochs or task.epochs,
        seeds=options.seeds or task.seeds,
        meta_every=options.meta_every or task.meta_every,
        learner=task.learner | ({"lr": options.meta_lr} if options.meta_lr else {}),
    )


def print_setting(task: Task, names: list[str]) -> None:
    """What is about to run, so that the table below it can be read alone."""
    parts = " / ".join(f"{len(part[0]):,}" for part in (task.train, task.meta_validation, task.reported))
    schedule = "cosine schedule to 0" if task.cosine else "constant"
    steps = task.epochs * task.steps_per_epoch
    reads = "MetaAdamW's meta-updates also read the second" if "MetaAdamW" in names else "nothing reads the second"
    lines = [
        f"Task: {task.title}",
        f"Data: {parts} examples = train / meta-validation / reported. All optimizers train on the",
        f"      first part; {reads}; every figure is of the third.",
        f"All:  lr {task.optimizer['lr']:g} ({schedule}), weight decay {task.optimizer['weight_decay']:g}, "
        f"{task.epochs} epoch(s) = {steps} steps of {task.batch_size} examples, {task.seeds} seed(s)",
    ]
    if "MetaAdamW" in names:
        make_optimizer = task.learner.get("make_optimizer", torch.optim.Adam)
        lines += [
            f"MetaAdamW: {task.optimizer['grouping']} groups; a meta-update every {task.meta_every} steps "
            f"({steps // task.meta_every} in all),",
            f"      {task.learner['objective']} objective, {make_optimizer.__name__} with rate {task.learner['lr']:g}",
        ]
    if "MADA" in names:
        lines += ["MADA: starts as this AdamW; the library's rates for its six coefficients"]
    print("\n".join(lines), flush=True)


def train_all(task: Task, names: list[str]) -> dict[str, list[Run]]:
    """Every optimizer with every seed; one progress bar over all of it."""
    runs: dict[str, list[Run]] = {name: [] for name in names}
    total = task.epochs * task.steps_per_epoch * task.seeds * len(names)
    # In a log file every refresh is a line's worth of text, so refresh seldom there.
    interval = 0.2 if sys.stderr.isatty() else 10
    with tqdm(total=total, unit="step", leave=False, mininterval=interval) as bar:
        for seed in range(task.seeds):
            for name in names:
                bar.set_description(f"{name:9}, seed {seed}", refresh=False)
                runs[name].append(train(task, name, seed, bar.update))
    return runs


def print_table(task: Task, runs: dict[str, list[Run]]) -> None:
    """One column per optimizer, mean ± standard deviation over seeds."""
    rows: list[tuple[str, Callable[[Run], float | None], float, int]] = [
        (f"validation loss ({task.loss_name})", lambda run: run.losses[-1], 1, 4),
        ("time per step, median (ms)", lambda run: run.step_time, 1e3, 2),
        ("optimizer's share of the step (%)", lambda run: run.optimizer_share, 1e2, 1),
        ("all steps, meta-updates, at medians (s)", lambda run: run.training_time, 1, 1),
    ]
    if "MetaAdamW" in runs:
        rows.insert(3, ("one meta-update (training steps)", lambda run: run.meta_cost, 1, 1))
    if task.is_classification:
        rows.insert(1, ("validation accuracy (%)", lambda run: run.accuracies[-1], 1e2, 2))
    print("\n" + " " * 40 + "".join(f"{name:>22}" for name in runs))
    for label, value, unit, digits_shown in rows:
        cells = [summary([unit * x for run in runs[name] if (x := value(run)) is not None], digits_shown) for name in runs]
        print(f"{label:<40}" + "".join(f"{cell:>22}" for cell in cells))
    if "MADA" in runs:
        ends = [run.coefficients[-1] for run in runs["MADA"]]
        for name, column in zip(COEFFICIENT_COLOURS, zip(*ends, strict=True), strict=True):
            print(f"{f'MADA: {name} at the end':<40}{summary(list(column), 4):>{22 * len(runs)}}")
    seeds = f"mean ± std over {task.seeds} seeds" if task.seeds > 1 else "one seed"
    print(f"\nAt the end of training, {seeds}.")
    for name in list(runs)[1:]:
        print(compare(name, "validation loss", [pair_difference(runs, name, seed) for seed in range(task.seeds)]))


def summary(values: list[float], digits_shown: int) -> str:
    """Mean and, from two values on, the sample's standard deviation."""
    if not values:
        return "–"
    text = f"{mean(values):.{digits_shown}f}"
    return text + (f" ± {stdev(values):.{digits_shown}f}" if len(values) > 1 else "")


def pair_difference(runs: dict[str, list[Run]], name: str, seed: int) -> float:
    """Final loss of an optimizer less that of AdamW with the same seed."""
    return runs[name][seed].losses[-1] - runs["AdamW"][seed].losses[-1]


def compare(name: str, what: str, differences: list[float]) -> str:
    """What the paired differences allow to say, and no more."""
    text = f"{name} - AdamW, {what}: {summary(differences, 4)}"
    if len(differences) < 2:
        return f"{text} (one seed: nothing can be said about noise)"
    # Two-sided 95 % interval of Student's t for the mean of the paired differences.
    quantile = student_t.ppf(0.975, len(differences) - 1)
    half_width = quantile * stdev(differences) / math.sqrt(len(differences))
    verdict = "within noise" if abs(mean(differences)) <= half_width else "beyond noise"
    return f"{text}, paired by seed: {verdict} (95 % interval of the mean: ± {half_width:.4f})"


if __name__ == "__main__":
    sys.exit(main())
