"""Low-precision parameters and states: state_dtype and float32 master weights."""

import copy

import pytest
import torch
from torch import nn

from metaadamw_fast import MetaAdamW

from .cases import same_bits
from .models import noise, one_thread  # noqa: F401

HALVES = (torch.bfloat16, torch.float16)


def model(dtype):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3)).to(dtype)


def optimizer(m, **options):
    return MetaAdamW(m.named_parameters(), lr=3e-3, model=m, head_init="xavier", **options)


def steps(m, opt, first, last, dtype):
    for step in range(first, last):
        for i, p in enumerate(m.parameters()):
            p.grad = noise(p.shape, 100 * step + i).to(dtype).to(p.dtype)
        opt.step()


def masters(m, opt):
    return [opt.state[p]["master_param"] for p in m.parameters()]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("options", [{}, {"amsgrad": True, "max_grad_norm": 0.5}, {"statistics": "lagged"}], ids=str)
def test_masters_are_the_float32_run_and_parameters_its_rounding(dtype, backend, options):
    low, wide = model(dtype), model(dtype).float()
    opt = optimizer(low, master_weights=True, state_dtype=torch.float32, backend=backend, **options)
    exact = optimizer(wide, backend=backend, **options)
    steps(low, opt, 0, 12, dtype)
    steps(wide, exact, 0, 12, dtype)
    for p, master, q in zip(low.parameters(), masters(low, opt), wide.parameters(), strict=True):
        assert same_bits(master, q)
        assert same_bits(p, q.to(dtype))
    assert same_bits(opt.statistics, exact.statistics)


def test_wide_parameters_have_no_master():
    m = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).bfloat16(), nn.Linear(2, 2).double())
    opt = optimizer(m, master_weights=True)
    with_master = ["master_param" in opt.state[p] for p in m.parameters()]
    assert with_master == [False, False, True, True, False, False]


def test_a_step_called_off_moves_neither():
    m = model(torch.bfloat16)
    opt = optimizer(m, master_weights=True)
    steps(m, opt, 0, 3, torch.bfloat16)
    before = [x.clone() for x in (*m.parameters(), *masters(m, opt))]
    opt.found_inf = torch.tensor(1.0)
    steps(m, opt, 3, 4, torch.bfloat16)
    assert all(same_bits(x, y) for x, y in zip(before, (*m.parameters(), *masters(m, opt)), strict=True))


def hidden(p, opt):
    p.data[0] = 0.125
    opt.invalidate_statistics()


@pytest.mark.parametrize(
    "write",
    [
        lambda p, opt: p.detach()[0].fill_(0.125),
        lambda p, opt: setattr(p, "data", torch.cat([torch.full_like(p[:1], 0.125), p[1:]]).detach()),
        hidden,
    ],
    ids=["in place", "data", "hidden"],
)
def test_what_others_write_into_a_parameter_counts(write):
    """The elements that were written start from there; the others keep the bits that their parameter does not have."""
    runs = []
    for touched in (False, True):
        m = model(torch.bfloat16)
        opt = optimizer(m, master_weights=True)
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


@pytest.mark.parametrize("dtype", HALVES)
def test_a_checkpoint_resumes_with_all_bits(dtype, tmp_path):
    whole = model(dtype)
    opt = optimizer(whole, master_weights=True, state_dtype=torch.float32)
    steps(whole, opt, 0, 5, dtype)
    torch.save({"model": whole.state_dict(), "opt": opt.state_dict()}, tmp_path / "checkpoint")
    saved = torch.load(tmp_path / "checkpoint", weights_only=True)
    resumed = model(dtype)
    resumed.load_state_dict(saved["model"])
    again = optimizer(resumed, master_weights=True, state_dtype=torch.float32)
    again.load_state_dict(saved["opt"])
    steps(whole, opt, 5, 9, dtype)
    steps(resumed, again, 5, 9, dtype)
    for x, y in zip(masters(whole, opt), masters(resumed, again), strict=True):
        assert x.dtype == torch.float32
        assert same_bits(x, y)
    without = optimizer(resumed)
    without.load_state_dict(saved["opt"])
    assert not any("master_param" in state for state in without.state.values())
    steps(resumed, without, 9, 10, dtype)
    wrong = copy.deepcopy(saved["opt"])
    wrong["state"][0]["master_param"] = torch.zeros(2)
    with pytest.raises(ValueError, match="master_param of parameter 0 has shape"):
        again.load_state_dict(wrong)


def test_a_checkpoint_of_torch_makes_masters_of_the_parameters():
    m = model(torch.bfloat16)
    plain = torch.optim.AdamW(m.parameters())
    steps(m, plain, 0, 3, torch.bfloat16)
    opt = optimizer(m, master_weights=True)
    with pytest.warns(UserWarning, match="plain AdamW"):
        opt.load_state_dict(plain.state_dict())
    assert all(same_bits(x, p.float()) for p, x in zip(m.parameters(), masters(m, opt), strict=True))


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_state_dtype(state_dtype):
    m = model(torch.bfloat16)
    opt = optimizer(m, state_dtype=state_dtype, amsgrad=True)
    steps(m, opt, 0, 2, torch.bfloat16)
    for state in opt.state.values():
        assert {state[name].dtype for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")} == {state_dtype}
        assert state["step"].dtype == torch.float32


@pytest.mark.parametrize("wrong", [torch.int32, "bfloat16", torch.complex64])
def test_a_state_dtype_that_cannot_be(wrong):
    with pytest.raises(ValueError, match="Invalid state_dtype"):
        MetaAdamW([torch.zeros(2, requires_grad=True)], state_dtype=wrong)
