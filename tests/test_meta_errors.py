"""Bad input to the meta-learner raises, and model, optimizer, encoder and meta-learner are then as they were."""

import copy

import pytest
import torch
from torch import nn

from metaadamw_fast import EncoderConfig, MetaLearner, MicroBatches

from .cases import same, two_layers, unchanged

BATCH = torch.linspace(-1, 1, 12).reshape(4, 3)


def mean_square(model, batch):
    return model(batch).square().mean()


LEARNERS = [
    *(({name: "no"}, ValueError, f"Invalid {name}: 'no'") for name in ("objective", "balance", "hvp", "gap_at")),
    *(({name: (1, 1)}, ValueError, f"{name} needs one entry per term") for name in ("priorities", "term_kinds", "fixed_weights")),
    ({"term_kinds": ("regression", "regression", "no")}, ValueError, "Invalid term_kinds"),
    ({"lr": -1.0}, ValueError, "Invalid learning rate"),
    ({"scaler": object()}, ValueError, "Invalid scaler: object"),
    ({"model": nn.Linear(3, 2)}, ValueError, "0.weight is not a parameter of the model"),
]


@pytest.mark.parametrize(("options", "error", "message"), LEARNERS, ids=[next(iter(options)) for options, _, _ in LEARNERS])
def test_meta_learner(options, error, message):
    model, opt = two_layers()
    with unchanged(opt), pytest.raises(error, match=message):
        MetaLearner(**{"optimizer": opt, "model": model, "loss_fn": mean_square, **options})


UPDATES = {  # the loss function, the call from which on it goes wrong (the third one is at the look-ahead parameters), the message
    "not scalar": (lambda model, batch: model(batch), 1, "must return a scalar tensor, got .4, 2."),
    "not scalar at the look-ahead": (lambda model, batch: model(batch), 3, "must return a scalar tensor, got .4, 2."),
    "not a tensor": (lambda model, batch: 1.0, 1, "must return a scalar tensor, got float"),
    "not a tensor at the look-ahead": (lambda model, batch: 1.0, 3, "must return a scalar tensor, got float"),
    "no gradient": (lambda model, batch: mean_square(model, batch).detach(), 1, "no gradient"),
    "no gradient in the second batch": (lambda model, batch: mean_square(model, batch).detach(), 2, "no gradient"),
    "no validation batch": (None, 1, "val_batch"),
}


@pytest.mark.parametrize("name", UPDATES)
def test_meta_update(name):
    loss, first, message = UPDATES[name]
    model, opt = two_layers()
    seen = []

    def loss_fn(model, batch):
        seen.append(batch)
        return loss(model, batch) if loss and len(seen) >= first else mean_square(model, batch)

    meta = MetaLearner(opt, model, loss_fn)
    before = copy.deepcopy(meta.state_dict())
    with unchanged(opt), pytest.raises(ValueError, match=message):
        meta.update(BATCH, BATCH, BATCH if loss else None)
    assert same(meta.state_dict(), before)


def test_meta_learner_of_another_encoder_or_truncated():
    model, opt = two_layers()
    meta = MetaLearner(opt, model, mean_square)
    meta.update(BATCH, BATCH, BATCH)
    before = copy.deepcopy(meta.state_dict())
    other = MetaLearner(*reversed(two_layers(encoder=EncoderConfig(layers=3))), mean_square)
    other.update(BATCH, BATCH, BATCH)
    states = [other.state_dict(), *({k: v for k, v in other.state_dict().items() if k != key} for key in before)]
    for state in states:
        with pytest.raises(ValueError, match=r"."):
            meta.load_state_dict(state)
        assert same(meta.state_dict(), before)


def corrupted(f):
    def spoil(state):
        f(state)
        return state

    return spoil


def adam_state(index=2, **entries):
    return corrupted(lambda d: d["meta_optimizer"]["state"][index].update(entries))


LEARNER_STATES = {  # what is wrong, and the entry that the message names
    "not a dict": (lambda d: None, "meta-learner"),
    "log_vars as a list": (corrupted(lambda d: d.update(log_vars=[0.0] * 3)), "log_vars"),
    "log_vars of two": (corrupted(lambda d: d.update(log_vars=torch.zeros(2))), "log_vars"),
    "updates": (corrupted(lambda d: d.update(updates="x")), "updates"),
    "meta_optimizer None": (corrupted(lambda d: d.update(meta_optimizer=None)), "optimizer checkpoint"),
    "no states": (corrupted(lambda d: d["meta_optimizer"].pop("state")), "state"),
    "fewer parameters": (corrupted(lambda d: d["meta_optimizer"]["param_groups"][0]["params"].pop()), "parameters"),
    "no lr": (corrupted(lambda d: d["meta_optimizer"]["param_groups"][0].pop("lr")), "lr"),
    "step": (adam_state(step="x"), "step of parameter 2"),
    "exp_avg": (adam_state(exp_avg="x"), "exp_avg of parameter 2"),
    "exp_avg_sq": (adam_state(exp_avg_sq=torch.ones(1)), "exp_avg_sq of parameter 2"),
    "no step": (corrupted(lambda d: d["meta_optimizer"]["state"][2].pop("step")), "parameter 2 .* lacks step"),
    "no exp_avg": (corrupted(lambda d: d["meta_optimizer"]["state"][2].pop("exp_avg")), "parameter 2 .* lacks exp_avg"),
}


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("name", LEARNER_STATES)
def test_a_corrupt_checkpoint_of_a_learner(name, fresh):
    spoil, message = LEARNER_STATES[name]
    model, opt = two_layers()
    saved = MetaLearner(opt, model, mean_square)
    saved.update(BATCH, BATCH, BATCH)
    state = spoil(copy.deepcopy(saved.state_dict()))
    meta = MetaLearner(opt, model, mean_square) if fresh else saved
    before = copy.deepcopy(meta.state_dict())
    with pytest.raises(ValueError, match=message):
        meta.load_state_dict(state)
    assert same(meta.state_dict(), before)
    meta.update(BATCH, BATCH, BATCH)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parameters_in_which_a_look_ahead_is_lost(dtype):
    model, opt = two_layers()
    model.to(dtype)
    meta = MetaLearner(opt, model, mean_square)
    before = copy.deepcopy([opt.state_dict(), dict(model.state_dict()), meta.state_dict()])
    with pytest.raises(ValueError, match=f"float32 or float64 parameters, got {dtype}"):
        meta.update(*[BATCH.to(dtype)] * 3)
    assert same([opt.state_dict(), dict(model.state_dict()), meta.state_dict()], before)


def test_micro_batches_without_a_batch():
    model, opt = two_layers()
    with unchanged(opt), pytest.raises(ValueError, match="MicroBatches without a batch"):
        MetaLearner(opt, model, mean_square).update(BATCH, MicroBatches([]), BATCH)
