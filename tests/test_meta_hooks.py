"""Backward hooks of the user in a meta-update: they see no gradient of a look-ahead, whichever way the gradients take."""

import pytest
import torch
from torch import nn
from torch.autograd.graph import get_gradient_edge, register_multi_grad_hook
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import _apply_optimizer_in_backward
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from metaadamw_fast import MetaAdamW, MetaLearner

from . import ranks
from .models import batch, make, mse, noise, one_thread, relative, seeded, train  # noqa: F401
from .test_meta_state import everything, same

pytestmark = pytest.mark.filterwarnings("ignore:the model has no exact second derivative", "ignore:None of the inputs have")


class Checkpointed(nn.Module):
    shape = (8, 6)

    def __init__(self, reentrant=True):
        super().__init__()
        self.first, self.middle, self.out, self.reentrant = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3), reentrant

    def forward(self, x):
        x = torch.tanh(self.first(x))
        return self.out(torch.tanh(checkpoint(self.middle, x, use_reentrant=self.reentrant)))


checkpointed = seeded(Checkpointed)


def post_node(model, p, hook):
    node = get_gradient_edge(p).node
    return node, node.register_hook(hook)  # torch forgets hooks of a node that nobody holds


def pre_node(model, p, hook):
    node = get_gradient_edge(p).node
    return node, node.register_prehook(hook)


HOOKS = {
    "tensor": lambda model, p, hook: (p, p.register_hook(hook)),
    "post accumulate": lambda model, p, hook: (p, p.register_post_accumulate_grad_hook(hook)),
    "node": post_node,
    "node, before": pre_node,
    "several": lambda model, p, hook: (p, register_multi_grad_hook(list(model.parameters()), hook)),
    "any of several": lambda model, p, hook: (p, register_multi_grad_hook(list(model.parameters()), hook, mode="any")),
    "module": lambda model, p, hook: (p, model.middle.register_full_backward_hook(hook)),
    "module, before": lambda model, p, hook: (p, model.middle.register_full_backward_pre_hook(hook)),
}


@pytest.mark.parametrize("hvp", ["auto", "finite_difference"])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("where", ["first", "middle"])
@pytest.mark.parametrize("kind", HOOKS)
def test_hooks_do_not_run_in_a_meta_update(kind, where, reentrant, hvp):
    model = checkpointed(reentrant=reentrant)
    opt = make(model)
    train(model, opt, 2)
    calls = []

    def hook(*_):
        calls.append(kind)

    kept, handle = HOOKS[kind](model, getattr(model, where).weight, hook)
    meta = MetaLearner(opt, model, mse, hvp=hvp)
    before = everything(model, opt)
    for _ in range(2):
        meta.update(*(batch(model, 50 + i) for i in range(3)))
    assert not calls
    assert same(everything(model, opt), before)
    mse(model, batch(model, 3)).backward()
    assert calls  # in training they run as ever
    handle.remove()
    calls.clear()
    mse(model, batch(model, 3)).backward()
    assert not calls
    del kept


def optimizer_in_hook(p, optimizer):
    def step(_):
        optimizer.step()
        optimizer.zero_grad()

    return p.register_post_accumulate_grad_hook(step)


@pytest.mark.parametrize("raises", [False, True])
@pytest.mark.parametrize("registered", ["by hand", "by torch"])
def test_an_optimizer_in_the_backward_pass_rests(registered, raises):
    """It trains what is not the MetaAdamW's, in training steps only, also after a meta-update that failed."""
    model = checkpointed()
    inner = model.first.weight
    if registered == "by torch":
        _apply_optimizer_in_backward(torch.optim.SGD, [inner], {"lr": 0.1})
    else:
        optimizer_in_hook(inner, torch.optim.SGD([inner], lr=0.1))
    opt = MetaAdamW([p for p in model.parameters() if p is not inner], lr=1e-2, head_init="xavier")
    train(model, opt, 2)
    calls = []

    def loss_fn(model, data):
        calls.append(None)
        if raises and len(calls) == 4:
            raise ValueError("as it happens")
        return mse(model, data)

    before = everything(model, opt)
    try:
        MetaLearner(opt, model, loss_fn).update(*(batch(model, 50 + i) for i in range(3)))
        assert not raises
    except ValueError:
        assert raises
    assert same(everything(model, opt), before)
    mse(model, batch(model, 3)).backward()
    assert not torch.equal(inner, before[0][0][1])
    assert inner.grad is None


def test_another_model_that_the_loss_goes_through():
    """A head with an optimizer of its own: reentrant checkpointing hands it gradients, too."""
    model, head = checkpointed(), nn.Linear(3, 1)
    opt = make(model)
    calls = []
    head.weight.register_post_accumulate_grad_hook(lambda p: calls.append(p))
    loss_fn = lambda m, data: head(m(data[0])).square().mean()  # noqa: E731
    loss_fn(model, batch(model, 0)).backward()
    before = [(p.grad, p.grad.clone()) for p in head.parameters()]
    calls.clear()
    MetaLearner(opt, model, loss_fn, hvp="finite_difference").update(*(batch(model, 50 + i) for i in range(3)))
    assert not calls
    for p, (grad, value) in zip(head.parameters(), before, strict=True):
        assert p.grad is grad
        assert torch.equal(grad, value)


def test_hooks_that_change_gradients_change_no_meta_update():
    """A meta-update differentiates the loss function itself: a hook would enter derivatives at the look-ahead a second time."""
    reports = []
    for factor in (1.0, 3.0):
        model = checkpointed(reentrant=False)
        opt = make(model)
        train(model, opt, 2)
        model.middle.weight.register_hook(lambda gradient, factor=factor: factor * gradient)
        reports.append(vars(MetaLearner(opt, model, mse).update(*(batch(model, 50 + i) for i in range(3)))))
    assert same(*reports)


# ------------------------------------------------------------------------------------------------------------ several ranks


def local_batch(rank, seed):
    return noise((4, 6), 10 * seed + rank), noise((4, 3), 100 + 10 * seed + rank)


def sharded(rank):
    """FSDP2 hands its gradients to `.grad`, and calls the hooks of its shards itself."""
    model = checkpointed()
    for part in (model.first, model.middle, model):
        fully_shard(part)
    opt = MetaAdamW(model.named_parameters(), lr=1e-2, head_init="xavier", model=model)
    mse(model, local_batch(rank, 0)).backward()
    opt.step()
    calls = []
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(calls.append)
    model.middle.register_full_backward_hook(lambda *_: calls.append(None))
    MetaLearner(opt, model, mse).update(*(local_batch(rank, i) for i in range(1, 4)))
    assert not calls
    mse(model, local_batch(rank, 5)).backward()
    assert len(calls) == 7


@ranks.needs_gloo
def test_fsdp_runs_no_hook_in_a_meta_update(tmp_path):
    ranks.run(sharded, 2, tmp_path)


def replicated(rank, reentrant):
    """A communication hook, as gradient compression is one, and gradients that are views of DDP's buckets."""
    model = DistributedDataParallel(checkpointed(reentrant=reentrant), gradient_as_bucket_view=True)
    calls = []

    def compress(_, bucket):
        calls.append(bucket.index())
        return allreduce_hook(None, bucket)

    model.register_comm_hook(None, compress)
    opt = MetaAdamW(model.named_parameters(), lr=1e-2, head_init="xavier", model=model)
    for step in range(2):
        opt.zero_grad()
        mse(model, local_batch(rank, step)).backward()
        opt.step()
    before, called = [(p.grad, p.grad.clone()) for p in model.parameters()], len(calls)
    flags = model.require_backward_grad_sync, model.require_forward_param_sync
    report = MetaLearner(opt, model, mse, hvp="finite_difference").update(*(local_batch(rank, i) for i in range(2, 5)))
    assert len(calls) == called > 0
    assert flags == (model.require_backward_grad_sync, model.require_forward_param_sync)
    for p, (grad, value) in zip(model.parameters(), before, strict=True):
        assert p.grad is grad
        assert torch.equal(grad, value)
    opt.zero_grad()
    mse(model, local_batch(rank, 6)).backward()
    assert len(calls) > called
    opt.step()
    return [p.detach() for p in model.parameters()], vars(report)


@ranks.needs_gloo
def test_replicas_compress_no_gradient_of_a_meta_update(tmp_path):
    first, second = ranks.run(replicated, 2, tmp_path, True)
    assert same(first, second)
    expected, _ = ranks.run(replicated, 2, tmp_path, False)
    assert all(relative(x, y) < 1e-5 for x, y in zip(first[0], expected[0], strict=True))
    assert relative(first[1]["total"], expected[1]["total"]) < 1e-5
