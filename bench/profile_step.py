"""Where the time of one MetaAdamW step goes, phase by phase.

    python -m bench.profile_step [--model 148-tiny] [--ops]

The default model has next to no elements, so every microsecond is overhead. `rest` is the Python of step() itself, the lookups
of gradients and the vectors of step sizes. Reading the clock costs about 0.1 us a phase and is part of the figures.
"""

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch

from bench.optimizers import Workload, ours, torch_fused
from bench.shapes import MODELS
from bench.timing import interleaved


def phases(optimizer: Any) -> dict[str, tuple[Any, str]]:
    """The parts of a step, none inside another: label, then the object and the attribute that is called."""
    lists = optimizer._states
    return {
        "hold": (lists, "hold"),
        "set_gradients": (lists, "set_gradients"),
        "tensor_stats": (lists.launch, "tensor_stats"),
        "hyper-parameters": (optimizer._hyperparameters, "update"),
        "group_features": (optimizer._backend, "group_features"),
        "encoder": (optimizer.encoder, "forward"),
        "modulation": (optimizer._backend, "modulation"),
        "adamw_update_": (lists.launch, "adamw_update_"),
        "after_update": (lists, "after_update"),
    }


def timed(function: Callable[..., Any], spent: dict[str, float], label: str) -> Callable[..., Any]:
    """The function, adding the seconds that it takes to spent[label]."""

    def run(*args: Any, **kwargs: Any) -> Any:
        begin = time.perf_counter()
        result = function(*args, **kwargs)
        spent[label] += time.perf_counter() - begin
        return result

    return run


def main() -> None:
    """Reads the options, measures and prints."""
    parser = argparse.ArgumentParser(description="Phases of one MetaAdamW step.")
    parser.add_argument("--model", default="148-tiny", choices=list(MODELS))
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--threads", type=int, help="default: torch's own")
    parser.add_argument("--ops", action="store_true", help="also torch.profiler's table of the operations")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    workload = Workload(options.model)
    fused, subject = torch_fused(workload), ours(workload)
    for side in (fused, subject):
        side.warm_up(workload)
    spent: dict[str, float] = defaultdict(float)
    samples: dict[str, list[float]] = defaultdict(list)
    for label, (owner, attribute) in phases(subject.optimizer).items():
        setattr(owner, attribute, timed(getattr(owner, attribute), spent, label))

    def step() -> None:
        spent.clear()
        begin = time.perf_counter()
        subject.step()
        total = time.perf_counter() - begin
        for label, seconds in spent.items():
            samples[label].append(seconds)
        samples["rest"].append(total - sum(spent.values()))
        samples["all but the encoder"].append(total - spent["encoder"])
        samples["whole step"].append(total)

    times = interleaved({"fused": fused.step, "ours": step}, seconds=options.seconds, max_rounds=4_000)
    base = times.spread("fused").median
    print(f"{options.model}, {torch.get_num_threads()} threads, {times.note()}")
    print(f"{'phase':<20}{'us':>10}{'of torch fused':>16}")
    phases_kept = {label: [values[i] for i in times.kept] for label, values in samples.items()}
    for label, values in [*phases_kept.items(), ("torch fused", times.rounds["fused"])]:
        print(f"{label:<20}{statistics.median(values) * 1e6:>10.1f}{statistics.median(values) / base:>16.2f}")
    if options.ops:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            for _ in range(50):
                subject.step()
        print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=40))


if __name__ == "__main__":
    main()
