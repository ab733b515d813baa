"""A MetaLearner on what trainers wrap around an optimizer."""

import pytest
import torch
from torch import nn

from metaadamw_fast import MetaAdamW, MetaLearner

from .models import batch, make, mse, one_thread, perceptron, same  # noqa: F401


class Lightning:
    """As Lightning's wrapper: an instance of the optimizer's class without its attributes, which it shows as its own."""

    def __init__(self, optimizer):
        self._optimizer = optimizer
        self.__class__ = type("Lightning" + type(optimizer).__name__, (Lightning, type(optimizer)), {})

    @property
    def optimizer(self):
        return self._optimizer

    def step(self, closure=None):
        return self._optimizer.step(closure)

    def __getattr__(self, name):
        return getattr(self._optimizer, name)


class Copied(Lightning):
    """As older wrappers of Lightning: with the attributes of the optimizer as they were when it was wrapped."""

    def __init__(self, optimizer):
        self.__dict__ = {name: x for name, x in vars(optimizer).items() if name != "step"}
        self._optimizer = optimizer
        self.__class__ = type("Copied" + type(optimizer).__name__, (Copied, type(optimizer)), {})


class Accelerate(torch.optim.Optimizer):
    """As Accelerate's: another optimizer, which calls the one that it wraps."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    @property
    def param_groups(self):
        return self.optimizer.param_groups

    def zero_grad(self, set_to_none=True):
        self.optimizer.zero_grad(set_to_none)

    def step(self, closure=None):
        return self.optimizer.step(closure)


WRAPPERS = {
    "none": lambda opt: opt,
    "Lightning": Lightning,
    "older Lightning": Copied,
    "Accelerate": Accelerate,
    "Lightning in Accelerate": lambda opt: Accelerate(Lightning(opt)),
    "Accelerate in Lightning": lambda opt: Lightning(Accelerate(opt)),
}


def trained(wrap):
    """Six steps with three meta-updates, the data of all parameters replaced once; the model, the encoder and the reports."""
    model = perceptron()
    opt = make(model, total_steps=10)
    wrapper = wrap(opt)
    meta = MetaLearner(wrapper, model, mse, gap_at="lookahead", lr=1e-2)
    assert meta.optimizer is opt
    own = set(vars(wrapper))
    after_step = meta.every(2, [batch(model, 50 + i) for i in range(3)], [batch(model, 60)])
    reports = []
    for step in range(6):
        wrapper.zero_grad()
        mse(model, batch(model, step)).backward()
        wrapper.step()
        if step == 2:
            for p in model.parameters():
                p.data = p.data.clone()
        report = after_step()
        reports += [] if report is None else [vars(report)]
    assert wrapper is opt or set(vars(wrapper)) <= own
    assert opt.steps_done == 6
    assert len(reports) == meta.updates == 3
    return [p.detach() for p in model.parameters()], dict(opt.encoder.state_dict()), reports


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_wrapper_changes_nothing(name):
    assert same(trained(WRAPPERS[name]), trained(WRAPPERS["none"]))


def test_what_wraps_no_meta_adamw():
    model = nn.Linear(3, 2)
    other = torch.optim.AdamW(model.parameters())
    for wrapper in (other, Lightning(other), Accelerate(Lightning(other)), None):
        with pytest.raises(TypeError, match="the encoder of a MetaAdamW, got "):
            MetaLearner(wrapper, model, mse)


def test_a_wrapper_that_hides_the_optimizer_is_refused():
    """It passes for a MetaAdamW, but what is written to it does not reach the one that it wraps."""
    model = nn.Linear(3, 2)

    class Hiding(MetaAdamW):
        def __init__(self, optimizer):
            self.wrapped = optimizer

        def __getattr__(self, name):
            return getattr(self.__dict__["wrapped"], name)

    with pytest.raises(TypeError, match="got Hiding"):
        MetaLearner(Hiding(MetaAdamW(model.parameters())), model, mse)


def test_an_attribute_that_happens_to_be_called_optimizer():
    model = nn.Linear(3, 2)
    opt = MetaAdamW(model.parameters())
    opt.optimizer = torch.optim.SGD(model.parameters())
    assert MetaLearner(opt, model, mse).optimizer is opt
