"""Numbers made with the authors' released code (MIT licence, commit ae00fc1), float32: `variant="released"` must meet them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from metaadamw_fast import EncoderConfig, FeatureConfig, MetaAdamW, MetaLearner

from .tolerances import GOLDEN_META, GOLDEN_STEP

GOLDEN = Path(__file__).parent / "golden"
STEP_CASES = ("step_basic", "step_enhanced", "step_norm_basic")
META_CASES = ("meta_gradient", "meta_combined")


class Archive:
    """A golden file: tensors by key, or all of them below a prefix."""

    def __init__(self, name):
        self.arrays = np.load(GOLDEN / f"{name}.npz")
        self.config = json.loads(str(self.arrays["config"]))
        self.names = [str(name) for name in self.arrays["names"]]

    def __getitem__(self, key):
        return torch.from_numpy(np.array(self.arrays[key]))

    def __contains__(self, key):
        return key in self.arrays.files

    def below(self, prefix):
        return {key[len(prefix) :]: self[key] for key in self.arrays.files if key.startswith(prefix)}

    def batch(self, prefix):
        return self[f"{prefix}/x"], self[f"{prefix}/y"]


def make_optimizer(archive, model, backend):
    config = archive.config
    encoder = archive.below("encoder0.")
    opt = MetaAdamW(
        model.named_parameters(),
        lr=config["lr"],
        weight_decay=config["weight_decay"],
        model=model,
        grouping=config["group_strategy"],
        features=FeatureConfig(
            config.get("feature_version", "basic"),
            v_norm=config["use_v_norms"],
            dim=config["feature_dim"],
            gating="feature_gates" in encoder,
        ),
        encoder=EncoderConfig(config["attn_layers"], config["attn_heads"], config["attn_hidden_dim"]),
        total_steps=config["total_steps"],
        variant="released",
        backend=backend,
    )
    encoder.pop("log_vars", None)
    opt.encoder.load_state_dict(encoder)
    return opt


def group_ids(opt):
    ids = [0] * sum(len(group.members) for group in opt.groups)
    for number, group in enumerate(opt.groups):
        for member in group.members:
            ids[member] = number
    return ids


def transformer():
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True, norm_first=True)
    return nn.ModuleDict(
        {
            "embed": nn.Embedding(11, 16),
            "transformer": nn.TransformerEncoder(layer, 4, enable_nested_tensor=False),
            "head": nn.Linear(16, 5),
        }
    )


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("case", STEP_CASES)
def test_every_step_equals_the_released_code(case, backend):
    archive = Archive(case)
    model = transformer()
    model.load_state_dict(archive.below("param0/"))
    params = dict(model.named_parameters())
    assert list(params) == archive.names
    opt = make_optimizer(archive, model, backend)
    assert group_ids(opt) == archive["group_of"].tolist()
    steps = 0
    while f"step{steps + 1}/alpha" in archive:
        steps += 1
        for name, p in params.items():
            p.grad = archive[f"step{steps}/grad/{name}"]
        opt.step()
        for key, value in (
            ("features", opt.features),
            ("alpha", opt.lr_scale),
            ("beta", opt.wd_scale),
            ("lambda1", opt.flatness_weight),
            ("lambda2", opt.alignment_weight),
        ):
            torch.testing.assert_close(value, archive[f"step{steps}/{key}"], **GOLDEN_STEP, msg=lambda m, k=key: f"{k}: {m}")
        for name, p in params.items():
            torch.testing.assert_close(p.detach(), archive[f"step{steps}/param/{name}"], **GOLDEN_STEP)
            for moment in ("exp_avg", "exp_avg_sq"):
                torch.testing.assert_close(opt.state[p][moment], archive[f"step{steps}/{moment}/{name}"], **GOLDEN_STEP)
    assert steps >= 6


class TanhNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6 if i == 0 else 16, 16) for i in range(4)])
        self.norm = nn.LayerNorm(16)
        self.out = nn.Linear(16, 3)

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.out(self.norm(x))


def mse(model, batch):
    return nn.functional.mse_loss(model(batch[0]), batch[1])


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("case", META_CASES)
def test_every_meta_update_equals_the_released_code(case, backend):
    archive = Archive(case)
    config = archive.config
    model = TanhNet()
    model.load_state_dict(archive.below("param0/"))
    opt = make_optimizer(archive, model, backend)
    assert group_ids(opt) == archive["group_of"].tolist()
    seen = []

    def recording_loss(model, batch):
        seen.append({name: p.detach().clone() for name, p in model.named_parameters()})
        return mse(model, batch)

    meta = MetaLearner(
        opt,
        model,
        recording_loss,
        objective=config["meta_objective"],
        balance="huw" if config["use_huw"] else "sum",
        priorities=config["huw_priorities"],
        term_kinds=config["task_types"],
        lr=config["meta_lr"],
        make_optimizer=torch.optim.SGD,
    )
    train_step = drawn = updates = 0
    while f"train{train_step + 1}/x" in archive:
        train_step += 1
        opt.zero_grad()
        mse(model, archive.batch(f"train{train_step}")).backward()
        opt.step()
        if train_step % 5:
            continue
        updates += 1
        n = updates
        needed = 2 if config["meta_objective"] == "combined" else 0  # a batch of its own for each validation term, in order
        validation = [archive.batch(f"val{drawn + i}") for i in range(needed)]
        drawn += needed
        seen.clear()
        report = meta.update(archive.batch(f"meta{n}/b1"), archive.batch(f"meta{n}/b2"), *validation)
        theta = archive.below(f"meta{n}/theta_prime/")
        assert any(all(torch.allclose(x[k], theta[k], **GOLDEN_META) for k in theta) for x in seen)
        expected = {"total": report.total, "alpha": report.lr_scale, "beta": report.wd_scale}
        expected["L_grad"] = report.gradient_alignment
        if config["meta_objective"] == "combined":
            expected |= {"L_loss": report.loss_decrease, "L_gap": report.generalization_gap}
        for key, value in expected.items():
            golden = archive[f"meta{n}/{key}"].to(value.dtype)
            torch.testing.assert_close(value, golden, **GOLDEN_META, msg=lambda m, k=key: f"{k}: {m}")
        encoder = archive.below(f"encoder{n}.")
        if "log_vars" in encoder:
            torch.testing.assert_close(meta.log_vars.detach(), encoder.pop("log_vars"), **GOLDEN_META)
        for name, value in opt.encoder.state_dict().items():
            torch.testing.assert_close(value, encoder[name], **GOLDEN_META)
    assert updates == 2
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), archive[f"final/{name}"], **GOLDEN_META)
