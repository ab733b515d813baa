"""The picture of the demo: validation curves, and over training MetaAdamW's scales of every group and MADA's coefficients."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # a file is all we draw; needs no display

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.ticker import LogLocator, NullFormatter
from tasks import Task
from training import Run, ScaleHistory

from metaadamw_fast.grouping import Group

OPTIMIZER_COLOURS = {"AdamW": "#4b5563", "MetaAdamW": "#d1495b", "MADA": "#1f5fbf"}
COEFFICIENT_COLOURS = {"β1": "#1f5fbf", "β2": "#0f7b4f", "β3": "#c2410c", "ρ": "#7c3aab", "c": "#8a6d00", "γ": "#374151"}
TYPE_COLOURS = {
    "attention": "#1f5fbf",
    "embedding": "#0f7b4f",
    "ffn": "#c2410c",
    "layernorm": "#7c3aab",
    "linear": "#8a6d00",
}
OTHER_COLOUR = "#374151"
POINTS_PER_LINE = 60


def draw(task: Task, runs: dict[str, list[Run]], output: Path) -> None:
    """Write the picture of all runs to `output`; scales and coefficients are those of the first seed."""
    scales = runs["MetaAdamW"][0].scales if "MetaAdamW" in runs else None
    coefficients = runs["MADA"][0].coefficients if "MADA" in runs else None
    panels = 1 + 2 * (scales is not None) + (coefficients is not None)
    figure, (first, *others) = plt.subplots(
        1, panels, figsize=(1 + 5 * panels, 5.4), layout="constrained", width_ratios=(1.15, *[1] * (panels - 1))
    )
    figure.get_layout_engine().set(w_pad=0.12)
    _draw_losses(first, task, runs)
    if coefficients is not None:
        _draw_coefficients(others.pop(0), coefficients)
    if scales is not None:
        left, right = others
        _draw_scales(left, scales, scales.lr, "lr_scale")
        _draw_scales(right, scales, scales.wd, "wd_scale")
        handles, labels = right.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=9)
    figure.suptitle(task.title, fontsize=13)
    figure.savefig(output, dpi=130)
    plt.close(figure)


def _draw_losses(axes: Axes, task: Task, runs: dict[str, list[Run]]) -> None:
    """Mean over seeds, and a band from the lowest to the highest seed."""
    for name, seeds in runs.items():
        steps = seeds[0].eval_steps
        losses = np.array([run.losses for run in seeds])
        colour = OPTIMIZER_COLOURS[name]
        axes.plot(steps, losses.mean(axis=0), color=colour, label=name, linewidth=1.8)
        if len(seeds) > 1:
            axes.fill_between(steps, losses.min(axis=0), losses.max(axis=0), color=colour, alpha=0.2, linewidth=0)
    seed_count = len(seeds)
    spread = f"mean and range of {seed_count} seeds" if seed_count > 1 else "one seed"
    _label(axes, f"Validation loss ({spread})", task.loss_name)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.legend(frameon=False)


def _draw_coefficients(axes: Axes, coefficients: Sequence[Sequence[float]]) -> None:
    """One line per coefficient; many lie at 0 or 1 at the start, where MADA is AdamW."""
    values = np.array(coefficients)  # [steps, 6]
    for column, (name, colour) in enumerate(COEFFICIENT_COLOURS.items()):
        axes.plot(np.arange(1, len(values) + 1), values[:, column], label=name, color=colour, linewidth=1.5)
    _label(axes, "MADA's coefficients (first seed)", "coefficient")
    axes.set_ylim(-0.03, 1.03)
    axes.legend(frameon=False, ncols=2)


def _draw_scales(axes: Axes, history: ScaleHistory, scales: Sequence[Sequence[float]], name: str) -> None:
    """One line per group, in the legend's order; the figure shows the legend once."""
    # A scale follows the gradients of single batches; so many lines are legible only as local means.
    window = max(1, len(scales) // POINTS_PER_LINE)
    count = len(scales) // window
    values = np.array(scales[: count * window]).reshape(count, window, -1).mean(axis=1)  # [points, G]
    steps = (np.arange(count) + 0.5) * window + 0.5  # the middles of the windows; the first step is 1
    order = sorted(range(len(history.groups)), key=lambda g: _legend_key(history.groups[g]))
    for g in order:
        group = history.groups[g]
        axes.plot(steps, values[:, g], label=group.name, linewidth=1.5, **_line_style(group))
    axes.axhline(1, color="black", linewidth=0.8, linestyle=":", zorder=0)
    _label(axes, f"{name} of every group (first seed)", f"{name} (factor; 1 = AdamW)")
    if window > 1:
        axes.set_xlabel(f"training step (a point is the mean of {window})")


def _legend_key(group: Group) -> tuple[str, int, bool]:
    """Types together, early to late, weights before biases."""
    return group.type or "", group.bucket or 0, bool(group.is_bias)


def _line_style(group: Group) -> dict[str, Any]:
    """Hue is the layer type, strength the depth; biases are dashed."""
    strength = (0.45, 0.7, 1.0)[group.bucket or 0]
    colour = np.array(to_rgb(TYPE_COLOURS.get(group.type or "", OTHER_COLOUR)))
    return {"color": tuple(1 - strength * (1 - colour)), "linestyle": (0, (3, 1.2)) if group.is_bias else "-"}


def _label(axes: Axes, title: str, y_label: str) -> None:
    """Title, units and a light grid."""
    axes.set_title(title, fontsize=11)
    axes.set_xlabel("training step")
    axes.set_ylabel(y_label)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
