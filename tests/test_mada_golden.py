"""Numbers made with the authors' released code, which MADA must meet.

The code: amazon-science/mada_optimizer_search, Apache-2.0, commit 2beded8.

A file of ``golden/mada`` holds U updates of a tiny model, coefficients in the order beta1, beta2, beta3, rho, c, gamma:

    param0/NAME: before the first update.
    lr [U], grad/NAME [U, ...]: the gradients as they were before clipping.
    hyper_grad/NAME [U, ...]: with accumulation, the first micro-batch's, from which the authors learn before the update.
    theta [U, 6]: the coefficients with which each update was made; hyper_gradient [U, 6]: from which they had been learned, as
        autograd found it. NaN where it was not recorded.
    steps [S]: numbers of updates after which params/NAME, m/NAME, V/NAME, A/NAME, n/NAME, l/NAME [S, ...] were recorded.

Nothing of theirs covers ``variant="paper"`` as a whole: ``class_kept_gradient`` has its differences of gradients. mada_oracle.py
covers all of it.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from metaadamw_fast import MADA
from metaadamw_fast.mada import VARIANTS

from .tolerances import GOLDEN_MADA

GOLDEN = Path(__file__).parent / "golden" / "mada"
CASES = sorted(path.stem for path in GOLDEN.glob("*.npz"))
STATES = {"m": "exp_avg", "V": "exp_avg_sq", "A": "average_sq", "n": "exp_avg_diff", "l": "lion_exp_avg"}


class Recorded:
    """A golden file."""

    def __init__(self, name):
        with np.load(GOLDEN / f"{name}.npz") as arrays:
            self.arrays = {key: torch.from_numpy(arrays[key]) for key in arrays.files if key != "config"}
            self.config = json.loads(str(arrays["config"]))
        self.names = self.config["names"]
        self.bound = GOLDEN_MADA[getattr(torch, self.config["dtype"])]

    def __getitem__(self, key):
        return self.arrays[key]

    def assert_equal(self, got, key, row):
        """That ``got`` is row ``row`` of an array, within the bound relative to the array's largest entry."""
        recorded = self[key]
        known = ~recorded[row].isnan()
        off = (got - recorded[row])[known].abs()
        assert not got.isnan().any(), f"{key}[{row}]"
        assert off.numel() == 0 or off.max() <= self.bound * recorded.nan_to_num().abs().max(), f"{key}[{row}]: {off.max():.1e}"


def optimizer(recorded, params, backend):
    config = recorded.config
    start = dict(config["start"])
    semantics = VARIANTS["released"]
    if config["previous_gradient"] == "kept":
        semantics = semantics._replace(keeps_gradient=True)
    matrices = [p for p in params.values() if p.dim() >= 2]
    others = [p for p in params.values() if p.dim() < 2]
    return MADA(
        [{"params": matrices, "weight_decay": config["weight_decay"]}, {"params": others, "weight_decay": 0.0}],
        betas=(start.pop("beta1"), start.pop("beta2")),
        eps=config["eps"],
        **start,
        hyper_lr=config["rates"],
        hyper_momentum=config.get("hyper_momentum", 0.0),
        hyper_clip=config["hyper_clip"],
        freeze_steps=config["freeze_steps"],
        max_grad_norm=config["max_grad_norm"] or None,
        variant=semantics,
        backend=backend,
    )


def set_gradients(recorded, params, kind, row):
    for name, p in params.items():
        p.grad = recorded[f"{kind}/{name}"][row].clone()


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("case", CASES)
def test_every_update_equals_the_released_code(case, backend):
    recorded = Recorded(case)
    params = {name: nn.Parameter(recorded[f"param0/{name}"].clone()) for name in recorded.names}
    opt = optimizer(recorded, params, backend)
    accumulates = f"hyper_grad/{recorded.names[0]}" in recorded.arrays
    rows = {update: row for row, update in enumerate(recorded["steps"].tolist())}
    for k, lr in enumerate(recorded["lr"].tolist()):
        for group in opt.param_groups:
            group["lr"] = lr
        if accumulates:
            set_gradients(recorded, params, "hyper_grad", k)
            opt.hyper_update()
        set_gradients(recorded, params, "grad", k)
        opt.step()
        theta = recorded["theta"][k]
        assert (opt.coefficients[0] - theta).abs().max() <= recorded.bound, f"theta[{k}]"
        recorded.assert_equal(opt.hyper_gradient[0], "hyper_gradient", k)
        if k + 1 not in rows:
            continue
        for name, p in params.items():
            recorded.assert_equal(p.detach(), f"params/{name}", rows[k + 1])
            for letter, state in STATES.items():
                recorded.assert_equal(opt.state[p][state].abs() if letter in "AV" else opt.state[p][state], f"{letter}/{name}",
                                      rows[k + 1])  # fmt: skip
    assert k + 1 == max(rows) >= 130
    assert len(rows) == 16
    assert len(opt.state) == len(recorded.names) >= 7


def test_the_files_are_all_there():
    """And move all six coefficients inside their bounds, with clipped hyper-gradients, so that nothing can hide."""
    assert len(CASES) == 5
    moved = [Recorded(case)["theta"] for case in CASES]
    assert all((theta.max(0).values - theta.min(0).values > 0.0).all() for theta in moved)
