"""AVGrad as an optimizer, against MADA section 7 written as plain lines in float64, and its way from Adam and back."""

import copy

import pytest
import torch

from metaadamw_fast import AVGrad

SHAPES = [(5,), (33, 7), (2, 3, 4), ()]
BACKENDS = ["cpp", "reference"]


def parameters(dtype=torch.float64, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def gradients(steps, dtype=torch.float64, seed=5):
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES] for _ in range(steps)]


def train(opt, params, batches):
    for grads in batches:
        for p, g in zip(params, grads, strict=True):
            p.grad = None if g is None else g.clone()
        opt.step()


def by_the_lines(params, batches, lr, betas, eps, weight_decay, max_norm=None, sign=1.0):
    """The parameters after these gradients."""
    states = [[torch.zeros_like(p), torch.zeros_like(p), torch.zeros_like(p), 0] for p in params]
    out = [p.detach().clone() for p in params]
    for grads in batches:
        norm = torch.stack([g.norm() for g in grads if g is not None]).norm()
        clip = 1.0 if max_norm is None else min(1.0, max_norm / (norm.item() + 1e-6))
        for p, state, grad in zip(out, states, grads, strict=True):
            if grad is None:
                continue
            g, (m, v, mean, t) = sign * clip * grad, state
            t += 1
            m = betas[0] * m + (1 - betas[0]) * g
            v = betas[1] * v + (1 - betas[1]) * g * g
            mean = mean + (v - mean) / t
            p.mul_(1 - lr * weight_decay)
            p.sub_(lr * (m / (1 - betas[0] ** t)) / ((mean / (1 - betas[1] ** t)).sqrt() + eps))
            state[:] = m, v, mean, t
    return out


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_grad_norm": 1.0},
        {"weight_decay": 0.1, "maximize": True},
        {"betas": (0.3, 0.999), "eps": 1e-3},
        {"skip_nonfinite": True},
    ],
)
def test_120_steps_are_those_of_the_formula(backend, options):
    """Also where a parameter has no gradient now and then: each has its own count."""
    params, batches = parameters(), gradients(120)
    for step in range(0, 120, 7):
        batches[step][1] = None
    expected = by_the_lines(
        params,
        batches,
        1e-2,
        options.get("betas", (0.9, 0.99)),
        options.get("eps", 1e-6),
        options.get("weight_decay", 0.0),
        options.get("max_grad_norm"),
        -1.0 if options.get("maximize") else 1.0,
    )
    opt = AVGrad(params, lr=1e-2, backend=backend, **options)
    train(opt, params, batches)
    for p, x in zip(params, expected, strict=True):
        torch.testing.assert_close(p.detach(), x, rtol=1e-12, atol=1e-12)
    assert opt.steps_done == 120
    assert opt.state[params[1]]["step"] == 120 - len(range(0, 120, 7))


def test_defaults_are_those_of_its_authors():
    assert {**AVGrad(parameters()).defaults, "maximize": None, "capturable": None} == {
        "lr": 1e-3, "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.0, "maximize": None, "capturable": None,
    }  # fmt: skip


def test_it_sums_gradients_only_to_clip_or_to_skip():
    params, batches = parameters(), gradients(1)
    norm = torch.stack([g.norm() for g in batches[0]]).norm()
    for options, expected in (({}, 0.0), ({"max_grad_norm": 1.0}, norm), ({"skip_nonfinite": True}, norm)):
        opt = AVGrad(params, **options)
        train(opt, params, batches)
        torch.testing.assert_close(opt.grad_norm, torch.as_tensor(expected, dtype=torch.float64))
        assert opt.statistics.shape == (len(SHAPES), 1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_mean_is_float32_beside_narrow_states(dtype, backend):
    params = parameters(dtype)
    opt = AVGrad(params, backend=backend)
    train(opt, params, gradients(3, dtype))
    assert {x.dtype for state in opt.state.values() for n, x in state.items() if n in ("exp_avg", "exp_avg_sq")} == {dtype}
    assert {state["average_sq"].dtype for state in opt.state.values()} == {torch.float32}


@pytest.mark.parametrize("torch_s", [torch.optim.Adam, torch.optim.AdamW])
def test_a_checkpoint_of_adam_loads_with_its_second_moment_as_the_mean(torch_s):
    params, batches = parameters(torch.float32), gradients(50, torch.float32)
    adam = torch_s(params, betas=(0.9, 0.99), eps=1e-6, weight_decay=0.0)
    train(adam, params, batches)
    state_dict = adam.state_dict()
    others = [torch.nn.Parameter(p.detach().clone()) for p in params]
    opt = AVGrad(others)
    opt.load_state_dict(state_dict)
    for p, q in zip(params, others, strict=True):
        assert torch.equal(opt.state[q]["average_sq"], adam.state[p]["exp_avg_sq"])
        assert opt.state[q]["average_sq"].data_ptr() != adam.state[p]["exp_avg_sq"].data_ptr()
        assert opt.state[q]["step"] == 50
    (batch,) = gradients(1, torch.float32, seed=6)
    start = [p.detach().clone() for p in params]
    train(adam, params, [batch])
    train(opt, others, [batch])
    for p, q, x in zip(params, others, start, strict=True):
        assert (q - p).norm() <= 0.03 * (p - x).norm()  # with A = 0 the step would be 7 times as long
    assert "average_sq" not in state_dict["state"][0]


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {"max_grad_norm": 1.0}),
        (torch.bfloat16, {"stochastic_rounding": True, "seed": 4}),
        (torch.bfloat16, {"master_weights": True, "state_dtype": torch.float32}),
    ],
)
def test_its_own_checkpoint_goes_on_bit_for_bit(dtype, options):
    params, batches = parameters(dtype), gradients(12, dtype)
    opt = AVGrad(params, **options)
    train(opt, params, batches[:7])
    others = [torch.nn.Parameter(p.detach().clone()) for p in params]
    loaded = AVGrad(others, **{**options, "seed": 9})
    loaded.load_state_dict(copy.deepcopy(opt.state_dict()))
    train(opt, params, batches[7:])
    train(loaded, others, batches[7:])
    assert all(map(torch.equal, params, others))
    for p, q in zip(params, others, strict=True):
        assert all(torch.equal(x, loaded.state[q][name]) for name, x in opt.state[p].items())
    assert loaded.steps_done == 12
