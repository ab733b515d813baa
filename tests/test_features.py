"""docs/algorithm.md sections 2 and 3: statistics of tensors to features of groups."""

import math

import pytest
import torch
from torch import nn

from metaadamw_fast import EncoderConfig, FeatureConfig, GroupEncoder, MetaAdamW
from metaadamw_fast.features import VERSIONS, standardize

from .models import batch, expected_features, ids_of, make, mse, noise, perceptron, randomise, train
from .tolerances import ENCODER, FLOAT32_FEATURES, FLOAT64_FEATURES


def write_state(opt, seed=3):
    """Gives every tensor a gradient and moments, some of their elements zero."""
    for i, param in enumerate(p for group in opt.param_groups for p in group["params"]):
        g, m, v = (noise(param.shape, seed + 10 * i + k, param.dtype) for k in range(3))
        param.grad = torch.where(g > 0.5, g, 0.0)
        opt.state[param]["exp_avg"].copy_(torch.where(m < 0.2, m, 0.0))
        opt.state[param]["exp_avg_sq"].copy_(v.square())


def rows_of(opt):
    """What expected_features reads, taken before the step."""
    out = [None] * sum(len(group.members) for group in opt.groups)
    for group in opt.groups:
        for position, name, p in zip(group.members, group.names, group.params, strict=True):
            index = [int(part) for part in name.split(".") if part.isdigit()]
            state, g = opt.state[p], torch.zeros_like(p) if p.grad is None else p.grad
            values = [x.detach().clone() for x in (g, state["exp_avg"], state["exp_avg_sq"], p)]
            out[position] = (*values, p.dim() == 1 or name.endswith("bias"), index[0] if index else None)
    return out


# ---------------------------------------------------------------------------------------------------- numbers worked out by hand


def hand_made(version, **config):
    """Two groups: a = (3, 4), momentum (4, 3) and b = (0, 5), momentum (0, -2) in one, c = (0, 0, 0, 2) in the other."""
    a, b, c = (nn.Parameter(torch.tensor(x)) for x in ([6.0, 8.0], [[1.0], [0.0]], [0.0, 0.0, 3.0, 4.0]))
    features = FeatureConfig(version, **config)
    opt = MetaAdamW([{"params": [a, b]}, {"params": [c]}], features=features, encoder=EncoderConfig(heads=1), total_steps=4)
    states = [
        (a, [3.0, 4.0], [4.0, 3.0], [0.3, 0.4]),
        (b, [[0.0], [5.0]], [[0.0], [-2.0]], [[0.0], [1.5]]),
        (c, [0.0, 0.0, 0.0, 2.0], [0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]),
    ]
    for p, g, m, v in states:
        p.grad = torch.tensor(g)
        opt.state[p]["exp_avg"].copy_(torch.tensor(m))
        opt.state[p]["exp_avg_sq"].copy_(torch.tensor(v))
    opt.step()
    return opt


# Norms: g 5, 5 | 2; m 5, 2 | 0; p 10, 1 | 5; v 0.5, 1.5 | 0; cosines 24/25, -1 | 0. t is 1 of 4.
MEANS = [[5.0, 3.5, 5.5, -0.02], [2.0, 0.0, 5.0, 0.0]]
STDS = [[0.0, 1.5, 4.5, 0.98], [0.0, 0.0, 0.0, 0.0]]
# Gradient and momentum variances as above; zeros: g 0 and 1/2 | 3/4; m 0 and 1/2 | 1; two elements each | four; a and c are
# one-dimensional; no layer indices.
ENHANCED = [
    [5.0, 0.0, 3.5, 2.25, 0.25, 0.25, math.log(3), 0.5, 0.0],
    [2.0, 0.0, 0.0, 0.0, 0.75, 1.0, math.log(5), 1.0, 0.0],
]
BY_HAND = [
    ("basic", {}, [[*MEANS[0], 1.0, 0.25], [*MEANS[1], 0.0, 0.25]]),
    ("basic", {"v_norm": False}, [[*MEANS[0], 0.25], [*MEANS[1], 0.25]]),
    ("basic", {"time_step": False}, [[*MEANS[0], 1.0], [*MEANS[1], 0.0]]),
    ("basic", {"v_norm": False, "time_step": False, "dim": 6}, [[*MEANS[0], 0, 0], [*MEANS[1], 0, 0]]),
    ("basic_plus", {}, [[*MEANS[0], 1.0, *STDS[0], 0.5, 0.25], [*MEANS[1], 0.0, *STDS[1], 0.0, 0.25]]),
    ("basic_plus", {"v_norm": False}, [[*MEANS[0], *STDS[0], 0.25], [*MEANS[1], *STDS[1], 0.25]]),
    ("norm_basic", {}, [[*MEANS[0], 1.0, 0.25], [*MEANS[1], 0.0, 0.25]]),  # opt.features is before standardisation
    ("enhanced", {"group_embed_dim": 1, "dim": 13}, [[*row, 0.25, 0.0, 0.0] for row in ENHANCED]),
    ("enhanced", {"group_embed_dim": 2, "time_step": False}, ENHANCED),
]


@pytest.mark.parametrize(("version", "config", "expected"), BY_HAND)
def test_features_by_hand(version, config, expected):
    opt = hand_made(version, **config)
    width = len(expected[0])
    torch.testing.assert_close(opt.features[:, :width], torch.tensor(expected), **FLOAT32_FEATURES)
    if version == "enhanced":
        embeddings = torch.stack(list(opt.encoder.group_embeddings))
        torch.testing.assert_close(opt.features[:, width:], embeddings.detach(), rtol=0, atol=0)
        assert embeddings.shape == (2, config["group_embed_dim"])
    else:
        assert opt.features.shape == (2, width)


def test_statistics_by_hand():
    opt = hand_made("enhanced")
    expected = [[25, 24, 25, 100, 0.25, 2, 2], [25, -10, 4, 1, 2.25, 1, 1], [4, 0, 0, 25, 0, 1, 0]]
    torch.testing.assert_close(opt.statistics, torch.tensor(expected), **FLOAT32_FEATURES)


# ------------------------------------------------------------------------------------------- random states against the oracle


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("v_norm", [True, False])
@pytest.mark.parametrize("time_step", [True, False])
@pytest.mark.parametrize("version", VERSIONS)
def test_features_of_random_states(version, time_step, v_norm, backend, double):
    model = perceptron(torch.float64 if double else torch.float32, depth=4)
    opt = MetaAdamW(
        model.named_parameters(), model=model, features=FeatureConfig(version, v_norm=v_norm, time_step=time_step), backend=backend
    )
    if double:
        opt.encoder.double()
    write_state(opt)
    rows, t = rows_of(opt), 2 / (1 + math.exp(-1 / 1000)) - 1
    opt.step()
    options = {"v_norm": v_norm, "time_step": time_step, "max_layer": 3, "dim": opt.encoder.dim}
    expected = expected_features(version, rows, ids_of(opt), t, **options)
    if version == "enhanced":
        expected[:, -4:] = torch.stack(list(opt.encoder.group_embeddings)).detach()
    tolerance = FLOAT64_FEATURES if double else FLOAT32_FEATURES
    torch.testing.assert_close(opt.features.double(), expected, **tolerance)
    assert opt.features.dtype == (torch.float64 if double else torch.float32)


def test_a_missing_gradient_counts_as_zeros():
    model = perceptron()
    opt = MetaAdamW(model.named_parameters(), model=model, features="enhanced")
    write_state(opt)
    for p in (model.layers[0].weight, model.out.bias):
        p.grad = None
    rows = rows_of(opt)
    opt.step()
    expected = expected_features("enhanced", rows, ids_of(opt), 1 / 2000, max_layer=2, dim=opt.encoder.dim)
    torch.testing.assert_close(opt.features[:, :-4].double(), expected[:, :-4], **FLOAT32_FEATURES)


@pytest.mark.parametrize("version", ["basic", "enhanced"])
def test_an_empty_tensor_has_zeros_only(version):
    a, b = nn.Parameter(torch.tensor([3.0, 4.0])), nn.Parameter(torch.zeros(0, 3))
    opt = MetaAdamW([a, b], features=version)
    a.grad, b.grad = torch.tensor([0.0, 1.0]), torch.zeros(0, 3)
    opt.step()
    expected = [0.5, 0.0, 2.5, 0.0] if version == "basic" else [0.5, 0.25, 0.0, 0.0, 0.25, 0.5, math.log(3) / 2, 0.5]
    torch.testing.assert_close(opt.features[0, : len(expected)], torch.tensor(expected), **FLOAT32_FEATURES)
    assert not opt.statistics[1].any()


@pytest.mark.parametrize("small", [0.0, 1e-12])
def test_the_norms_in_a_cosine_have_a_floor(small):
    """Two parallel vectors of norm 1e-12 have the cosine (1e-12 / 1e-8)² = 1e-8, not 1."""
    p = nn.Parameter(torch.ones(1, dtype=torch.float64))
    opt = MetaAdamW([p])
    opt.encoder.double()
    p.grad = torch.full((1,), small, dtype=torch.float64)
    opt.state[p]["exp_avg"].fill_(small)
    opt.step()
    assert opt.features[0, 3].item() == pytest.approx(1e-8 if small else 0.0, rel=1e-12)


@pytest.mark.parametrize("total_steps", [None, 10])
def test_the_time_feature(total_steps):
    model = perceptron()
    opt = MetaAdamW(model.parameters(), total_steps=total_steps)
    for s in range(1, 4):
        opt.step()  # without a gradient it counts, too
        t = s / 10 if total_steps else 2 / (1 + math.exp(-s / 1000)) - 1
        assert opt.features[0, 5].item() == pytest.approx(t, rel=1e-6)


# ---------------------------------------------------------------------------------------------------------- width and padding

WIDTHS = [  # version, options, heads, columns, smallest multiple of the heads
    ("basic", {}, 4, 6, 8),
    ("basic", {}, 6, 6, 6),
    ("basic", {"v_norm": False, "time_step": False}, 4, 4, 4),
    ("basic_plus", {}, 11, 11, 11),
    ("basic_plus", {"v_norm": False}, 4, 9, 12),
    ("norm_basic_plus", {"time_step": False}, 4, 10, 12),
    ("enhanced", {}, 4, 14, 16),
    ("enhanced", {"v_norm": False, "group_embed_dim": 6}, 4, 16, 16),
    ("enhanced", {"time_step": False, "group_embed_dim": 1}, 3, 10, 12),
]


@pytest.mark.parametrize(("version", "options", "heads", "columns", "dim"), WIDTHS)
def test_the_width_of_a_row(version, options, heads, columns, dim):
    config = FeatureConfig(version, **options)
    assert GroupEncoder(EncoderConfig(heads=heads), config, 2).dim == dim
    wider = FeatureConfig(version, **options, dim=dim + heads)
    assert GroupEncoder(EncoderConfig(heads=heads), wider, 2).dim == dim + heads
    with pytest.raises(ValueError, match="dim"):
        GroupEncoder(EncoderConfig(heads=1), FeatureConfig(version, **options, dim=columns - 1), 2)
    with pytest.raises(ValueError, match="head"):
        GroupEncoder(EncoderConfig(heads=2), FeatureConfig(version, **options, dim=columns + columns % 2 + 1), 2)


@pytest.mark.parametrize("bad", [{"version": "basic2"}, {"version": "enhanced", "group_embed_dim": 0}])
def test_bad_configurations_are_refused(bad):
    with pytest.raises(ValueError, match="Invalid"):
        FeatureConfig(**bad)


# ------------------------------------------------------------------------------------------------------------- standardisation


def test_standardisation_by_hand():
    x = torch.tensor([[1.0, 5.0, 7.0], [3.0, 5.0, 9.0]])
    y = standardize(x, 2, None)  # mean 2, std √2 with Bessel's correction; a constant column gives 0; the last is left alone
    torch.testing.assert_close(y, torch.tensor([[-(0.5**0.5), 0.0, 7.0], [0.5**0.5, 0.0, 9.0]]), **FLOAT32_FEATURES)
    valid = torch.tensor([True, False, True])
    z = standardize(torch.stack([x[0], torch.full((3,), 1e9), x[1]]), 2, valid)
    torch.testing.assert_close(z[valid], y, rtol=0, atol=0)


def test_one_group_standardises_to_zero():
    x = torch.tensor([[3.0, -4.0, 0.25]])
    torch.testing.assert_close(standardize(x, 2, None), torch.tensor([[0.0, 0.0, 0.25]]), rtol=0, atol=0)
    torch.testing.assert_close(
        standardize(torch.cat([x, x + 1]), 2, torch.tensor([True, False]))[0], torch.tensor([0.0, 0.0, 0.25]), rtol=0, atol=0
    )


# ------------------------------------------------------------ what can be read


@pytest.mark.parametrize(("version", "columns"), [("basic", 5), ("enhanced", 7)])
def test_before_the_first_step(version, columns):
    opt = make(perceptron(), features=version)
    groups = len(opt.groups)
    assert torch.equal(opt.lr_scale, torch.ones(groups))
    assert torch.equal(opt.wd_scale, torch.ones(groups))
    for name, shape in (
        ("flatness_weight", (groups,)),
        ("alignment_weight", (groups,)),
        ("features", (groups, opt.encoder.dim)),
        ("statistics", (10, columns)),
        ("grad_norm", ()),
    ):
        assert torch.equal(getattr(opt, name), torch.zeros(shape)), name
    for p in (p for group in opt.groups for p in group.params):
        assert all(not x.any() and x.dtype == torch.float32 for x in opt.state[p].values())


@pytest.mark.parametrize("options", [{}, {"maximize": True}, {"max_grad_norm": 0.2}, {"features": "enhanced"}])
def test_statistics_are_torchs_norms(options):
    model = perceptron()
    opt = make(model, **options)
    train(model, opt, 3)
    opt.zero_grad()
    mse(model, batch(model, 3)).backward()
    params = list(model.parameters())
    norm = torch.stack([p.grad.double().norm() for p in params]).norm()
    factor = min(1.0, options.get("max_grad_norm", 1e9) / float(norm + 1e-6)) * (-1 if options.get("maximize") else 1)
    expected = []
    for p in params:
        g, m, v, x = (y.detach().double() for y in (p.grad, opt.state[p]["exp_avg"], opt.state[p]["exp_avg_sq"], p))
        expected.append([(factor * g).norm() ** 2, factor * (g * m).sum(), m.norm() ** 2, x.norm() ** 2, v.norm() ** 2])
        if "features" in options:
            expected[-1] += [g.count_nonzero(), m.count_nonzero()]
    opt.step()
    torch.testing.assert_close(opt.statistics, torch.tensor(expected).float(), **FLOAT32_FEATURES)
    torch.testing.assert_close(opt.grad_norm, norm.float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("version", ["basic", "norm_basic"])
def test_a_non_finite_group_leaves_the_others_alone(version, bad):
    """A gradient of 1e30 counts: its square is infinite in float32."""
    params = [[nn.Parameter(noise((3, 4), i)) for i in range(5)] for _ in range(2)]
    gradients = [noise((3, 4), 10 + i) for i in range(5)]
    gradients[2][1, 1] = bad
    del params[1][2]
    optimizers = [MetaAdamW([{"params": [p]} for p in ps], features=version, head_init="xavier") for ps in params]
    for opt, used in zip(optimizers, (gradients, gradients[:2] + gradients[3:]), strict=True):
        randomise(opt.encoder)
        for group, g in zip(opt.param_groups, used, strict=True):
            group["params"][0].grad = g.clone()
        opt.step()
    rest = [0, 1, 3, 4]
    for name in ("lr_scale", "wd_scale", "flatness_weight", "alignment_weight"):
        torch.testing.assert_close(getattr(optimizers[0], name)[rest], getattr(optimizers[1], name), **ENCODER)
    assert optimizers[0].lr_scale[2] == optimizers[0].wd_scale[2] == 1
    for i, p in zip(rest, params[1], strict=True):
        torch.testing.assert_close(params[0][i], p, **ENCODER)
