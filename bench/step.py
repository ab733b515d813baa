"""The whole step against torch.optim.AdamW: milliseconds, ratio, bytes and bandwidth.

    python -m bench.step [--models minigpt-1.7m gpt2-124m] [--threads N] [--evict] [--json FILE] [--png FILE]

Ratios are medians of the ratios within a round, with their quartiles and the 95 % interval of the median; see
bench/timing.py. Bytes per element are counted, not measured: words read + written times 4. `of copy` and `of in place`
are the bandwidth from these bytes as a share of measured ones (timing.Memory). `predicted` is the ratio that the words
alone would give, at the measured price of a word read and of a word written. A model whose four words per
parameter fit the last-level cache is marked: its bandwidth is not the memory's. With --evict every step starts with
cold caches, as after a large forward and backward pass. What does more than a plain step is compared with what does the
same in torch, too.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch

from bench import timing
from bench.optimizers import CONTENDERS, LEARNERS, Contender, Workload, ours_reference
from bench.shapes import MODELS

WORD = 4  # bytes: everything here is float32
REFERENCE_LIMIT = 2**24  # parameters; above, the reference backend would take most of the run and tell nothing


def measure(
    model: str, sides: list[Callable[[Workload], Contender]], seconds: float, memory: timing.Memory, evict: bool
) -> dict[str, Any]:
    """Times all sides on one model, against the first; returns what the table prints."""
    workload = Workload(model)
    if workload.numel > REFERENCE_LIMIT:
        sides = [side for side in sides if side is not ours_reference]
    contenders = [side(workload) for side in sides]
    for contender in contenders:
        contender.warm_up(workload)
    before = memory.bandwidths()
    times = timing.interleaved(
        {c.name: c.step for c in contenders},
        seconds=seconds,
        before_round=workload.use_gradients,
        before_call=memory.copy if evict else None,
    )
    after = memory.bandwidths()  # again: neighbours come and go
    bandwidth = {name: before[name] + after[name] for name in before}
    base, seconds_of_base = contenders[0].name, predicted_seconds(contenders[0], bandwidth)
    rows = []
    for contender in contenders:
        spread = times.spread(contender.name)
        row: dict[str, Any] = {
            "optimizer": contender.name,
            "seconds": asdict(spread),
            "ratio": asdict(times.ratio(contender.name, base)),
        }
        if contender.rival in times.rounds:
            row["rival"] = {"name": contender.rival, **asdict(times.ratio(contender.name, contender.rival))}
        if contender.words is not None:
            rate = contender.words * WORD * workload.numel / spread.median
            row["bytes_per_element"] = contender.words * WORD
            row["bytes_per_second"] = rate
            row["share"] = {name: rate / statistics.median(bandwidth[name]) for name in ("copy", "in place")}
            row["predicted_ratio"] = predicted_seconds(contender, bandwidth) / seconds_of_base
        rows.append(row)
    return {
        "model": model,
        "tensors": len(workload.named),
        "parameters": workload.numel,
        "caches": caches(workload, evict),
        "rounds": times.note(),
        "bandwidth": {name: asdict(timing.Spread.of(rates)) for name, rates in bandwidth.items()},
        "rows": rows,
    }


def predicted_seconds(contender: Contender, bandwidth: dict[str, list[float]]) -> float:
    """Of an element, from its words: `read` tells what a word read takes, `in place` what a word read and one written do."""
    read, both = (words * WORD / statistics.median(bandwidth[name]) for words, name in ((1, "read"), (2, "in place")))
    return contender.reads * read + contender.writes * max(both - read, 0.0)


def caches(workload: Workload, evict: bool) -> str:
    """Where a step finds its data."""
    if evict:
        return "evicted before every step"
    fits = 4 * WORD * workload.numel <= timing.cache_bytes()
    return "fits the last-level cache" if fits else "larger than the last-level cache"


def show(table: dict[str, Any]) -> None:
    """Prints one model's table."""
    print(
        f"\n{table['model']}: {table['tensors']} tensors, {table['parameters']:,} parameters, {table['caches']}\n{table['rounds']}"
    )
    for name, rate in table["bandwidth"].items():
        print(f"{name}: {rate['median'] / 1e9:.1f} GB/s [{rate['q1'] / 1e9:.1f}, {rate['q3'] / 1e9:.1f}]")
    heads = (f"{'optimizer':<26}{'ms':>9}{'ratio':>7}", f"{'quartiles':<14}", f"{'95 % of median':<14}")
    print(*heads, f"{'B/elem':>7}{'predicted':>11}{'GB/s':>7}{'of copy':>9}{'of in place':>12}", sep="  ")
    for row in table["rows"]:
        ratio = row["ratio"]
        counted = f"{'-':>7}{'-':>11}{'-':>7}{'-':>9}{'-':>12}"
        if "share" in row:
            share = row["share"]
            counted = f"{row['bytes_per_element']:>7}{row['predicted_ratio']:>11.2f}{row['bytes_per_second'] / 1e9:>7.1f}"
            counted += f"{share['copy']:>9.0%}{share['in place']:>12.0%}"
        cells = [f"{row['optimizer']:<26}{row['seconds']['median'] * 1e3:>9.3f}{ratio['median']:>7.2f}"]
        cells += [f"{f'[{ratio[a]:.2f}, {ratio[b]:.2f}]':<14}" for a, b in (("q1", "q3"), ("low95", "high95"))]
        print(*cells, counted, sep="  ")
    for row in table["rows"]:
        if "rival" in row:
            rival = row["rival"]
            interval = f"[{rival['q1']:.2f}, {rival['q3']:.2f}]"
            print(f"{row['optimizer']} / {rival['name']}: {rival['median']:.2f} {interval}")


def draw(tables: list[dict[str, Any]], file: str) -> None:
    """A bar for each ratio with its quartiles, one panel per model."""
    from matplotlib.figure import Figure  # only here: the figures need no picture

    figure = Figure(figsize=(9, 1 + 0.35 * sum(len(table["rows"]) + 1 for table in tables)), layout="constrained")
    heights = [len(table["rows"]) for table in tables]
    panels = figure.subplots(len(tables), 1, squeeze=False, sharex=True, height_ratios=heights)[:, 0]
    for panel, table in zip(panels, tables, strict=True):
        rows = table["rows"][::-1]
        ratios = [row["ratio"] for row in rows]
        medians = [ratio["median"] for ratio in ratios]
        whiskers = [[r["median"] - r["q1"] for r in ratios], [r["q3"] - r["median"] for r in ratios]]
        ours = ["MetaAdamW" in row["optimizer"] for row in rows]
        bars = panel.barh(
            [row["optimizer"] for row in rows], medians, xerr=whiskers, color=["tab:blue" if x else "0.7" for x in ours]
        )
        panel.bar_label(bars, [f"{x:.2f}" for x in medians], padding=4)
        panel.axvline(1, color="0.3", linewidth=0.8)
        panel.set_title(f"{table['model']}: {table['parameters']:,} parameters in {table['tensors']} tensors", loc="left")
        panel.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xlabel("time of a step / torch.optim.AdamW(fused=True)")
    figure.savefig(file, dpi=120)


def main() -> None:
    """Reads the options, measures and prints one table per model."""
    parser = argparse.ArgumentParser(description="One optimizer step, against torch.optim.AdamW(fused=True).")
    parser.add_argument("--models", nargs="+", default=["minigpt-1.7m", "gpt2-124m"], choices=list(MODELS))
    parser.add_argument("--optimizers", nargs="+", default=list(CONTENDERS), choices=[*CONTENDERS, *LEARNERS])
    parser.add_argument("--seconds", type=float, default=25.0, help="of interleaved timing per model")
    parser.add_argument("--threads", type=int, help="default: torch's own")
    parser.add_argument("--evict", action="store_true", help="start every step with cold caches")
    parser.add_argument("--json", metavar="FILE", help="write the figures there too")
    parser.add_argument("--png", metavar="FILE", help="draw the ratios there (needs matplotlib)")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    # Ratios are against the first side, so it is always there.
    sides = ["fused", *(side for side in options.optimizers if side != "fused")]
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, float32")
    memory = timing.Memory()
    tables = []
    for model in options.models:
        tables.append(measure(model, [(CONTENDERS | LEARNERS)[side] for side in sides], options.seconds, memory, options.evict))
        show(tables[-1])
    if options.json:
        run = {"machine": timing.machine(), "tables": tables}
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(run, file, indent=1)
    if options.png:
        draw(tables, options.png)


if __name__ == "__main__":
    main()
