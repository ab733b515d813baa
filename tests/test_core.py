"""The core without MetaAdamW: an optimizer that decides nothing is AdamW, and rules with other states need no other core."""

import copy
import pickle

import pytest
import torch
from torch import nn

from metaadamw_fast import features
from metaadamw_fast.checks import HYPERPARAMETERS
from metaadamw_fast.core.allocation import Allocation
from metaadamw_fast.core.optimizer import FusedOptimizer
from metaadamw_fast.core.rule import PARAM, Decision, Rule, State, of_multiplied_gradient
from metaadamw_fast.core.states import States
from metaadamw_fast.launch import FakeLaunch
from metaadamw_fast.optimizer import ADAMW, ADAMW_COUNTING


class Plain(FusedOptimizer):
    """AdamW. It counts its decisions, to have something to save."""

    rule = ADAMW
    checkpoint_key = "plain"

    def __init__(self, params, lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2, amsgrad=False, lagged=False, **options):
        numbers = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "amsgrad": amsgrad}
        self.lagged, self.decisions, self.fused = lagged, 0, 0
        super().__init__(params, {**numbers, "maximize": False, "capturable": False}, **options)
        self._cache()

    def needs_sums(self):
        return not self.lagged

    def decide(self, sums, step):
        self.decisions += 1
        self.fused += sums is None
        hyper, counts = step.hyper, step.counts[:-1] + 1
        if step.counted is not None:
            counts = counts * step.counted
        decay = 1 - hyper.lr * hyper.weight_decay
        vectors = self._backend.update_vectors(hyper.lr, decay, counts, hyper.beta1, hyper.beta2, hyper.eps, step.grad_factor)
        return Decision(vectors, {})

    def saved(self):
        return {"decisions": self.decisions}

    def check_saved(self, extra, state_dict):
        if type(extra.get("decisions")) is not int:
            raise ValueError("no number of decisions")

    def restore(self, extra, state_dict):
        self.decisions = 0 if extra is None else extra["decisions"]


def model_of(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))


def train(model, opt, steps, first=0):
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(step)
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator)
        opt.step()


@pytest.mark.parametrize("lagged", [False, True])
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_an_optimizer_that_decides_nothing_is_adamw(backend, amsgrad, lagged):
    ours, theirs = model_of(), model_of()
    opt = Plain(ours.parameters(), amsgrad=amsgrad, lagged=lagged, backend=backend)
    train(ours, opt, 8)
    train(theirs, torch.optim.AdamW(theirs.parameters(), lr=1e-2, amsgrad=amsgrad), 8)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    assert opt.fused == (8 if lagged else 0)
    assert opt.steps_done == 8


def test_its_checkpoint_has_its_own_key_and_goes_on():
    model = model_of()
    opt = Plain(model.parameters(), max_grad_norm=1.0)
    train(model, opt, 3)
    saved = copy.deepcopy((model.state_dict(), opt.state_dict()))
    assert saved[1]["plain"]["decisions"] == 3
    assert saved[1]["param_groups"][0]["plain"] is not None
    other = model_of(1)
    loaded = Plain(other.parameters(), max_grad_norm=1.0)
    other.load_state_dict(saved[0])
    loaded.load_state_dict(saved[1])
    assert loaded.decisions == 3
    for m, o in ((model, opt), (other, loaded)):
        train(m, o, 2, first=3)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))
    saved[1]["plain"]["decisions"] = None
    with pytest.raises(ValueError, match="no number"):
        loaded.load_state_dict(saved[1])
    torch.optim.AdamW(other.parameters()).load_state_dict(opt.state_dict())


def test_it_joins_copies_and_leaves():
    model = model_of()
    opt = Plain(model[0].parameters())
    train(model, opt, 2)
    opt.add_param_group({"params": model[1].parameters()})
    assert opt.statistics.shape == (4, 5)
    assert opt.statistics[:2].all()
    assert not opt.statistics[2:].any()
    copied_model, copied = copy.deepcopy((model, opt))
    again_model, again = pickle.loads(pickle.dumps((model, opt)))
    for m, o in ((model, opt), (copied_model, copied), (again_model, again)):
        train(m, o, 1, first=2)
    for p, q, r in zip(model.parameters(), copied_model.parameters(), again_model.parameters(), strict=True):
        assert torch.equal(p, q)
        assert torch.equal(p, r)
    opt.release()
    train(model, opt, 1)
    assert opt.steps_done == 4


def test_an_optimizer_must_decide():
    with pytest.raises(TypeError, match="decide"):
        FusedOptimizer([nn.Parameter(torch.ones(3))], {})


AVGRAD = ADAMW._replace(name="avgrad", states=(State("exp_avg"), State("exp_avg_sq"), State("average_sq", wide=True)))


def allocated(rule, p, **flags):
    state = {}
    members = [FusedOptimizer._describe(type("Optimizer", (), {"param_groups": [{"params": [p]}]})())[0]]
    groups = [{"params": [p], **flags}]
    counts = torch.zeros(2, dtype=torch.float64)
    states = States(rule, members, [None], state, groups, torch.device("cpu"), FakeLaunch, counts, state_dtype=None)
    return state[p], states


@pytest.mark.parametrize(
    ("dtype", "wide"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
        (torch.complex64, torch.complex64),
    ],
)
def test_a_wide_state_is_at_least_float32(dtype, wide):
    state, states = allocated(AVGRAD, nn.Parameter(torch.ones(3, dtype=dtype)))
    assert list(state) == ["exp_avg", "exp_avg_sq", "average_sq", "step"]
    assert [state[name].dtype for name in AVGRAD.names] == [dtype, dtype, wide]
    assert [len(xs) for xs in states.held.by_name().values()] == [1, 1, 1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64, torch.complex64])
def test_a_state_of_the_parameter_starts_as_it(dtype):
    """A copy in at least float32, whatever ``state_dtype`` is; a checkpoint may lack it."""
    rule = AVGRAD._replace(
        states=(State("exp_avg"), State("average", wide=True, of_param=True)), operands=("exp_avg", PARAM, "average")
    )
    p = nn.Parameter(torch.arange(3).to(dtype))
    found = {}
    Allocation(found, torch.device("cpu"), torch.bfloat16, master_weights=False).complete(p, rule.states)
    average = found[p]["average"]
    assert average.dtype == torch.promote_types(dtype, torch.float32)
    assert torch.equal(average, p.to(average.dtype))
    assert average.data_ptr() != p.data_ptr()
    assert rule.always == ("exp_avg",)


def test_a_state_of_the_parameter_starts_as_its_master():
    p = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    found = {p: {"master_param": torch.full((3,), 1.001)}}
    Allocation(found, torch.device("cpu"), None, master_weights=True).complete(p, [State("average", wide=True, of_param=True)])
    assert torch.equal(found[p]["average"], torch.full((3,), 1.001))


def test_a_state_that_a_flag_asks_for():
    for asked in (True, False):
        state, states = allocated(ADAMW, nn.Parameter(torch.ones(3)), amsgrad=asked)
        assert ("max_exp_avg_sq" in state) == asked
        assert (states.held.by_name()["max_exp_avg_sq"] is not None) == asked


def test_seven_states_are_allocated_and_taken_back():
    names = ("exp_avg", "exp_avg_sq", "average_sq", "exp_avg_diff", "lion_exp_avg", "last_grad", "previous_grad")
    operands = ("exp_avg", PARAM, *names[1:-2], *names[-2:])
    rule = Rule("mada", tuple(map(State, names)), operands, (), {"grad_sq": 2}, {})
    p = nn.Parameter(torch.ones(3))
    state, states = allocated(rule, p)
    assert list(state) == [*names, "step"]
    assert states.carried() is None
    found = {}
    allocation = Allocation(found, torch.device("cpu"), None, master_weights=False)
    allocation.complete(p, rule.states)
    assert list(found[p]) == [*names, "step"]
    allocation.undo()
    assert found == {}


def test_the_rule_of_adamw_is_what_the_ops_and_features_take():
    assert ADAMW.vectors == HYPERPARAMETERS
    columns = ("GRAD_SQUARED", "GRAD_MOMENTUM", "MOMENTUM_SQUARED", "PARAM_SQUARED", "SECOND_MOMENT_SQUARED")
    columns += ("GRAD_NONZERO", "MOMENTUM_NONZERO")
    assert [getattr(features, name) for name in columns] == [*range(len(ADAMW_COUNTING.sums))]


def test_sums_of_a_multiplied_gradient():
    sums = torch.tensor([[4.0, 3.0, 2.0, 5.0], [float("inf"), 3.0, 2.0, 5.0], [float("inf"), float("inf"), 2.0, 5.0]])
    factor = torch.tensor([3.0, 0.0, 0.0], dtype=torch.float64)
    found = of_multiplied_gradient(sums, factor, (2, 1, 0, 1))
    assert found[0].tolist() == [36.0, 9.0, 2.0, 15.0]
    assert found[1].tolist() == [0.0, 0.0, 2.0, 0.0]
    assert found[2, :2].isnan().all()
    assert of_multiplied_gradient(sums, None, (2, 1, 0, 1)) is sums
