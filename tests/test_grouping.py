"""docs/algorithm.md section 1: parameters to groups. Every expected value is read off that section by hand."""

import pytest
import torch
from torch import nn

from metaadamw_fast import MetaAdamW
from metaadamw_fast.grouping import depth_bucket, layer_index, layer_type

from .models import perceptron

LAYER_INDICES = [
    ("layers.3.weight", 3),
    ("encoder.10.block.2.bias", 10),  # the first number between dots
    ("stack.7", 7),  # or one at the end
    ("a.1.b.2", 1),
    ("a.b.12", 12),
    ("0.weight", None),  # no dot before it
    ("layer3.weight", None),
    ("conv.2d.weight", None),
    ("weight", None),
    ("", None),
]


@pytest.mark.parametrize(("name", "index"), LAYER_INDICES)
def test_layer_index(name, index):
    assert layer_index(name) == index


LINEAR, EMBEDDING, ATTENTION, NORM, CONV = (
    nn.Linear(2, 2),
    nn.Embedding(2, 2),
    nn.MultiheadAttention(2, 1),
    nn.LayerNorm(2),
    nn.Conv1d(1, 1, 1),
)
LAYER_TYPES = [
    # by the name, lower-cased, first hit wins
    ("tok_Embed.weight", LINEAR, "embedding"),
    ("embed_norm.attn.weight", LINEAR, "embedding"),
    ("layers.0.self_attn.in_proj_weight", LINEAR, "attention"),
    ("Attention.norm.mlp", None, "attention"),
    ("block.ffn.norm.weight", NORM, "ffn"),
    ("MLP.0.weight", LINEAR, "ffn"),
    ("feed_forward.weight", LINEAR, "ffn"),
    ("batchnorm.weight", CONV, "layernorm"),
    # else by the module that owns the parameter
    ("a.weight", LINEAR, "linear"),
    ("a.weight", EMBEDDING, "embedding"),
    ("a.weight", ATTENTION, "attention"),
    ("a.weight", NORM, "layernorm"),
    ("a.weight", CONV, "other"),
    ("a.weight", None, "other"),
    ("feedforward.weight", None, "other"),
]


@pytest.mark.parametrize(("name", "owner", "kind"), LAYER_TYPES)
def test_layer_type(name, owner, kind):
    assert layer_type(name, owner) == kind


DEPTHS = [  # (largest index, bucket of index 0, 1, 2, ...)
    (0, [1]),
    (1, [1, 1]),
    (2, [0, 1, 2]),  # 2/3 and 4/3
    (3, [0, 1, 1, 2]),  # 1 is not below 1, 2 is not above 2
    (4, [0, 0, 1, 2, 2]),  # 4/3 and 8/3
    (6, [0, 0, 1, 1, 1, 2, 2]),
]


@pytest.mark.parametrize(("largest", "buckets"), DEPTHS)
def test_depth_bucket(largest, buckets):
    assert [depth_bucket(index, largest) for index in range(largest + 1)] == buckets
    assert depth_bucket(None, largest) == 1


def keys(opt):
    return [(group.type, group.bucket, group.is_bias) for group in opt.groups]


def members(opt):
    return [group.members for group in opt.groups]


def test_fine_grained_groups_of_a_model():
    model = nn.ModuleDict(
        {
            "embed": nn.Embedding(5, 4),
            "layers": nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)]),
            "norm": nn.LayerNorm(4),
            "conv": nn.Conv1d(1, 1, 1),
        }
    )
    model["scale"] = nn.Module()
    model["scale"].scalar_bias = nn.Parameter(torch.zeros(2, 2))  # two-dimensional, but called a bias
    opt = MetaAdamW(model.named_parameters(), model=model, grouping="fine_grained")
    expected = {  # in order of first appearance; the largest layer index is 2
        ("embedding", 1, False): ["embed.weight"],
        ("linear", 0, False): ["layers.0.weight"],
        ("linear", 0, True): ["layers.0.bias"],
        ("linear", 1, False): ["layers.1.weight"],
        ("linear", 1, True): ["layers.1.bias"],
        ("linear", 2, False): ["layers.2.weight"],
        ("linear", 2, True): ["layers.2.bias"],
        ("layernorm", 1, True): ["norm.weight", "norm.bias"],  # one-dimensional both
        ("other", 1, False): ["conv.weight"],
        ("other", 1, True): ["conv.bias", "scale.scalar_bias"],
    }
    assert keys(opt) == list(expected)
    assert [group.names for group in opt.groups] == list(expected.values())
    named = dict(model.named_parameters())
    for group in opt.groups:
        assert all(param is named[name] for name, param in zip(group.names, group.params, strict=True))
    assert len({group.name for group in opt.groups}) == len(opt.groups)


def test_without_the_model_the_owner_is_unknown():
    opt = MetaAdamW(perceptron().named_parameters())
    assert {group.type for group in opt.groups} == {"other", "layernorm"}


@pytest.mark.parametrize(
    ("grouping", "expected"),
    [
        ("auto", "fine_grained"),
        ("fine_grained", "fine_grained"),
        ("param_groups", "param_groups"),
    ],
)
@pytest.mark.parametrize("source", ["named", "model", "unnamed"])
def test_which_grouping_is_used(source, grouping, expected):
    model = perceptron()
    params = model.named_parameters() if source == "named" else model.parameters()
    options = {"model": model} if source == "model" else {}
    if source == "unnamed":
        if grouping == "fine_grained":
            with pytest.raises(ValueError, match="names"):
                MetaAdamW(params, grouping=grouping)
            return
        expected = "param_groups"
    opt = MetaAdamW(params, grouping=grouping, **options)
    assert (len(opt.groups) > 1) == (expected == "fine_grained")
    assert sorted(position for group in members(opt) for position in group) == list(range(len(list(model.parameters()))))


def test_param_groups_and_fine_grained_groups_are_independent_partitions():
    model = perceptron()
    named = list(model.named_parameters())
    entries = [{"params": named[:3], "lr": 1e-2}, {"params": named[3:], "weight_decay": 0.0}]
    opt = MetaAdamW(entries, model=model, grouping="param_groups")
    assert members(opt) == [[0, 1, 2], list(range(3, len(named)))]
    opt = MetaAdamW(entries, model=model, grouping="fine_grained")
    whole = MetaAdamW(named, model=model, grouping="fine_grained")
    assert members(opt) == members(whole)
    assert opt.param_groups[0]["lr"] == 1e-2
    assert opt.param_groups[1]["weight_decay"] == 0.0


def test_an_entry_without_parameters_is_no_group():
    model = perceptron()
    opt = MetaAdamW([{"params": []}, {"params": list(model.parameters())}], grouping="param_groups")
    assert len(opt.groups) == 1


def test_unknown_names_beside_known_ones():
    model = perceptron()
    strangers = [nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2, 2))]
    opt = MetaAdamW([*model.parameters(), *strangers], model=model)
    assert keys(opt)[-1] == ("unknown", 0, False)
    assert all(a is b for a, b in zip(opt.groups[-1].params, strangers, strict=True))
    assert ("linear", 0, False) in keys(opt)[:-1]


def test_a_group_added_later_keeps_the_ids_of_the_others():
    """A deeper layer changes what is early and late, for the new parameters only."""
    model = perceptron(depth=2)
    opt = MetaAdamW(model.named_parameters(), model=model)
    before, names = keys(opt), [list(group.names) for group in opt.groups]
    assert {bucket for _, bucket, _ in before} == {1}
    model.layers.extend([nn.Linear(12, 12) for _ in range(5)])
    opt.add_param_group({"params": [(n, p) for n, p in model.named_parameters() if n in ("layers.6.weight", "layers.3.weight")]})
    assert keys(opt)[: len(before)] == before
    assert keys(opt)[len(before) :] == [("linear", 2, False)]
    found = [group.names for group in opt.groups]
    assert found[-1] == ["layers.6.weight"]
    middle = before.index(("linear", 1, False))
    assert found[middle] == [*names[middle], "layers.3.weight"]
    opt.add_param_group({"params": [("more.3.weight", nn.Parameter(torch.zeros(2, 2)))]})  # of 6, not of 3
    assert keys(opt)[-1] == ("other", 1, False)
    assert opt.lr_scale.shape == (len(before) + 2,)


def test_grouping_by_a_function():
    model = perceptron()
    opt = MetaAdamW(model.named_parameters(), grouping=lambda name, param: param.dim())
    dims = [p.dim() for p in model.parameters()]
    assert members(opt) == [[i for i, d in enumerate(dims) if d == k] for k in (2, 1)]


def test_tied_weights_are_one_parameter():
    shared = nn.Linear(3, 3)
    model = nn.ModuleDict({"first": shared, "second": shared})
    opt = MetaAdamW(model.named_parameters(), model=model)
    assert [group.names for group in opt.groups] == [["first.weight"], ["first.bias"]]


def test_an_unknown_grouping_is_refused():
    with pytest.raises(ValueError, match="grouping"):
        MetaAdamW(perceptron().parameters(), grouping="layers")


def test_what_is_printed_of_a_group_has_no_elements():
    opt = MetaAdamW([("embed.weight", nn.Parameter(torch.full((100, 10), 0.123)))])
    for printed in map(repr, (opt.groups[0], opt.groups, opt._members)):
        assert "embed.weight" in printed
        assert "0.123" not in printed
