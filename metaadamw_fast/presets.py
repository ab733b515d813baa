"""The paper's settings by task name: arXiv 2605.04055, tables 1 and 4."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from .encoder import EncoderConfig
from .features import FeatureConfig


@dataclass(frozen=True)
class Preset:
    """``MetaAdamW(params, model=model, **preset.optimizer)``, ``MetaLearner(opt, model, loss_fn, **preset.learner)``.

    ``every`` is K: the paper calls ``MetaLearner.update`` every K training steps.
    """

    every: int
    optimizer: dict[str, Any] = field(repr=False)
    learner: dict[str, Any] = field(repr=False)


def _preset(
    every: int,
    layers: int,
    hidden: int,
    heads: int,
    version: str,
    dim: int,
    gating: bool,
    priorities: tuple[float, float, float],
) -> Preset:
    optimizer = {
        "lr": 5e-4,
        "weight_decay": 1e-2,
        "betas": (0.9, 0.999),
        "grouping": "fine_grained",
        "features": FeatureConfig(version, gating=gating, dim=dim),
        "encoder": EncoderConfig(layers, heads, hidden),
        "lr_scale_range": 1.0,
        "wd_scale_range": 1.0,
        "head_init": "xavier",
    }
    learner = {
        "objective": "combined",
        "balance": "huw",
        "priorities": priorities,
        "lr": 1e-4,
        "make_optimizer": torch.optim.SGD,
    }
    return Preset(every, optimizer, learner)


presets = {
    "etth1": _preset(217, 8, 16, 6, "basic", 6, True, (1.0, 1.0, 1.0)),
    "wikitext2": _preset(123, 8, 16, 6, "basic", 6, False, (1.0, 1.0, 1.0)),
    "multi30k": _preset(454, 128, 64, 6, "basic", 6, False, (2.0, 5.0, 1.0)),
    "cifar10": _preset(190, 64, 64, 6, "basic", 6, False, (5.0, 2.0, 1.0)),
    "imdb": _preset(39, 64, 64, 11, "basic_plus", 11, True, (1.0, 3.0, 5.0)),
}
"""By task name: etth1, wikitext2, multi30k, cifar10, imdb."""
