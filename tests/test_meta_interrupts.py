"""Ctrl-C in a meta-update: the model is as before, whichever line of ours the interrupt comes at."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

import metaadamw_fast
from metaadamw_fast import MetaLearner
from metaadamw_fast.parallel import _unreduced, reshard

from . import ranks
from .models import batch, make, mse, noise, one_thread, train  # noqa: F401
from .test_meta_state import everything, same

OURS = str(Path(metaadamw_fast.__file__).parent)


class Interrupt(BaseException):
    """As KeyboardInterrupt, which pytest would take for the user's."""


class Interrupter:
    """Raises at the ``at``-th line of ours that runs in the block. Takes down which lines ran, and which of them in exits."""

    def __init__(self, at=None):
        self.at, self.lines, self.in_exits, self.depth = at, [], [], 0

    def __enter__(self):
        self.outer = sys.gettrace()
        sys.settrace(self.trace)
        return self

    def __exit__(self, *_):
        sys.settrace(self.outer)

    def trace(self, frame, event, argument):
        if not frame.f_code.co_filename.startswith(OURS):
            return None
        if frame.f_code.co_name == "__exit__" and event in ("call", "return"):
            self.depth += 1 if event == "call" else -1
        if event == "line":
            if self.depth:
                self.in_exits.append(len(self.lines))
            self.lines.append(f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}")
            if len(self.lines) - 1 == self.at:
                sys.settrace(None)
                raise Interrupt
        return self.trace

    def places(self):
        """Every line of an exit, where it runs for the first and the last time, and some of all other lines."""
        times = {}
        for place in self.in_exits:
            times.setdefault(self.lines[place], []).append(place)
        assert len(times) > 20
        return sorted({place for ran in times.values() for place in (ran[0], ran[-1])} | set(range(0, len(self.lines), 97)))


class Net(nn.Module):
    """Buffers, dropout, a recurrent layer, an attribute that is derived from parameters, a frozen parameter, a hook."""

    shape = (4, 3, 6)

    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(6, 4, batch_first=True)
        self.norm, self.drop = nn.BatchNorm1d(4), nn.Dropout(0.5)
        self.out = nn.utils.weight_norm(nn.Linear(4, 3))
        self.out.bias.requires_grad_(False)
        self.calls = []

    def forward(self, x):
        self.calls.append(len(x))
        return self.out(self.drop(self.norm(self.rnn(x)[0][:, -1])))


def attributes(model):
    """What plain attributes hold, and the hooks."""
    plain = [(name, id(x)) for m in model.modules() for name, x in vars(m).items()]
    return plain, model.out.weight.clone(), list(model.calls), [dict(p._backward_hooks or {}) for p in model.parameters()]


def interrupted_everywhere(meta, batches, snapshot):
    """Models that are left as they were can be used again: one is enough."""
    meta.update(*batches)  # the first one looks for second derivatives
    before = snapshot()
    with Interrupter() as calm:
        meta.update(*batches)
    assert same(snapshot(), before)
    for place in calm.places():
        with pytest.raises(Interrupt), torch.set_grad_enabled(place % 2 == 0), Interrupter(place):
            meta.update(*batches)
        assert same(snapshot(), before), calm.lines[place]


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("hvp", ["exact", "finite_difference"])
def test_an_interrupt_at_any_line_leaves_the_model_as_it_was(hvp):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Net()
    model.norm.weight.register_hook(lambda gradient: None)
    opt = make(model)
    train(model, opt, 2)
    meta = MetaLearner(opt, model, mse, objective="gradient", hvp=hvp)
    torch.backends.cuda.enable_flash_sdp(False)
    try:
        interrupted_everywhere(meta, [batch(model, 50), batch(model, 51)], lambda: [everything(model, opt), attributes(model)])
    finally:
        torch.backends.cuda.enable_flash_sdp(True)


def sharded(_):
    """Amid a gradient accumulation, with a gradient that FSDP2 has not reduced."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3))
    fully_shard(model[0])
    fully_shard(model)
    opt = make(model)
    batches = [(noise((4, 6), i), noise((4, 3), 10 + i)) for i in range(4)]
    mse(model, batches[0]).backward()
    opt.step()
    model.set_requires_gradient_sync(False)
    mse(model, batches[1]).backward()

    def snapshot():
        reshard(model)
        parts = [p.to_local().detach().clone() for p in model.parameters()] + [p.grad.to_local() for p in model.parameters()]
        places = [getattr(owner, name) for owner, name, _ in _unreduced([model[0], model])]
        assert sum(isinstance(x, torch.Tensor) for x in places) == 4  # each parameter has a gradient that is not reduced
        return parts, [x.clone() if isinstance(x, torch.Tensor) else x for x in places], torch.get_rng_state()

    meta = MetaLearner(opt, model, mse, objective="gradient")
    interrupted_everywhere(meta, batches[2:], snapshot)


@ranks.needs_gloo
def test_an_interrupt_at_any_line_leaves_a_sharded_model_as_it_was(tmp_path):
    ranks.run(sharded, 1, tmp_path)
