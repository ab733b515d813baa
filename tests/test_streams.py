"""Steps on several streams: torch's allocator must know every stream that uses what the optimizer keeps from step to step."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from metaadamw_fast import MetaAdamW
from metaadamw_fast.core import devices

OPTIONS = {
    "plain": {},
    "lagged": {"statistics": "lagged"},
    "clipping, maximize": {"max_grad_norm": 0.5, "maximize": True},
    "skip_nonfinite, enhanced": {"skip_nonfinite": True, "features": "enhanced"},
}


class Inputs(TorchDispatchMode):
    """The tensors that operations take."""

    def __init__(self):
        super().__init__()
        self.tensors = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.tensors += [x for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        return op(*args, **(kwargs or {}))


def storage_of(x):
    return x.untyped_storage().data_ptr()


def storages_reached(root):
    """Of every tensor that can be reached from ``root`` through containers and objects of this library."""
    seen, stack, found = set(), [root], {}
    while stack:
        x = stack.pop()
        if id(x) in seen:
            continue
        seen.add(id(x))
        if isinstance(x, torch.Tensor):
            found[storage_of(x)] = x
        elif isinstance(x, dict):
            stack += [*x.keys(), *x.values()]
        elif isinstance(x, (list, tuple, set)):
            stack += x
        elif type(x).__module__.startswith("metaadamw_fast"):
            stack += vars(x).values()
    return found


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_every_kept_tensor_is_named_to_the_allocator(monkeypatch, backend, options):
    """On the CPU, with streams that only have a name: what a step reads and has not made is recorded, but for the user's own."""
    stream, recorded = "first", []
    monkeypatch.setattr(devices, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda x, s: recorded.append((storage_of(x), s)))
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    opt = MetaAdamW(model.named_parameters(), backend=backend, head_init="xavier", **OPTIONS[options])

    def step():
        for i, p in enumerate(model.parameters()):
            p.grad = None if i == 2 else torch.ones_like(p)
        opt.step()

    step()
    step()
    stream = "second"
    kept = storages_reached(opt)
    with Inputs() as inputs:
        step()
    users = [y for p in model.parameters() for y in (p, p.grad, *(x for name, x in opt.state[p].items() if name != "step"))]
    users += [*opt.encoder.parameters(), *opt.encoder.buffers(), torch.empty(0)]  # the last: what has no memory
    if backend == "cpp":
        users.append(opt._states.launch._table)  # on the host
    used = {storage_of(x) for x in inputs.tensors} & kept.keys() - {storage_of(x) for x in users if x is not None}
    assert len(used) >= 5, "a step that uses nothing of the optimizer's own shows nothing"
    missing = used - {address for address, name in recorded if name == "second"}
    assert not missing, [(kept[x].shape, kept[x].dtype) for x in missing]
    before = len(recorded)
    step()
    assert len(recorded) == before, "recorded again on the same stream"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("backend", ["cpp", "triton"])
def test_a_table_replaced_while_another_stream_reads_it(backend):
    """The first stream's table is freed while the second still waits to read it; what takes its memory is written at once."""
    models = [nn.Linear(64, 64, bias=False, device="cuda") for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    gradient = torch.randn(64, 64, device="cuda")
    opts = [MetaAdamW(m.named_parameters(), lr=0.1, backend=backend) for m in models]
    gradients = (gradient.clone(), gradient.clone(), gradient.t())  # the last in another layout: a new table

    def step(i, g):
        models[i].weight.grad = g
        opts[i].step()

    for g in gradients:
        step(1, g)
    step(0, gradients[0])
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(200_000_000)
        for g in gradients[1:]:
            step(0, g)
    for _ in range(100):  # on the first stream, whose pool the table came from
        torch.full((1 << 12,), -1, dtype=torch.int64, device="cuda")
    torch.cuda.synchronize()
    assert torch.equal(models[0].weight, models[1].weight)
