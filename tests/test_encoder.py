"""algorithm.md section 4: features of groups to scales. The oracle is torch.nn.TransformerEncoder itself."""

import pytest
import torch

from metaadamw_fast import EncoderConfig, FeatureConfig, GroupEncoder, MetaAdamW, sync

from .models import expected_scales, noise, perceptron, randomise, torch_encoder, torch_encoder_output
from .tolerances import ENCODER, ENCODER_FLOAT64

SIZES = [(1, 4, 8, 1), (2, 4, 32, 5), (2, 1, 7, 1), (3, 2, 16, 24), (8, 8, 16, 9), (0, 4, 32, 5)]  # layers, heads, hidden, groups


def make(layers=2, heads=4, hidden=32, groups=5, version="basic", double=False, **options):
    gating = options.pop("gating", False)
    encoder = GroupEncoder(
        EncoderConfig(layers, heads, hidden), FeatureConfig(version, gating=gating), groups, **{"head_init": "xavier", **options}
    )
    if double:
        encoder.double()
    randomise(encoder)
    return encoder


def features_of(encoder, groups, seed=0):
    dtype = encoder.head.weight.dtype
    return encoder.embed(noise((groups, encoder.dim), seed, dtype)).detach()


def closeness(double):
    return ENCODER_FLOAT64 if double else ENCODER


# ------------------------------------------------------------------------------------------------------------- torch's encoder


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize(("layers", "heads", "hidden", "groups"), SIZES)
def test_equals_torch(layers, heads, hidden, groups, double):
    encoder = make(layers, heads, hidden, groups, double=double)
    x = features_of(encoder, groups)
    with torch.no_grad():
        actual = x
        for layer in encoder.encoder.layers:
            actual = layer(actual)
    expected = torch_encoder_output(dict(encoder.named_parameters()), x, heads).detach()
    size = expected.abs().max()
    torch.testing.assert_close(actual / size, expected / size, **closeness(double))
    torch.testing.assert_close(encoder(x).detach(), expected_scales(encoder, x, heads=heads).detach(), **closeness(double))


def test_gradients_equal_torch():
    encoder = make(double=True, gating=True)
    x, weights = features_of(encoder, 5), noise((4, 5), 9, torch.float64)
    params = list(encoder.parameters())
    actual = torch.autograd.grad((encoder(x) * weights).sum(), params)
    expected = torch.autograd.grad((expected_scales(encoder, x, heads=4) * weights).sum(), params)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def test_masked_groups_equal_torch_with_a_padding_mask():
    encoder = make(groups=6)
    x = features_of(encoder, 6)
    masked = torch.tensor([False, True, False, False, True, False])
    bias = torch.where(masked, torch.finfo(torch.float32).min, 0.0)[None, None]
    actual = x
    with torch.no_grad():
        for layer in encoder.encoder.layers:
            actual = layer(actual, bias)
        expected = torch_encoder_output(dict(encoder.named_parameters()), x, 4, masked)
    size = expected.abs().max()
    torch.testing.assert_close(actual[~masked] / size, expected[~masked] / size, **ENCODER)


@pytest.mark.parametrize(
    ("version", "gating"), [("basic", True), ("enhanced", True), ("enhanced", False), ("norm_basic_plus", False)]
)
def test_state_dict_names(version, gating):
    """Those of torch.nn.TransformerEncoder below ``encoder.``, so that its weights load."""
    encoder = make(version=version, gating=gating, groups=3)
    names = [f"encoder.{name}" for name in torch_encoder(encoder.dim, 4, 32, 2, torch.float32).state_dict()]
    names += ["head.weight", "head.bias"] + ["feature_gates"] * gating
    names += [f"group_embeddings.{g}" for g in range(3)] * (version == "enhanced")
    assert sorted(encoder.state_dict()) == sorted(names)
    shapes = {name: tuple(value.shape) for name, value in encoder.state_dict().items()}
    assert shapes["head.weight"] == (4, encoder.dim)
    assert shapes["encoder.layers.1.self_attn.in_proj_weight"] == (3 * encoder.dim, encoder.dim)
    assert shapes.get("feature_gates", (encoder.dim,)) == (encoder.dim,)
    other = GroupEncoder(EncoderConfig(), encoder.features, 3)
    other.load_state_dict(encoder.state_dict())
    x = features_of(encoder, 3)
    assert torch.equal(other(x), encoder(x))


# -------------------------------------------------------------------------------------------------------------------- the start


@pytest.mark.parametrize("head_init", ["xavier", "identity"])
def test_the_start(head_init):
    encoder = GroupEncoder(
        EncoderConfig(2, 8, 64), FeatureConfig("enhanced", gating=True, dim=64, group_embed_dim=16), 400, head_init=head_init
    )
    for name, value in encoder.state_dict().items():
        if name.startswith("group_embeddings"):
            continue
        if name == "head.weight" and head_init == "identity":
            assert not value.any()
        elif value.dim() == 2:
            bound = (6 / sum(value.shape)) ** 0.5
            assert bound * 0.9 < value.abs().max() <= bound, name
            assert value.std().item() == pytest.approx(bound / 3**0.5, rel=0.15), name
        elif (".norm" in name and name.endswith("weight")) or name == "feature_gates":
            assert torch.equal(value, torch.ones_like(value))
        else:
            assert not value.any(), name
    embeddings = torch.stack(list(encoder.group_embeddings))
    assert embeddings.std().item() == pytest.approx(0.1, rel=0.05)  # 6400 numbers: 1 %
    assert abs(embeddings.mean().item()) < 0.005
    scales = encoder(features_of(encoder, 400))
    if head_init == "identity":
        assert torch.equal(scales, torch.tensor([1.0, 1.0, 0.5, 0.5])[:, None].expand(4, 400))
    else:
        assert scales[0].std() > 1e-3


def test_seeds_and_the_global_random_state():
    state = torch.get_rng_state()
    starts = [GroupEncoder(EncoderConfig(), FeatureConfig("enhanced"), 3, seed=seed).state_dict() for seed in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), state)
    name = "encoder.layers.0.linear1.weight"
    assert all(torch.equal(starts[0][key], starts[1][key]) for key in starts[0])
    assert not torch.equal(starts[0][name], starts[2][name])
    assert not torch.equal(starts[0]["group_embeddings.0"], starts[2]["group_embeddings.0"])


# ---------------------------------------------------------------------------------------------------------------- the four scales


@pytest.mark.parametrize("ranges", [(1.0, 1.0), (0.5, 1.9), (0.0, 1.0), (1.0, 0.0)])
def test_scales_from_the_head(ranges):
    """Without layers and with a head of biases only: 1 + range·(sigmoid - ½), and the plain sigmoid for the weights."""
    encoder = GroupEncoder(EncoderConfig(0, 1, 1), FeatureConfig(), 3, lr_scale_range=ranges[0], wd_scale_range=ranges[1]).double()
    a, b, c, d = encoder.head.bias.data = torch.tensor([0.7, -1.3, 2.0, -0.2], dtype=torch.float64)
    sigmoid = torch.sigmoid
    expected = torch.stack([1 + ranges[0] * (sigmoid(a) - 0.5), 1 + ranges[1] * (sigmoid(b) - 0.5), sigmoid(c), sigmoid(d)])
    scales = encoder(torch.ones(3, encoder.dim, dtype=torch.float64))
    torch.testing.assert_close(scales, expected[:, None].expand(4, 3), **ENCODER_FLOAT64)


@pytest.mark.parametrize("sign", [1, -1])
def test_scales_stay_inside_their_ranges(sign):
    encoder = make(0, groups=1, lr_scale_range=1.9, wd_scale_range=0.2)
    with torch.no_grad():
        encoder.head.weight.zero_()
        encoder.head.bias.fill_(sign * 1e30)
        scales = encoder(torch.ones(1, encoder.dim))[:, 0]
    torch.testing.assert_close(scales, torch.tensor([1 + sign * 0.95, 1 + sign * 0.1, 0.5 + sign / 2, 0.5 + sign / 2]), **ENCODER)
    assert scales[0] > 0


@pytest.mark.parametrize("bad", [-0.1, 2.0, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["lr_scale_range", "wd_scale_range"])
def test_ranges_that_are_refused(name, bad):
    with pytest.raises(ValueError, match=name):
        MetaAdamW(perceptron().parameters(), **{name: bad})


def test_a_head_count_that_does_not_divide_the_width_is_refused():
    with pytest.raises(ValueError, match="heads"):
        MetaAdamW(perceptron().parameters(), features=FeatureConfig(dim=9), encoder=EncoderConfig(heads=4))


@pytest.mark.parametrize("size", [(-1, 1, 1), (1, 0, 1), (1, 1, 0)])
def test_sizes_that_are_refused(size):
    with pytest.raises(ValueError, match="Invalid encoder size"):
        EncoderConfig(*size)


def test_a_head_init_that_is_refused():
    with pytest.raises(ValueError, match="head_init"):
        MetaAdamW(perceptron().parameters(), head_init="zero")


def test_groups_are_a_set():
    """No positions: permuting the groups permutes the scales."""
    encoder = make(double=True, version="norm_basic")
    x, order = features_of(encoder, 5), torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(encoder(x[order]), encoder(x)[:, order], **ENCODER_FLOAT64)


# -------------------------------------------------------------------------------------------------- gating and standardisation


@pytest.mark.parametrize("version", ["basic", "enhanced", "norm_basic", "norm_basic_plus"])
@pytest.mark.parametrize("gating", [False, True])
@pytest.mark.parametrize("groups", [1, 5])
def test_gating_and_standardisation(version, gating, groups):
    encoder = make(version=version, gating=gating, groups=groups, double=True)
    x = features_of(encoder, groups)
    standardised = {"norm_basic": 5, "norm_basic_plus": 10}.get(version, 0)
    expected = expected_scales(encoder, x, heads=4, standardised=standardised)
    torch.testing.assert_close(encoder(x), expected, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("version", ["basic", "norm_basic"])
def test_standardisation_cancels_gates_on_the_statistic_columns_only(version):
    encoder = make(version=version, gating=True, double=True)
    x = features_of(encoder, 5)
    before = encoder(x).detach()
    with torch.no_grad():
        encoder.feature_gates[:5] += noise((5,), 4, torch.float64)
    unchanged = torch.allclose(encoder(x), before, rtol=1e-6, atol=1e-6)  # the 1e-8 beside std does not cancel
    assert unchanged == (version == "norm_basic")
    with torch.no_grad():
        encoder.feature_gates[5] += 1  # of t
    assert not torch.allclose(encoder(x), before, rtol=1e-6, atol=1e-6)


def test_gates_start_at_sigmoid_of_one():
    encoder, plain = make(gating=True), make()
    with torch.no_grad():
        encoder.feature_gates.fill_(1.0)
    plain.load_state_dict({k: v for k, v in encoder.state_dict().items() if k != "feature_gates"})
    x = features_of(plain, 5)
    torch.testing.assert_close(encoder(x), plain(x * 0.7310585786300049), **ENCODER)


# ----------------------------------------------------------------------------------------------------------- non-finite groups


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("version", ["basic", "norm_basic", "enhanced"])
@pytest.mark.parametrize("gating", [False, True])
@pytest.mark.parametrize("known_to_the_host", [False, True])
def test_a_non_finite_group_is_as_if_it_did_not_exist(known_to_the_host, version, gating, bad, monkeypatch):
    if not known_to_the_host:  # as on a GPU
        monkeypatch.setattr(sync, "readable", lambda x: False)
    encoder = make(version=version, gating=gating)
    x = features_of(encoder, 5)
    x[1, 2] = x[4, 0] = bad
    rest = torch.tensor([0, 2, 3])
    scales = encoder(x)
    torch.testing.assert_close(scales[:, rest], encoder(x[rest]), **ENCODER)
    assert torch.equal(scales[:, rest], encoder(x[rest])) or not known_to_the_host
    assert torch.equal(scales[:2, [1, 4]].detach(), torch.ones(2, 2))
    gradients = torch.autograd.grad(scales.sum(), list(encoder.encoder.parameters()))
    expected = torch.autograd.grad(encoder(x[rest]).sum(), list(encoder.encoder.parameters()))
    for a, b in zip(gradients, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("version", ["basic", "norm_basic"])
def test_nothing_but_non_finite_groups(version):
    encoder = make(version=version)
    x = torch.full((5, encoder.dim), float("nan"))
    scales = encoder(x)
    assert torch.equal(scales[:2].detach(), torch.ones(2, 5))
    assert all(g is None or g.isfinite().all() for g in torch.autograd.grad(scales.sum(), encoder.parameters(), allow_unused=True))


def test_finite_features_whose_sum_overflows_are_not_masked():
    encoder = make(layers=0, groups=2)
    x = torch.zeros(2, encoder.dim)
    x[:, 0] = 3e38
    assert encoder(x).detach()[0].ne(1).all()
