"""Data parallel training on two processes: replicas stay equal, a meta-update is that of the joint batch. Checkpoints by DCP."""

import os
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.nn import functional as F  # noqa: N812
from torch.nn.parallel import DistributedDataParallel

from metaadamw_fast import MetaAdamW, MetaLearner

from .models import noise, perceptron, same

RANKS = 2
pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="there is no gloo")


def loss_fn(model, data):
    return F.mse_loss(model(data[0]), data[1])


def joint(seed):
    return noise((8 * RANKS, 6), 2 * seed), noise((8 * RANKS, 3), 2 * seed + 1)


def trained(model, rank, ranks, hvp):
    """Six steps with two meta-updates; every rank has its part of each batch."""
    opt = MetaAdamW(model.named_parameters(), lr=1e-2, model=model, head_init="xavier", max_grad_norm=1.0)
    meta = MetaLearner(opt, model, loss_fn, hvp=hvp, gap_at="lookahead", lr=1.0, make_optimizer=torch.optim.SGD)
    part = slice(8 * RANKS // ranks * rank, 8 * RANKS // ranks * (rank + 1))
    reports = []
    for step in range(6):
        opt.zero_grad()
        loss_fn(model, tuple(x[part] for x in joint(step))).backward()
        opt.step()
        if step % 3 == 2:
            report = meta.update(*(tuple(x[part] for x in joint(100 + 10 * step + i)) for i in range(3)))
            reports.append({name: x.detach().clone() for name, x in vars(report).items()})
    return {
        "params": [p.detach().clone() for p in model.parameters()],
        "encoder": [p.detach().clone() for p in opt.encoder.parameters()],
        "log_vars": meta.log_vars.detach().clone(),
        "reports": reports,
    }


def with_an_unused_parameter():
    model = perceptron()
    model.unused = nn.Parameter(torch.ones(3))
    return model


def work(rank, hvp, directory):
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # the name of this machine may lead nowhere
    store = f"file://{directory}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=RANKS, timeout=timedelta(seconds=60))
    try:
        model = DistributedDataParallel(with_an_unused_parameter(), find_unused_parameters=True)
        torch.save(trained(model, rank, RANKS, hvp), f"{directory}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("hvp", ["exact", "finite_difference"])
def test_replicas_are_equal_and_what_one_process_makes_of_the_joint_batches(hvp, tmp_path):
    mp.spawn(work, (hvp, str(tmp_path)), nprocs=RANKS)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(RANKS))
    assert same(first, second)
    alone = trained(with_an_unused_parameter(), 0, 1, hvp)
    # Means of means against one mean: float32 sums in another order, some 1e-6 after six steps and two updates. (With Adam as
    # meta-optimizer more: the bias of attention's keys has no gradient but rounding, of which Adam makes whole steps.)
    torch.testing.assert_close(first, alone, rtol=1e-3, atol=1e-5)
    before, after = (report["lr_scale"] for report in first["reports"])
    assert not torch.equal(before, after)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("options", [{}, {"statistics": "lagged", "amsgrad": True}, {"skip_nonfinite": True}], ids=str)
@pytest.mark.parametrize("steps", [0, 3])
def test_a_distributed_checkpoint_keeps_the_encoder(options, steps, tmp_path):
    """In one process; get_optimizer_state_dict drops every key but `state` and `param_groups`."""

    def build(seed):
        model = perceptron(seed=seed)
        return model, MetaAdamW(model.named_parameters(), lr=1e-2, model=model, head_init="xavier", seed=seed, **options)

    def go(model, opt, first, last):
        for step in range(first, last):
            opt.zero_grad()
            loss_fn(model, joint(step)).backward()
            opt.step()
        tensors = [x for p in model.parameters() for x in (p, *(opt.state[p][name] for name in sorted(opt.state[p])))]
        return [x.detach().clone() for x in (*tensors, *opt.encoder.parameters(), opt.lr_scale, opt.features)]

    model, opt = build(0)
    go(model, opt, 0, steps)
    dcp.save({"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, opt)}, checkpoint_id=tmp_path)
    other_model, other = build(1)
    found = {"model": other_model.state_dict(), "optimizer": get_optimizer_state_dict(other_model, other)}
    dcp.load(found, checkpoint_id=tmp_path)
    other_model.load_state_dict(found["model"])
    set_optimizer_state_dict(other_model, other, found["optimizer"])
    assert other.param_groups[0]["metaadamw"] is None
    assert other.steps_done == steps
    assert same(go(model, opt, steps, 6), go(other_model, other, steps, 6))
