"""docs/algorithm.md section 4: features of groups to scales. The oracle is torch.nn.TransformerEncoder itself."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from metaadamw_fast import EncoderConfig, FeatureConfig, GroupEncoder, MetaAdamW
from metaadamw_fast.core import devices

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
        monkeypatch.setattr(devices, "readable", lambda x: False)
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


# ------------------------------------------------------------------------------------------------- float64, whatever is set

PRODUCTS = {torch.ops.aten.addmm, torch.ops.aten.mm, torch.ops.aten.baddbmm, torch.ops.aten.bmm}


class Products(TorchDispatchMode):
    """The dtypes of all matrix products inside."""

    def __init__(self):
        super().__init__()
        self.dtypes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in PRODUCTS:
            self.dtypes.add(out.dtype)
        return out


def test_no_product_is_in_float32(monkeypatch):
    """So that nothing can round it to TF32 or bfloat16: in a step, in the encoder's forward and backward pass, under autocast."""
    encoder = make(version="norm_basic", gating=True)
    x = features_of(encoder, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16), Products() as products:
        scales = encoder(x)
        torch.autograd.grad(scales.sum(), list(encoder.parameters()))
    assert products.dtypes == {torch.float64}
    assert scales.dtype == torch.float32
    model = perceptron()
    opt = MetaAdamW(model.parameters())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    monkeypatch.setattr(devices, "readable", lambda x: False)  # as on a GPU
    with Products() as products:
        opt.step()
    assert products.dtypes == {torch.float64}
    assert {p.dtype for p in opt.encoder.parameters()} | {opt.lr_scale.dtype, opt.features.dtype} == {torch.float32}


def test_float32_weights_are_used_as_they_are():
    """The scales are those of the same encoder in float64, rounded once."""
    encoder = make(version="norm_basic", gating=True)
    x = features_of(encoder, 5)
    expected = copy.deepcopy(encoder).double()(x.double()).float()
    assert torch.equal(encoder(x), expected)
    with torch.no_grad():
        assert torch.equal(encoder(x), expected)


@pytest.mark.parametrize("ranges", [(1.0, 1.0), (0.3, 1.7), (1.9, 0.123456789), (0.0, 1e-9)])
def test_the_identity_start_is_exact_in_float64(ranges):
    """1 - range/2 + range/2 is 1 in rounding to nearest."""
    encoder = GroupEncoder(EncoderConfig(), FeatureConfig(), 3, lr_scale_range=ranges[0], wd_scale_range=ranges[1]).double()
    assert torch.equal(encoder(features_of(encoder, 3))[:2], torch.ones(2, 3, dtype=torch.float64))


def in_place(encoder):
    with torch.no_grad():
        encoder.head.weight.mul_(2)


def through_data(encoder):
    """As torch's fused optimizers, it raises no version counter."""
    encoder.encoder.layers[0].linear1.weight.data.mul_(2)


def other_data(encoder):
    encoder.encoder.layers[1].norm2.bias.data = torch.full_like(encoder.encoder.layers[1].norm2.bias, 0.5)


def transposed_data(encoder):
    weight = encoder.encoder.layers[1].linear2.weight
    weight.data = weight.data.t().contiguous().t()
    weight.data.mul_(2)


def other_parameter(encoder):
    encoder.head.bias = nn.Parameter(torch.ones(4))


def loaded(encoder):
    encoder.load_state_dict({name: x + 0.25 for name, x in encoder.state_dict().items()})


def assigned(encoder):
    encoder.load_state_dict({name: x + 0.25 for name, x in encoder.state_dict().items()}, assign=True)


def there_and_back(encoder):
    encoder.double()
    in_place(encoder)
    encoder.float()


def stepped(encoder):
    """By the meta-optimizer that bumps no version: torch's fused Adam."""
    optimizer = torch.optim.Adam(encoder.parameters(), lr=0.1, fused=True)
    for p in encoder.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()


WRITES = [in_place, through_data, other_data, transposed_data, other_parameter, loaded, assigned, there_and_back, stepped]


@pytest.mark.parametrize("again", ["itself", "deepcopy", "pickle"])
@pytest.mark.parametrize("write", WRITES)
def test_weights_that_change_are_seen(write, again):
    encoder = make(gating=True)
    x = features_of(encoder, 5)
    with torch.no_grad():
        before = encoder(x)
    encoder = {"itself": lambda x: x, "deepcopy": copy.deepcopy, "pickle": lambda x: pickle.loads(pickle.dumps(x))}[again](encoder)
    write(encoder)
    with torch.no_grad():
        after = encoder(x)
    assert torch.equal(after, encoder(x).detach())  # with gradients on, each weight is converted anew
    assert not torch.equal(after, before)
    assert after.dtype == torch.float32


def test_float64_copies_of_the_weights_are_in_no_pickle_and_no_state_dict():
    encoder = make()
    size, names = len(pickle.dumps(encoder)), list(encoder.state_dict())
    with torch.no_grad():
        encoder(features_of(encoder, 5))
    assert len(pickle.dumps(encoder)) == size
    assert list(encoder.state_dict()) == names
    assert {p.dtype for p in encoder.parameters()} == {torch.float32}


def test_an_encoder_that_ran_in_inference_mode_runs_outside():
    encoder = make()
    x = features_of(encoder, 5)
    with torch.inference_mode():
        inside = encoder(x)
    with torch.no_grad():
        assert torch.equal(encoder(x), inside)


SETTINGS = """
import torch
from torch import backends
from metaadamw_fast import MetaLearner
from tests.models import batch, make, mse, noise, perceptron

PLACES = backends, backends.cuda.matmul, backends.cudnn, backends.mkldnn.matmul, backends.mkldnn.conv

def found():
    return [place.fp32_precision for place in PLACES]

def scales(version):
    model = perceptron()
    opt = make(model, features=version)
    for step in range(2):
        for i, p in enumerate(model.parameters()):
            p.grad = noise(p.shape, 10 * step + i)
        opt.step()
    before = found()
    MetaLearner(opt, model, mse).update(*(batch(model, i) for i in range(3)))
    assert found() == before
    return opt.lr_scale

expected = {version: scales(version) for version in ("basic", "norm_basic_plus")}

def check(name):
    changed = found()
    for version, lr_scale in expected.items():
        assert torch.equal(scales(version), lr_scale), (name, version)
    assert found() == changed, name

for place, value in ((backends, "tf32"), (backends.cuda.matmul, "tf32"), (backends.mkldnn.matmul, "bf16")):
    place.fp32_precision = value
    check(place)
    place.fp32_precision = "none"
backends.cuda.matmul.allow_tf32 = True
check("allow_tf32")
backends.cuda.matmul.allow_tf32 = False
torch.set_float32_matmul_precision("medium")
check("medium")
assert torch.get_float32_matmul_precision() == "medium"
print("checked")
"""


def test_precision_settings_of_the_process_change_nothing_and_are_not_changed():
    """In a process of its own, since they are global."""
    run = subprocess.run([sys.executable, "-c", SETTINGS], capture_output=True, text=True)
    assert run.stdout == "checked\n", run.stderr
