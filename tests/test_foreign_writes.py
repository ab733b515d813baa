"""What others do to parameters and states between two steps is taken up as torch's own optimizers take it up."""

import copy
import pickle

import pytest
import torch
from torch import nn

from metaadamw_fast import MetaAdamW

from .models import OFF, noise


def assign_data_twice(p, opt):
    """The second tensor would get the address of the first if the optimizer did not hold it."""
    version = p._version
    p.data = p.data * 1.5
    p.data = p.data * 1.5
    assert p._version == version


def behind_the_back(p, opt):
    p.data.mul_(2)
    opt.invalidate_statistics()


WRITES = {
    "in place": lambda p, opt: p.detach().mul_(2),
    "data": lambda p, opt: setattr(p, "data", p.data * 2),
    "data, twice": assign_data_twice,
    "data, transposed": lambda p, opt: setattr(p, "data", p.data.t()),
    "behind the back": behind_the_back,
    "second moment": lambda p, opt: opt.state[p]["exp_avg_sq"].add_(1),
    "momentum": lambda p, opt: opt.state[p]["exp_avg"].mul_(2),
    "data of the momentum": lambda p, opt: setattr(opt.state[p]["exp_avg"], "data", torch.ones_like(p)),
    "assigned state": lambda p, opt: opt.state[p].update(exp_avg_sq=torch.ones_like(p)),
    "replaced state": lambda p, opt: opt.state.update({p: {name: x.clone() for name, x in opt.state[p].items()}}),
    "load_state_dict": lambda p, opt: opt.load_state_dict(MetaAdamW([torch.ones_like(p)]).state_dict()),
}


@pytest.mark.parametrize("kind", WRITES)
def test_what_others_write_between_steps_is_seen(kind):
    p = nn.Parameter(noise((40, 40), 0))
    opt = MetaAdamW([p])
    for step in range(3):
        if step == 2:
            WRITES[kind](p, opt)
        p.grad = noise(p.shape, 10 + step)
        m, v = opt.state[p]["exp_avg"], opt.state[p]["exp_avg_sq"]
        expected = [
            (x.detach().double() * y.detach().double()).sum() for x, y in ((p.grad, p.grad), (p.grad, m), (m, m), (p, p), (v, v))
        ]
        opt.step()
        torch.testing.assert_close(opt.statistics[0], torch.stack(expected).float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("amsgrad", [False, True])
def test_state_and_parameters_exchanged_by_hand_as_in_torch(amsgrad):
    """What torch's own optimizers take up in the next step: a cleared state, a state of one's own, another parameter."""
    weights = [nn.Parameter(noise((5, 4), i)) for i in range(3)]
    runs = []
    for make in (torch.optim.AdamW, lambda ps, **kw: MetaAdamW(ps, **kw, **OFF)):
        ps = copy.deepcopy(weights)
        opt = make(ps[:2], lr=0.1, amsgrad=amsgrad)
        for step in range(8):
            if step == 2:
                opt.state.clear()
            if step == 4:
                opt.state[ps[0]]["exp_avg"] = torch.full((5, 4), 0.5)
                opt.state[ps[0]]["step"] = torch.tensor(7.0)
            if step == 6:
                opt.param_groups[0]["params"][1] = ps[2]
            for i, p in enumerate(ps):
                p.grad = noise(p.shape, 10 * step + i)
            opt.step()
        assert opt.state[ps[2]]["step"] == 2
        runs.append([*ps, opt.state[ps[0]]["exp_avg"], opt.state[ps[2]]["exp_avg_sq"]])
    torch.testing.assert_close(runs[0], runs[1], rtol=1e-6, atol=1e-7)
    opt.param_groups[0]["params"].append(nn.Parameter(torch.zeros(2)))
    with pytest.raises(RuntimeError, match="use add_param_group"):
        opt.step()


def test_a_model_on_the_meta_device_gets_its_states_in_the_first_step():
    def train(build):
        torch.manual_seed(0)
        model, opt = build()
        for step in range(3):
            for i, p in enumerate(model.parameters()):
                p.grad = noise(p.shape, 10 * step + i)
            opt.step()
        return [*model.parameters(), *(x for p in model.parameters() for x in opt.state[p].values())]

    def materialised_later():
        with torch.device("meta"):
            model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
        opt = MetaAdamW(model.named_parameters(), model=model)
        assert not opt.state
        assert opt.lr_scale.device.type == "cpu"
        with pytest.raises(RuntimeError, match="meta device"):
            opt.step()
        with pytest.raises(RuntimeError, match="meta device"):
            opt.load_state_dict(copy.deepcopy(opt).state_dict())
        swap = torch.__future__.get_swap_module_params_on_conversion()
        torch.__future__.set_swap_module_params_on_conversion(True)  # so that the parameters stay the same objects
        try:
            model.to_empty(device="cpu")
        finally:
            torch.__future__.set_swap_module_params_on_conversion(swap)
        for layer in model:
            layer.reset_parameters()
        return model, opt

    def at_once():
        model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
        torch.manual_seed(0)
        for layer in model:
            layer.reset_parameters()
        return model, MetaAdamW(model.named_parameters(), model=model)

    torch.testing.assert_close(train(materialised_later), train(at_once), rtol=0, atol=0)


@pytest.mark.parametrize("transfer", [copy.deepcopy, lambda opt: pickle.loads(pickle.dumps(opt))], ids=["copy", "pickle"])
def test_parameters_are_added_to_a_copy_that_knows_no_model(transfer):
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    opt = transfer(MetaAdamW(model.parameters(), model=model))
    groups = [(group.name, group.names) for group in opt.groups]
    opt.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    assert [(group.name, group.names) for group in opt.groups[: len(groups)]] == groups
    assert opt.groups[-1].names == ["parameter 4"]
