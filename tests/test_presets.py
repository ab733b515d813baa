"""docs/algorithm.md section 11: the paper's settings by task name."""

import pytest
import torch

from metaadamw_fast import EncoderConfig, FeatureConfig, MetaAdamW, MetaLearner, presets

from .models import (
    batch,
    mse,
    one_thread,  # noqa: F401
    perceptron,
    train,
)

TABLE = {  # every K steps, layers, hidden, heads, features, D, gating, priorities
    "etth1": (217, 8, 16, 6, "basic", 6, True, (1, 1, 1)),
    "wikitext2": (123, 8, 16, 6, "basic", 6, False, (1, 1, 1)),
    "multi30k": (454, 128, 64, 6, "basic", 6, False, (2, 5, 1)),
    "cifar10": (190, 64, 64, 6, "basic", 6, False, (5, 2, 1)),
    "imdb": (39, 64, 64, 11, "basic_plus", 11, True, (1, 3, 5)),
}


def test_the_tasks():
    assert list(presets) == list(TABLE)


@pytest.mark.parametrize("task", TABLE)
def test_the_table(task):
    every, layers, hidden, heads, version, dim, gating, priorities = TABLE[task]
    preset = presets[task]
    assert preset.every == every
    assert preset.optimizer == {
        "lr": 5e-4,
        "weight_decay": 1e-2,
        "betas": (0.9, 0.999),
        "grouping": "fine_grained",
        "features": FeatureConfig(version, v_norm=True, time_step=True, gating=gating, dim=dim),
        "encoder": EncoderConfig(layers, heads, hidden),
        "lr_scale_range": 1.0,
        "wd_scale_range": 1.0,
        "head_init": "xavier",
    }
    assert preset.learner == {
        "objective": "combined",
        "balance": "huw",
        "priorities": priorities,
        "lr": 1e-4,
        "make_optimizer": torch.optim.SGD,
    }


@pytest.mark.parametrize("task", TABLE)
def test_every_preset_trains(task):
    _, layers, hidden, heads, _, dim, gating, priorities = TABLE[task]
    model = perceptron()
    opt = MetaAdamW(model.named_parameters(), model=model, **presets[task].optimizer)
    meta = MetaLearner(opt, model, mse, **presets[task].learner)
    assert len(opt.encoder.encoder.layers) == layers
    assert opt.encoder.encoder.layers[0].linear1.weight.shape == (hidden, dim)
    assert opt.encoder.encoder.layers[0].heads == heads
    assert ("feature_gates" in opt.encoder.state_dict()) == gating
    assert meta.priorities == priorities
    train(model, opt, 1)
    before = opt.encoder.head.weight.detach().clone()
    report = meta.update(*(batch(model, i) for i in range(1, 4)))
    assert report.total.isfinite()
    assert opt.lr_scale.std() > 1e-4  # the Xavier start
    assert 0 < (opt.encoder.head.weight - before).abs().max() < 1e-2
