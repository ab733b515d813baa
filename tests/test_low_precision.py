"""Low-precision parameters and states: state_dtype and float32 master weights."""

import contextlib
import copy

import pytest
import torch
from torch import nn

from .cases import same_bits
from .models import noise, one_thread  # noqa: F401
from .optimizers import every, every_with

HALVES = (torch.bfloat16, torch.float16)


def model(dtype):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3)).to(dtype)


def optimizer(spec, m, **options):
    return spec.of_model(m, lr=3e-3, **options)


def steps(m, opt, first, last, dtype):
    for step in range(first, last):
        for i, p in enumerate(m.parameters()):
            p.grad = noise(p.shape, 100 * step + i).to(dtype).to(p.dtype)
        opt.step()


def masters(m, opt):
    return [opt.state[p]["master_param"] for p in m.parameters()]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("backend", ["cpp", "reference"])
@every_with({}, MetaAdamW=[{"amsgrad": True, "max_grad_norm": 0.5}, {"statistics": "lagged"}], AVGrad=[{"max_grad_norm": 0.5}])
def test_masters_are_the_float32_run_and_parameters_its_rounding(dtype, backend, spec, options):
    low, wide = model(dtype), model(dtype).float()
    opt = optimizer(spec, low, master_weights=True, state_dtype=torch.float32, backend=backend, **options)
    exact = optimizer(spec, wide, backend=backend, **options)
    steps(low, opt, 0, 12, dtype)
    steps(wide, exact, 0, 12, dtype)
    for p, master, q in zip(low.parameters(), masters(low, opt), wide.parameters(), strict=True):
        assert same_bits(master, q)
        assert same_bits(p, q.to(dtype))
    assert same_bits(opt.statistics, exact.statistics)


@every
def test_wide_parameters_have_no_master(spec):
    m = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).bfloat16(), nn.Linear(2, 2).double())
    opt = optimizer(spec, m, master_weights=True)
    with_master = ["master_param" in opt.state[p] for p in m.parameters()]
    assert with_master == [False, False, True, True, False, False]


@every
def test_a_step_called_off_moves_neither(spec):
    m = model(torch.bfloat16)
    opt = optimizer(spec, m, master_weights=True)
    steps(m, opt, 0, 3, torch.bfloat16)
    before = [x.clone() for x in (*m.parameters(), *masters(m, opt))]
    opt.found_inf = torch.tensor(1.0)
    steps(m, opt, 3, 4, torch.bfloat16)
    assert all(same_bits(x, y) for x, y in zip(before, (*m.parameters(), *masters(m, opt)), strict=True))


def hidden(p, opt):
    p.data[0] = 0.125
    opt.invalidate_statistics()


@every
@pytest.mark.parametrize(
    "write",
    [
        lambda p, opt: p.detach()[0].fill_(0.125),
        lambda p, opt: setattr(p, "data", torch.cat([torch.full_like(p[:1], 0.125), p[1:]]).detach()),
        hidden,
    ],
    ids=["in place", "data", "hidden"],
)
def test_what_others_write_into_a_parameter_counts(write, spec):
    """The elements that were written start from there; the others keep the bits that their parameter does not have."""
    runs = []
    for touched in (False, True):
        m = model(torch.bfloat16)
        opt = optimizer(spec, m, master_weights=True)
        steps(m, opt, 0, 5, torch.bfloat16)
        p = m[0].weight
        low_bits = opt.state[p]["master_param"] - p
        assert low_bits.count_nonzero() > 20
        if touched:
            write(p, opt)
        for q in m.parameters():
            q.grad = torch.zeros_like(q)
        for s in opt.state.values():
            s["exp_avg"].zero_()
        opt.param_groups[0].update(lr=0.0, weight_decay=0.0)
        opt.step()
        runs.append(opt.state[p]["master_param"].clone())
    assert (runs[1][0] == 0.125).all()
    assert same_bits(runs[0][1:], runs[1][1:])


@every
@pytest.mark.parametrize("dtype", HALVES)
def test_a_checkpoint_resumes_with_all_bits(dtype, tmp_path, spec):
    whole = model(dtype)
    opt = optimizer(spec, whole, master_weights=True, state_dtype=torch.float32)
    steps(whole, opt, 0, 5, dtype)
    torch.save({"model": whole.state_dict(), "opt": opt.state_dict()}, tmp_path / "checkpoint")
    saved = torch.load(tmp_path / "checkpoint", weights_only=True)
    resumed = model(dtype)
    resumed.load_state_dict(saved["model"])
    again = optimizer(spec, resumed, master_weights=True, state_dtype=torch.float32)
    again.load_state_dict(saved["opt"])
    steps(whole, opt, 5, 9, dtype)
    steps(resumed, again, 5, 9, dtype)
    for x, y in zip(masters(whole, opt), masters(resumed, again), strict=True):
        assert x.dtype == torch.float32
        assert same_bits(x, y)
    without = optimizer(spec, resumed)
    without.load_state_dict(saved["opt"])
    assert not any("master_param" in state for state in without.state.values())
    steps(resumed, without, 9, 10, dtype)
    wrong = copy.deepcopy(saved["opt"])
    wrong["state"][0]["master_param"] = torch.zeros(2)
    with pytest.raises(ValueError, match="master_param of parameter 0 has shape"):
        again.load_state_dict(wrong)


@every
def test_a_checkpoint_of_torch_makes_masters_of_the_parameters(spec):
    m = model(torch.bfloat16)
    plain = torch.optim.AdamW(m.parameters())
    steps(m, plain, 0, 3, torch.bfloat16)
    opt = optimizer(spec, m, master_weights=True)
    with pytest.warns(UserWarning, match="plain AdamW") if spec.encodes else contextlib.nullcontext():
        opt.load_state_dict(plain.state_dict())
    assert all(same_bits(x, p.float()) for p, x in zip(m.parameters(), masters(m, opt), strict=True))


@every
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_state_dtype(state_dtype, spec):
    m = model(torch.bfloat16)
    opt = optimizer(spec, m, state_dtype=state_dtype, **({"amsgrad": True} if spec.encodes else {}))
    steps(m, opt, 0, 2, torch.bfloat16)
    for state in opt.state.values():
        wide = {rule.name for rule in opt.rule.states if rule.wide}
        assert all(state[name].dtype == state_dtype for name in {*opt.rule.names} - wide - {*spec.raw})
        assert all(state[name].dtype == torch.bfloat16 for name in spec.raw)
        assert all(state[name].dtype == torch.promote_types(state_dtype, torch.float32) for name in wide)
        assert state["step"].dtype == torch.float32


@every
@pytest.mark.parametrize("wrong", [torch.int32, "bfloat16", torch.complex64])
def test_a_state_dtype_that_cannot_be(wrong, spec):
    with pytest.raises(ValueError, match="Invalid state_dtype"):
        spec.kind([torch.zeros(2, requires_grad=True)], state_dtype=wrong)
