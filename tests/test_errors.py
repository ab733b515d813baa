"""Bad input raises the named error, with a message that says what is wrong, before anything has changed."""

import copy
import pickle

import pytest
import torch
from torch import nn

from metaadamw_fast import EncoderConfig, FeatureConfig, GroupEncoder, MetaAdamW, ops

from .cases import same, set_gradients, two_layers, unchanged
from .optimizers import AVGRAD, META, every, every_with

NAN, INF = float("nan"), float("inf")


def assert_names_no_other(spec, error):
    """Whoever reads the message may never have heard of MetaAdamW."""
    assert spec.encodes or "AdamW" not in str(error.value)


DUPLICATES = pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")


def parameter(**options):
    return nn.Parameter(torch.ones(3, **options))


ONE, ON_META = parameter(), parameter(device="meta")
FLOAT8, EXPANDED, SPARSE, NOT_A_LEAF = (
    nn.Parameter(torch.ones(3).to(torch.float8_e5m2)),
    nn.Parameter(torch.ones(1).expand(3)),
    nn.Parameter(torch.eye(3).to_sparse()),
    nn.Parameter(torch.ones(3)) * 2,
)

# ------------------------------------------------------------------------------------------------------------ the constructor

HYPERPARAMETERS = [
    *({name: value} for name in ("lr", "eps", "weight_decay") for value in (-1.0, NAN, -INF)),
    *({"betas": betas} for betas in ((1.0, 0.9), (-0.1, 0.9), (NAN, 0.9), (0.9, 1.0), (0.9, -0.1), (0.9, NAN), (0.9, 1.5))),
    {"betas": (torch.tensor(0.9), 0.999)},
    {"betas": (torch.tensor([0.9]), torch.tensor(1.0))},
    {"lr": torch.tensor([1e-3, 1e-3])},
    {"lr": torch.tensor(-1.0)},
    {"weight_decay": torch.tensor(-1.0)},
    {"lr": -1.0, "betas": (2.0, 2.0), "eps": -1.0, "weight_decay": -1.0},
]


@every
@pytest.mark.parametrize("arguments", HYPERPARAMETERS, ids=str)
def test_hyperparameters_fail_as_in_torch(arguments, spec):
    with pytest.raises(ValueError, match=r".") as theirs:
        torch.optim.AdamW([ONE], **arguments)
    with pytest.raises(ValueError, match=r".") as ours:
        spec.kind([ONE], **arguments)
    _, opt = two_layers(spec)
    with unchanged(opt), pytest.raises(ValueError, match=r".") as added:
        opt.add_param_group({"params": [("new", parameter())], **arguments})
    assert str(ours.value) == str(added.value) == str(theirs.value)


BETAS = [(), (0.9,), (0.9, 0.999, 0.9999), [0.9, 0.98, 0.99]]  # three are what Adan, AdEMAMix and CAME take


def load_with(opt, **values):
    state = copy.deepcopy(opt.state_dict())
    state["param_groups"][0].update(values)
    opt.load_state_dict(state)


def step_with(opt, **values):
    group = opt.param_groups[0]
    kept = dict(group)
    group.update(values)
    try:
        opt.step()
    finally:
        group.clear()
        group.update(kept)


WAYS = {
    "constructor": lambda opt, **values: type(opt)([parameter()], **values),
    "add_param_group": lambda opt, **values: opt.add_param_group({"params": [("new", parameter())], **values}),
    "load_state_dict": load_with,
    "assigned": step_with,
}


@every
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("betas", BETAS, ids=str)
def test_betas_that_are_not_two_are_refused_wherever_they_come_from(way, betas, spec):
    """One too many would take the place of the next hyper-parameter."""
    _, opt = two_layers(spec)
    with unchanged(opt), pytest.raises(ValueError, match=rf"two are needed, got {len(betas)}"):
        WAYS[way](opt, betas=betas)


@pytest.mark.parametrize("betas", BETAS, ids=str)
def test_betas_that_are_not_two_are_refused_by_the_op(betas):
    lists = [[torch.ones(3)] for _ in range(4)]
    with pytest.raises(ValueError, match=rf"two are needed, got {len(betas)}"):
        ops.adamw_update_(*lists, 0.1, 1.0, step=1, betas=betas)
    assert all(torch.equal(x, torch.ones(3)) for (x,) in lists)


@every
@pytest.mark.parametrize("way", WAYS)
def test_a_differentiable_step_is_refused_wherever_it_is_asked_for(way, spec):
    with pytest.raises(RuntimeError, match="does not support `differentiable`"):
        torch.optim.AdamW([parameter()], fused=True, differentiable=True)
    _, opt = two_layers(spec)
    with unchanged(opt), pytest.raises(RuntimeError, match="does not support `differentiable`"):
        WAYS[way](opt, differentiable=True)


@every
@pytest.mark.parametrize("params", [[], ONE, [3], [NOT_A_LEAF], [("a", ONE), parameter()], [{"params": [ONE]}, {"params": [ONE]}]])
def test_parameter_lists_fail_as_in_torch(params, spec):
    def own():  # an optimizer writes its defaults into a group
        return [{**x} if isinstance(x, dict) else x for x in params] if isinstance(params, list) else params

    with pytest.raises((ValueError, TypeError)) as theirs:
        torch.optim.AdamW(own())
    with pytest.raises(theirs.type) as ours:
        spec.kind(own())
    assert str(ours.value) == str(theirs.value)


CONSTRUCTOR = [
    *(({name: "no"}, f"Invalid {name}: 'no'") for name in ("backend", "allocate")),
    *(({"max_grad_norm": x}, "Invalid max_grad_norm") for x in (0.0, -1.0, NAN)),
    ({"capturable": True}, "capturable=True needs parameters on a CUDA device"),
    ({"params": [FLOAT8]}, "got torch.float8_e5m2"),
    ({"params": [SPARSE]}, "dense"),
    ({"params": [EXPANDED]}, "expanded"),
    ({"params": [ONE, ON_META]}, "one device, got cpu, meta"),
    ({"params": [ONE, ONE]}, "duplicate"),
]
CONSTRUCTOR_OF_METAADAMW = [
    *(({name: x}, f"Invalid {name}: {x}") for name in ("lr_scale_range", "wd_scale_range") for x in (-0.1, 2.0, NAN, INF)),
    *(({name: "no"}, f"Invalid {name}: 'no'") for name in ("grouping", "variant", "statistics", "head_init")),
    ({"features": "no"}, "Invalid feature version: 'no'"),
    ({"grouping": "fine_grained"}, "needs the parameters' names"),
    ({"grouping": lambda name, param: name}, "needs the parameters' names"),
    ({"features": FeatureConfig(dim=9), "encoder": EncoderConfig(heads=2)}, "2 heads do not divide the feature dim 9"),
    ({"features": FeatureConfig(dim=4)}, "Invalid feature dim: 4, basic features need at least 6"),
    ({"features": FeatureConfig("enhanced", dim=12), "encoder": EncoderConfig(heads=1)}, "need at least 14"),
    *(({"total_steps": x}, "Invalid total_steps") for x in (0, -5, NAN, "1000", [1000])),
]


OTHER_TYPES = [
    *(({name: "1"}, "not supported between|must be real number") for name in ("lr", "eps", "weight_decay", "max_grad_norm")),
    *(({"betas": betas}, ".") for betas in (0.9, None, ("0.9", "0.999"))),
]
OTHER_TYPES_OF_METAADAMW = [
    ({"encoder": "basic"}, "encoder should be an EncoderConfig or a GroupEncoder, but got str"),
    ({"encoder": GroupEncoder}, "encoder should be an EncoderConfig or a GroupEncoder, but got type"),
    ({"features": 3}, "features should be a FeatureConfig or the name of its version, but got int"),
    ({"features": None}, "features should be .*, but got NoneType"),
    ({"model": [nn.Linear(1, 1)]}, "model should be a torch.nn.Module, but got list"),
]


@every_with(*OTHER_TYPES, MetaAdamW=OTHER_TYPES_OF_METAADAMW)
def test_constructor_with_other_types(spec, options):
    arguments, message = options
    with pytest.raises(TypeError, match=message):
        spec.kind([parameter()], **arguments)


def test_an_encoder_with_other_types():
    for arguments, message in (
        (("basic", FeatureConfig(), 1), "config should be an EncoderConfig, but got str"),
        ((EncoderConfig(), "basic", 1), "features should be a FeatureConfig .*, but got str"),
    ):
        with pytest.raises(TypeError, match=message):
            GroupEncoder(*arguments)


CONTRADICTIONS = [
    ({"features": "enhanced"}, "features='enhanced' contradicts the encoder"),
    ({"features": FeatureConfig()}, "features=FeatureConfig.* contradicts the encoder"),
    ({"features": FeatureConfig("basic_plus", gating=True)}, "features=.*gating=True.* contradicts the encoder"),
    ({"features": FeatureConfig("basic_plus", dim=16)}, "features=.*dim=16.* contradicts the encoder"),
    ({"head_init": "xavier"}, "head_init='xavier' contradicts the encoder, which began with 'identity'"),
    ({"seed": 3}, "seed=3 contradicts the encoder, which has a generator of seed 5"),
]


@pytest.mark.parametrize(("arguments", "message"), CONTRADICTIONS, ids=[message for _, message in CONTRADICTIONS])
def test_what_contradicts_a_ready_encoder_is_refused(arguments, message):
    encoder = GroupEncoder(EncoderConfig(), FeatureConfig("basic_plus"), 1, seed=5)
    before = copy.deepcopy(encoder.state_dict()), encoder.ranges
    with pytest.raises(ValueError, match=message):
        MetaAdamW([parameter()], encoder=encoder, lr_scale_range=0.5, **arguments)
    assert same((encoder.state_dict(), encoder.ranges), before)


AGREEMENTS = [
    {},
    {"features": "basic_plus", "head_init": "xavier", "seed": 5},
    {"features": FeatureConfig("basic_plus", dim=12)},  # what it takes by itself
    {"features": FeatureConfig("basic_plus", group_embed_dim=9)},  # which is read by enhanced features only
    {"seed": 3, "stochastic_rounding": True},  # whose seed it is, too
]


@pytest.mark.parametrize("arguments", AGREEMENTS, ids=str)
@pytest.mark.parametrize("again", [lambda x: x, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["", "copy", "pickle"])
def test_what_is_said_again_of_a_ready_encoder(arguments, again):
    encoder = again(GroupEncoder(EncoderConfig(), FeatureConfig("basic_plus"), 1, seed=5, head_init="xavier"))
    assert MetaAdamW([parameter()], encoder=encoder, **arguments).encoder is encoder


@DUPLICATES
@every_with(*CONSTRUCTOR, MetaAdamW=CONSTRUCTOR_OF_METAADAMW)
def test_constructor(spec, options):
    arguments, message = options
    random_state = torch.get_rng_state()
    with pytest.raises(ValueError, match=message) as raised:
        spec.kind(**{"params": [parameter()], **arguments})
    assert_names_no_other(spec, raised)
    assert torch.equal(torch.get_rng_state(), random_state)


@pytest.mark.parametrize("size", [{"layers": -1}, {"heads": 0}, {"hidden": 0}], ids=str)
def test_size_of_the_encoder(size):
    with pytest.raises(ValueError, match="Invalid encoder size"):
        EncoderConfig(**size)


def test_a_backend_that_cannot_run_says_why():
    x = [torch.ones(3)]
    for call in (
        lambda: MetaAdamW([ONE], backend="triton"),
        lambda: AVGRAD([ONE], backend="triton"),
        lambda: ops.tensor_stats(x, x, backend="triton"),
    ):
        with pytest.raises(RuntimeError, match=r"backend='triton' cannot run here: .*Triton"):
            call()
    with pytest.raises(ValueError, match="Invalid backend: 'no'"):
        ops.adamw_update_(x, x, x, x, 0.1, 1.0, step=1, backend="no")


@pytest.mark.parametrize("arguments", [{"backend": "triton"}, {"wd_scale_range": 3.0}, {"capturable": True}], ids=str)
def test_a_ready_encoder_survives_a_failed_constructor(arguments):
    model, opt = two_layers(features="enhanced")
    features = torch.rand(len(opt.groups), opt.encoder.dim)
    before = copy.deepcopy(opt.encoder.state_dict()), opt.encoder(features)
    params = [{"params": [p]} for p in model.parameters()]  # more groups than the encoder knows
    with pytest.raises((ValueError, RuntimeError)):
        MetaAdamW(params, grouping="param_groups", encoder=opt.encoder, **{"lr_scale_range": 0.25, **arguments})
    assert same((opt.encoder.state_dict(), opt.encoder(features)), before)


# --------------------------------------------------------------------------------------------------- groups, gradients, steps

GROUPS = {
    "float8": ({"params": [("a", FLOAT8)]}, ValueError, "got torch.float8_e5m2"),
    "expanded": ({"params": [("a", EXPANDED)]}, ValueError, "expanded"),
    "another device": ({"params": [("a", ON_META)]}, ValueError, "one device, got cpu, meta"),
    "duplicate": ({"params": [("a", ONE), ("b", ONE)]}, ValueError, "duplicate"),
    "not a leaf": ({"params": [("a", NOT_A_LEAF)]}, ValueError, "non-leaf"),
    "no name": ({"params": [ONE]}, ValueError, "names"),
    "capturable": ({"params": [("a", ONE)], "capturable": True}, ValueError, "capturable"),
}
GROUPS_OF_METAADAMW = {
    "grouping that raises": ({"params": [("a", ONE), ("raises", parameter())]}, KeyError, "raises"),
    "grouping that is not hashable": ({"params": [("a", ONE), ("list", parameter())]}, TypeError, "unhashable"),
}


@DUPLICATES
@every_with(*GROUPS, MetaAdamW=GROUPS_OF_METAADAMW)
def test_add_param_group(spec, options):
    group, error, message = {**GROUPS, **GROUPS_OF_METAADAMW}[options]
    special = {"raises": lambda: {}["raises"], "list": list}
    options = {"grouping": lambda name, param: special.get(name, lambda: name)()} if spec.encodes else {}
    _, opt = two_layers(spec, **options)
    with unchanged(opt, **options), pytest.raises(error, match=message) as raised:
        opt.add_param_group(group)
    assert_names_no_other(spec, raised)


@every
def test_a_parameter_cannot_be_added_twice(spec):
    model, opt = two_layers(spec)
    with unchanged(opt), pytest.raises(ValueError, match="more than one parameter group"):
        opt.add_param_group({"params": [("again", model[0].weight)]})


SPOILED = {
    "sparse gradient": (lambda p: setattr(p, "grad", p.grad.to_sparse()), "sparse"),
    "gradient of another shape": (lambda p: setattr(p.grad, "data", torch.ones(7, 5)), "shape|size"),
    "parameter of another shape": (lambda p: setattr(p, "data", torch.ones(1, 4)), "shape|size"),
    "expanded parameter": (lambda p: setattr(p, "data", torch.ones(2, 1).expand(2, 4)), "expanded|single memory location"),
}


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@every_with({}, MetaAdamW=[{"statistics": "lagged", "max_grad_norm": 1.0}], AVGrad=[{"max_grad_norm": 1.0}])
@pytest.mark.parametrize("name", SPOILED)
def test_step(name, spec, options, backend):
    spoil, message = SPOILED[name]
    model, opt = two_layers(spec, backend=backend, **options)
    param = model[1].weight  # [2, 4], not the first one
    set_gradients(opt, 2)
    with unchanged(opt, backend=backend, **options):
        data, grad, grad_data = param.data, param.grad, param.grad.data
        spoil(param)
        with pytest.raises(RuntimeError, match=message) as raised:
            opt.step()
        assert_names_no_other(spec, raised)
        param.data, grad.data = data, grad_data
        param.grad = grad


@every
@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_a_state_that_does_not_fit(backend, spec):
    model, opt = two_layers(spec, backend=backend)
    param = model[1].weight
    for name in spec.states:
        set_gradients(opt, 2)
        with unchanged(opt, backend=backend):
            state = opt.state[param][name]
            opt.state[param][name] = torch.zeros(7)
            with pytest.raises(RuntimeError, match=rf"{name}s\[2\]") as raised:
                opt.step()
            assert_names_no_other(spec, raised)
            opt.state[param][name] = state
        model, opt = two_layers(spec, backend=backend)
        param = model[1].weight


@every
def test_a_closure_that_raises(spec):
    _, opt = two_layers(spec)
    with unchanged(opt), pytest.raises(ZeroDivisionError):
        opt.step(lambda: 1 / 0)


# ------------------------------------------------------------------------------------------------------------ checkpoints


def all_states(spec):
    return {"amsgrad": True} if spec is META else {}


def edited(f):
    """A checkpoint of the same optimizer two steps later, spoiled by ``f``."""

    def make(spec):
        _, other = two_layers(spec, **all_states(spec))
        for seed in (7, 8):
            set_gradients(other, seed)
            other.step()
        state = copy.deepcopy(other.state_dict())
        f(state)
        return state

    return make


def lacking(*path):
    def remove(d):
        for key in path[:-1]:
            d = d[key]
        del d[path[-1]]

    return edited(remove)


def of_another(**options):
    return lambda spec: two_layers(spec, **options)[1].state_dict()


def own(d):
    """The extra content."""
    (key,) = d.keys() - {"state", "param_groups"}
    return d[key]


def extra(**entries):
    return edited(lambda d: own(d).update(entries))


def state_of_3(**entries):
    return edited(lambda d: d["state"][3].update(entries))


def group_0(**entries):
    return edited(lambda d: d["param_groups"][0].update(entries))


def spoiled_states(*names):
    return {
        f"{name} {what}": (state_of_3(**{name: x}), f"{name} of parameter 3")
        for name in names
        for what, x in {
            "None": None,
            "a number": 1.0,
            "complex": torch.ones(2, dtype=torch.cfloat),
            "sparse": torch.ones(2).to_sparse(),
            "of another shape": torch.ones(2, 1),
            "on meta": torch.ones(2, device="meta"),
        }.items()
    }


CHECKPOINTS = {  # what is wrong, and the entry that the message names; KEY is the optimizer's
    "another model": (lambda spec: spec(nn.Linear(5, 5).named_parameters()).state_dict(), "parameter"),
    "another shape": (edited(lambda d: d["state"][3].update(exp_avg=torch.ones(7))), "shape"),
    "nothing": (lambda spec: {}, "state"),
    "no groups in it": (edited(lambda d: d["param_groups"].clear()), "parameter groups"),
    "fewer parameters": (edited(lambda d: d["param_groups"][0]["params"].pop()), "parameters"),
    "integer moment": (edited(lambda d: d["state"][3].update(exp_avg=torch.ones(2, dtype=torch.int64))), "exp_avg"),
    **{f"no {key}": (lacking(key), key) for key in ("state", "param_groups")},
    **{f"moments without {key}": (lacking("state", 3, key), key) for key in ("step", "exp_avg", "exp_avg_sq")},
    **{f"group without {key}": (lacking("param_groups", 0, key), key) for key in ("params", "lr", "betas", "eps")},
    "not a dict": (lambda spec: [1, 2], "not an optimizer checkpoint"),
    "states as a list": (edited(lambda d: d.update(state=[])), "'state'"),
    "groups as a dict": (edited(lambda d: d.update(param_groups={})), "'param_groups'"),
    "a group that is None": (edited(lambda d: d["param_groups"].__setitem__(0, None)), "parameter group 0"),
    "params that are no list": (group_0(params=3), "params of parameter group 0"),
    "a learning rate that is a word": (group_0(lr="x"), "parameter group 0"),
    "one beta": (group_0(betas=(0.9,)), "parameter group 0"),
    "a weight decay that is NaN": (group_0(weight_decay=NAN), "parameter group 0.*weight_decay"),
    "a state that is None": (edited(lambda d: d["state"].update({3: None})), "the state of parameter 3"),
    **{f"step {x}": (state_of_3(step=x), "step of parameter 3") for x in ("x", None, NAN, -1.0, torch.ones(2), torch.tensor(INF))},
    **spoiled_states("exp_avg", "exp_avg_sq"),
    "extra content None": (edited(lambda d: d.update(dict.fromkeys(d.keys() - {"state", "param_groups"}))), "KEY"),
    "extra content without steps_done": (edited(lambda d: own(d).pop("steps_done")), "steps_done"),
    **{f"steps_done {x}": (extra(steps_done=x), "steps_done") for x in ("x", None, -1, 2.5, NAN)},
    **{f"skipped_steps {x}": (extra(skipped_steps=x), "skipped_steps") for x in ("x", -1)},
    "steps as a list": (extra(steps=[1.0] * 4), "steps"),
    "steps below 0": (extra(steps=torch.full((4,), -1.0)), "steps"),
}

STATISTICS = torch.zeros(4, 5)
CORRUPT_OF_METAADAMW = {
    **spoiled_states("max_exp_avg_sq"),
    "group_ids None": (extra(group_ids=None), "groups the parameters differently"),
    "generator None": (extra(generator=None), "generator"),
    "generator too short": (extra(generator=torch.zeros(3, dtype=torch.uint8)), "generator"),
    "generator of floats": (extra(generator=torch.zeros(5056)), "generator"),
    "generator of zeros": (extra(generator=torch.zeros(5056, dtype=torch.uint8)), "generator"),
    "scales as a list": (extra(scales=[1.0]), "scales"),
    "scales of integers": (extra(scales=torch.ones(4, 4, dtype=torch.int64)), "scales"),
    "encoder None": (extra(encoder=None), "encoder"),
    "encoder with a number": (edited(lambda d: d["metaadamw"]["encoder"].update({"head.bias": 1.0})), "head.bias"),
    "encoder of two dtypes": (edited(lambda d: d["metaadamw"]["encoder"].update({"head.bias": torch.zeros(4).double()})), "dtypes"),
    "config None": (extra(config=None), "config"),
    "config without heads": (edited(lambda d: d["metaadamw"]["config"].pop("heads")), "config.*heads"),
    "lagged as a number": (extra(lagged=1.0), "lagged"),
    "lagged without t": (extra(lagged=[STATISTICS]), "lagged"),
    "lagged of other tensors": (extra(lagged=[torch.zeros(3, 5), 0.1]), "lagged has shape"),
    "lagged with counts": (extra(lagged=[torch.zeros(4, 7), 0.1]), "lagged has shape"),
    "lagged of lists": (extra(lagged=[[1.0], 0.1]), "lagged"),
    **{f"lagged with t {x}": (extra(lagged=[STATISTICS, x]), "t in lagged") for x in ("x", NAN, None)},
}
OTHER_ENCODERS = {  # of the same shapes
    "heads": {"encoder": EncoderConfig(heads=2)},
    "version": {"features": FeatureConfig("norm_basic", dim=8)},
    "v_norm": {"features": FeatureConfig(v_norm=False, dim=8)},
    "time_step": {"features": FeatureConfig(time_step=False, dim=8)},
}
EXTRA = ("steps_done", "group_ids", "encoder", "generator", "scales", "lagged")
OF_METAADAMW = {
    "another grouping": (of_another(grouping="param_groups"), "groups the parameters differently"),
    "another depth": (of_another(encoder=EncoderConfig(layers=3)), "another encoder"),
    "another width": (of_another(encoder=EncoderConfig(hidden=8)), "another encoder"),
    "other features": (of_another(features="enhanced"), "another encoder"),
    "gates": (of_another(features=FeatureConfig(gating=True)), "another encoder"),
    "encoder without head": (edited(lambda d: d["metaadamw"]["encoder"].pop("head.bias")), "head.bias"),
    "scales of more groups": (edited(lambda d: d["metaadamw"].update(scales=torch.ones(4, 9))), "scales"),
    **{f"metaadamw without {key}": (lacking("metaadamw", key), key) for key in EXTRA},
    **{f"other {name}": (of_another(**options), f"another encoder: {name} is") for name, options in OTHER_ENCODERS.items()},
    **CORRUPT_OF_METAADAMW,
}


def of_adam(**entries):
    """As Adam's or AdamW's, without a mean."""

    def spoil(d):
        del d["state"][3]["average_sq"]
        d["state"][3].update(entries)

    return edited(spoil)


OF_AVGRAD = {
    **spoiled_states("average_sq"),
    **{f"Adam's with {name} {x}": (of_adam(**{name: x}), name) for name in ("exp_avg", "exp_avg_sq") for x in (None, 1.0)},
    "Adam's of another shape": (of_adam(exp_avg_sq=torch.ones(7)), "exp_avg_sq"),
    "Adam's on meta": (of_adam(exp_avg_sq=torch.ones(2, device="meta")), "exp_avg_sq"),
    "Adam's of integers": (of_adam(exp_avg_sq=torch.ones(2, dtype=torch.int64)), "exp_avg_sq"),
}


@every_with(*CHECKPOINTS, MetaAdamW=OF_METAADAMW, AVGrad=OF_AVGRAD)
def test_load_state_dict(spec, options):
    make, message = {**CHECKPOINTS, **OF_METAADAMW, **OF_AVGRAD}[options]
    state = make(spec)
    kept = copy.deepcopy(state)
    _, opt = two_layers(spec, **all_states(spec))
    with unchanged(opt, **all_states(spec)), pytest.raises(ValueError, match=message.replace("KEY", spec.key)) as raised:
        opt.load_state_dict(state)
    assert_names_no_other(spec, raised)
    assert same(state, kept)


def test_an_encoder_with_embeddings_of_more_groups_is_refused():
    encoder = GroupEncoder(EncoderConfig(), FeatureConfig("enhanced"), 3)
    with pytest.raises(ValueError, match="3 group embeddings for 1 groups"):
        MetaAdamW([nn.Parameter(torch.ones(2))], encoder=encoder, features="enhanced")
