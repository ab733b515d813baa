"""Data parallel training: replicas stay equal, a meta-update is that of the joint batch. Checkpoints by DCP."""

import copy
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import CheckpointException, DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.nn import functional as F  # noqa: N812
from torch.nn.parallel import DistributedDataParallel

from metaadamw_fast import EncoderConfig, MetaAdamW, MetaLearner, MicroBatches

from . import ranks
from .models import noise, perceptron, said, same
from .optimizers import AVGRAD, MOMENTS, every_with

BATCH = 16  # of all ranks together
pytestmark = ranks.needs_gloo


def loss_fn(model, data):
    return F.mse_loss(model(data[0]), data[1])


def joint(seed):
    return noise((BATCH, 6), 2 * seed), noise((BATCH, 3), 2 * seed + 1)


def trained(model, rank, size, hvp):
    """Six steps with two meta-updates; every rank has its part of each batch."""
    opt = MetaAdamW(model.named_parameters(), lr=1e-2, model=model, head_init="xavier", max_grad_norm=1.0)
    meta = MetaLearner(opt, model, loss_fn, hvp=hvp, gap_at="lookahead", lr=1.0, make_optimizer=torch.optim.SGD)
    part = slice(BATCH // size * rank, BATCH // size * (rank + 1))
    reports = []
    for step in range(6):
        opt.zero_grad()
        loss_fn(model, tuple(x[part] for x in joint(step))).backward()
        opt.step()
        if step % 3 == 2:
            report = meta.update(*(tuple(x[part] for x in joint(100 + 10 * step + i)) for i in range(3)))
            reports.append(said(report))
    return {
        "params": [p.detach().clone() for p in model.parameters()],
        "encoder": [p.detach().clone() for p in opt.encoder.parameters()],
        "log_vars": meta.log_vars.detach().clone(),
        "reports": reports,
    }


def eagerly_compiled(model):
    return torch.compile(model, backend="eager")


def with_an_unused_parameter():
    model = perceptron()
    model.unused = nn.Parameter(torch.ones(3))
    return model


class Inside(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x)


def replica(rank, size, hvp, wrap):
    model = DistributedDataParallel(with_an_unused_parameter(), find_unused_parameters=True)
    return trained(model if wrap is None else wrap(model), rank, size, hvp)


@pytest.mark.parametrize(
    ("hvp", "size", "wrap"),
    [("exact", 2, None), ("finite_difference", 2, None), ("exact", 4, None), ("exact", 2, Inside), ("exact", 2, eagerly_compiled)],
)
def test_replicas_are_equal_and_what_one_process_makes_of_the_joint_batches(hvp, size, wrap, tmp_path):
    first, *others = ranks.run(replica, size, tmp_path, size, hvp, wrap)
    assert all(same(first, other) for other in others)
    alone = trained(with_an_unused_parameter(), 0, 1, hvp)
    # Means of means against one mean: float32 sums in another order, some 1e-6 after six steps and two updates. (With Adam as
    # meta-optimizer more: the bias of attention's keys has no gradient but rounding, of which Adam makes whole steps.)
    torch.testing.assert_close(first, alone, rtol=1e-3, atol=1e-5)
    before, after = (report["lr_scale"] for report in first["reports"])
    assert not torch.equal(before, after)


def losses_in_float64(rank, size):
    model = perceptron(torch.float64)
    model = DistributedDataParallel(model) if size > 1 else model
    opt = MetaAdamW(model.parameters(), lr=1e-2)
    part = slice(BATCH // size * rank, BATCH // size * (rank + 1))
    batches = [[x.double()[part] for x in joint(i)] for i in range(4)]
    loss_fn(model, batches[0]).backward()
    opt.step()
    report = MetaLearner(opt, model, loss_fn).update(*batches[1:])
    return report.loss_decrease.detach(), report.generalization_gap.detach()


def test_a_mean_over_ranks_keeps_float64(tmp_path):
    alone = losses_in_float64(0, 1)
    for found in ranks.run(losses_in_float64, 2, tmp_path, 2):
        torch.testing.assert_close(found, alone, rtol=1e-11, atol=0.0)


def two_models(rank):
    """Each of the two on ranks of its own."""
    alone = [dist.new_group([r]) for r in range(2)][rank]
    model = nn.Sequential(DistributedDataParallel(nn.Linear(6, 6)), DistributedDataParallel(nn.Linear(6, 3), process_group=alone))
    opt = MetaAdamW(model[0].parameters())
    with pytest.raises(ValueError, match=r"different ranks.*\[0, 1\]"):
        MetaLearner(opt, model, loss_fn)
    MetaLearner(opt, nn.Sequential(model[0], DistributedDataParallel(nn.Linear(6, 3))), loss_fn)


def test_replicas_on_different_ranks_are_refused(tmp_path):
    ranks.run(two_models, 2, tmp_path)


def accumulating(rank, size):
    """Two micro-batches a step, of which DDP communicates after the second only."""
    model = DistributedDataParallel(perceptron())
    opt = MetaAdamW(model.named_parameters(), lr=1e-2, model=model, head_init="xavier", max_grad_norm=1.0)
    meta = MetaLearner(opt, model, loss_fn, lr=1.0, make_optimizer=torch.optim.SGD)
    parts = torch.arange(BATCH).view(size, 2, -1)[rank]
    for step in range(6):
        opt.zero_grad()
        with model.no_sync():
            (loss_fn(model, tuple(x[parts[0]] for x in joint(step))) / 2).backward()
            kept = [p.grad.clone() for p in model.parameters()]
            if step == 3:  # in the middle of an accumulation
                meta.update(*(MicroBatches(tuple(x[part] for x in joint(100 + i)) for part in parts) for i in range(3)))
                assert same(kept, [p.grad for p in model.parameters()])
        (loss_fn(model, tuple(x[parts[1]] for x in joint(step))) / 2).backward()
        opt.step()
    return {
        "params": [p.detach().clone() for p in model.parameters()],
        "lr_scale": opt.lr_scale,
        "log_vars": meta.log_vars.detach(),
    }


@pytest.mark.parametrize("size", [2, 4])
def test_gradient_accumulation_without_synchronisation(size, tmp_path):
    first, *others = ranks.run(accumulating, size, tmp_path, size)
    assert all(same(first, other) for other in others)
    torch.testing.assert_close(first, ranks.run(accumulating, 1, tmp_path, 1)[0], rtol=1e-3, atol=1e-5)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@every_with({}, {"skip_nonfinite": True}, MetaAdamW=[{"statistics": "lagged", "amsgrad": True}])
@pytest.mark.parametrize("steps", [0, 3])
def test_a_distributed_checkpoint_keeps_the_encoder(spec, options, steps, tmp_path):
    """In one process; get_optimizer_state_dict drops every key but `state` and `param_groups`."""

    def build(seed):
        model = perceptron(seed=seed)
        return model, spec.of_model(model, lr=1e-2, seed=seed, **options)

    def go(model, opt, first, last):
        for step in range(first, last):
            opt.zero_grad()
            loss_fn(model, joint(step)).backward()
            opt.step()
        tensors = [x for p in model.parameters() for x in (p, *(opt.state[p][name] for name in sorted(opt.state[p])))]
        tensors += [*opt.encoder.parameters(), opt.lr_scale, opt.features] if spec.encodes else []
        return [x.detach().clone() for x in tensors]

    model, opt = build(0)
    go(model, opt, 0, steps)
    dcp.save({"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, opt)}, checkpoint_id=tmp_path)
    other_model, other = build(1)
    found = {"model": other_model.state_dict(), "optimizer": get_optimizer_state_dict(other_model, other)}
    dcp.load(found, checkpoint_id=tmp_path)
    other_model.load_state_dict(found["model"])
    set_optimizer_state_dict(other_model, other, found["optimizer"])
    assert other.param_groups[0][spec.key] is None
    assert other.steps_done == steps
    assert same(go(model, opt, steps, 6), go(other_model, other, steps, 6))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_distributed_checkpoint_that_does_not_fit_leaves_the_encoder_alone(tmp_path):
    """DCP has loaded into the tensors of the state dict by the time that MetaAdamW refuses it."""
    model = perceptron()
    opts = [MetaAdamW(model.named_parameters(), model=model, head_init="xavier", encoder=EncoderConfig(layers=n)) for n in (3, 2)]
    metas = [MetaLearner(opt, model, loss_fn, lr=1e-2) for opt in opts]
    for i, (opt, meta) in enumerate(zip(opts, metas, strict=True)):
        for step in range(1 + i):
            loss_fn(model, joint(step)).backward()
            opt.step()
            meta.update(joint(10 + i), joint(20 + i), joint(30 + i))
    states = [
        {"optimizer": get_optimizer_state_dict(model, opt), "log_vars": x.state_dict()["log_vars"]}
        for opt, x in zip(opts, metas, strict=True)
    ]
    dcp.save(states[0], checkpoint_id=tmp_path)
    opt, state = opts[1], states[1]

    def everything():
        extra = {name: x for name, x in opt.state_dict()["metaadamw"].items() if name != "config"}
        return copy.deepcopy([extra, dict(opt.encoder.state_dict()), opt.lr_scale, opt.wd_scale, metas[1].log_vars.detach()])

    before = everything()
    dcp.load(state, checkpoint_id=tmp_path)
    with pytest.raises(ValueError, match="another encoder: layers is 3, here 2"):
        set_optimizer_state_dict(model, opt, state["optimizer"])
    assert not same(state["optimizer"]["param_groups"][0]["metaadamw"]["encoder"], before[1])
    assert not same(state["log_vars"], before[-1])
    assert same(everything(), before)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("into", ["MetaAdamW", "AdamW"])
def test_a_distributed_checkpoint_of_the_other_optimizer(into, tmp_path):
    """Their param groups have different keys, of which DCP by default wants every one."""
    model = perceptron()

    def build(name, seed):
        if name == "AdamW":
            return torch.optim.AdamW(model.parameters(), lr=3e-3)
        return MetaAdamW(model.named_parameters(), lr=3e-3, model=model, head_init="xavier", seed=seed)

    saved = build("AdamW" if into == "MetaAdamW" else "MetaAdamW", 0)
    for step in range(3):
        saved.zero_grad()
        loss_fn(model, joint(step)).backward()
        saved.step()
    saved.zero_grad()  # torch gives an AdamW its first states only where no gradient stands
    saved.param_groups[0]["lr"] = 2e-3
    dcp.save(get_optimizer_state_dict(model, saved), checkpoint_id=tmp_path)
    loaded = build(into, 1)
    encoder = copy.deepcopy(dict(loaded.encoder.state_dict())) if into == "MetaAdamW" else None
    state = get_optimizer_state_dict(model, loaded)
    with pytest.raises(CheckpointException, match="Missing key"):
        dcp.load(state, checkpoint_id=tmp_path)
    dcp.load(state, checkpoint_id=tmp_path, planner=DefaultLoadPlanner(allow_partial_load=True))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        set_optimizer_state_dict(model, loaded, state)
    assert loaded.param_groups[0]["lr"] == 2e-3
    for p in model.parameters():
        assert all(torch.equal(saved.state[p][name], loaded.state[p][name]) for name in ("step", "exp_avg", "exp_avg_sq"))
    told = [str(w.message) for w in caught if "checkpoint of a plain AdamW" in str(w.message)]
    if into == "MetaAdamW":
        assert len(told) == 1
        assert same(dict(loaded.encoder.state_dict()), encoder)
        assert loaded.steps_done == 3
    else:
        assert not told
    loss_fn(model, joint(9)).backward()
    loaded.step()


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_avgrad_goes_on_from_a_distributed_checkpoint_of_adamw(tmp_path):
    """DCP leaves what the checkpoint lacks as it was: a mean of zeros, which is none of these second moments."""
    model = perceptron()
    saved = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(3):
        saved.zero_grad()
        loss_fn(model, joint(step)).backward()
        saved.step()
    saved.zero_grad()
    dcp.save(get_optimizer_state_dict(model, saved), checkpoint_id=tmp_path)
    loaded = AVGRAD(model.named_parameters(), lr=1e-2)
    state = get_optimizer_state_dict(model, loaded)
    dcp.load(state, checkpoint_id=tmp_path, planner=DefaultLoadPlanner(allow_partial_load=True))
    set_optimizer_state_dict(model, loaded, state)
    assert loaded.steps_done == 3
    for p in model.parameters():
        assert all(torch.equal(saved.state[p][name], loaded.state[p][name]) for name in ("step", *MOMENTS))
        assert torch.equal(loaded.state[p]["average_sq"], loaded.state[p]["exp_avg_sq"])


def with_a_static_graph(rank, steps_first):
    model = DistributedDataParallel(perceptron(), static_graph=True)
    opt = MetaAdamW(model.named_parameters(), lr=1e-2, model=model, head_init="xavier")
    meta = MetaLearner(opt, model, loss_fn)

    def batch(seed):
        return tuple(x[8 * rank : 8 * rank + 8] for x in joint(seed))

    def step(seed):
        opt.zero_grad()
        loss_fn(model, batch(seed)).backward()
        opt.step()

    if not steps_first:
        opt.steps_done = 7  # as a checkpoint does, which brings no backward pass
        with pytest.raises(RuntimeError, match="a training step before the first meta-update"):
            meta.update(batch(1), batch(2), batch(3))
    for seed in range(steps_first):
        step(seed)
    if steps_first:
        meta.update(batch(1), batch(2), batch(3))
    for seed in range(3):
        step(20 + seed)
    return [p.detach().clone() for p in model.parameters()], meta.updates


@pytest.mark.parametrize("steps_first", [0, 1, 2])
def test_replicas_with_a_static_graph_stay_equal(steps_first, tmp_path):
    (params, updates), (others, _) = ranks.run(with_a_static_graph, 2, tmp_path / "ranks", steps_first)
    assert updates == (steps_first > 0)
    assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))
