"""The net of bits: hashes of what the code computes, so that a change which was to move no bit can show that it moved none.

`tests/golden/bits.json` holds what no processor changes: the ops on lists, and runs with both ranges 0, whose scales are exactly 1.
They are of the C++ backend on the CPU. Inputs come from integers (see `numbers`), not from a random generator or a library's
exponential, and nothing here adds up in an order that torch chooses. `tests/test_bits.py` compares.

What an encoder decides depends on torch's products, which differ between processors. It is compared on one machine in one sitting:

    python -m tests.bits --against COMMIT    builds COMMIT in a git worktree, runs all cases in both trees, prints a line for each

Both trees run this very file, which therefore uses the public API alone. The exit status is 1 if anything differs.

    python -m tests.bits --write             writes bits.json, and checkpoints of kinds that have none

Writing is legitimate with a new case, and with a change of the arithmetic that its commit message explains. It is not a way to make
a failing test pass: another machine, compiler or torch must give the same bits. Only cases that changed may differ in the commit.

`tests/golden/checkpoints/` holds a checkpoint of each kind. A file there is never written again: it stands for those of users.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import nn

import metaadamw_fast
from metaadamw_fast import EncoderConfig, FeatureConfig, MetaAdamW, MetaLearner, ops

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden" / "bits.json"
CHECKPOINTS = ROOT / "tests" / "golden" / "checkpoints"

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
DTYPES = {"float32": F32, "float64": F64, "bfloat16": BF16, "float16": F16}
LOW = ("bfloat16", "float16")
OFF = {"lr_scale_range": 0.0, "wd_scale_range": 0.0}
STEPS = 30

# ------------------------------------------------------------------------------------------------------------------- inputs

_MASK = 2**32 - 1
_UNITS = torch.tensor([2.0**-k for k in range(10, 18)], dtype=F64)


def numbers(shape, seed):
    """Float64 numbers n·2^-k / 3 with integers -1024 <= n < 1024 and 10 <= k < 18, from a hash of seed and position.

    IEEE division and conversions give the same bits everywhere. Some numbers are 0. The others fill the mantissa: sums of short
    numbers would be exact in float64, and the net blind to their order.
    """
    count = torch.Size(shape).numel()
    x = (torch.arange(count, dtype=torch.int64) + seed * 0x9E3779B1) & _MASK
    for shift, factor in ((16, 0x7FEB352D), (15, 0x6C078965)):  # below 2^31: the products fit 63 bits
        x = ((x ^ (x >> shift)) * factor) & _MASK
    x = x ^ (x >> 16)
    return (((x & 2047) - 1024).double() * _UNITS[(x >> 11) & 7] / 3).reshape(shape)


# One element, sizes around 16 lanes and a block of 1024, none at all, and the last longer than a chunk of 32768.
SHAPES = ((), (1,), (7,), (33,), (0,), (37, 29), (8, 6), (1025,), (181, 183))
TRANSPOSED, WITH_GAPS = 5, 6  # positions in SHAPES


def placed(x, t):
    """The values of tensor number ``t`` in its memory layout."""
    if t == TRANSPOSED:
        return x.t().contiguous().t()
    if t == WITH_GAPS:
        wider = torch.zeros(x.shape[0], x.shape[1] + 3, dtype=x.dtype)
        wider[:, : x.shape[1]] = x
        return wider[:, : x.shape[1]]
    return x.clone()


def tensors(dtype, seed, layout=True, absolute=False):
    xs = [numbers(shape, 100 * seed + t) for t, shape in enumerate(SHAPES)]
    xs = [(x.abs() if absolute else x).to(dtype) for x in xs]
    return [placed(x, t) for t, x in enumerate(xs)] if layout else xs


@functools.cache
def gradients_of(step):
    return [numbers(shape, 1000 + 100 * step + t) for t, shape in enumerate(SHAPES)]


def hashed(parts):
    """The first 32 digits of the SHA-256 of each part: the bytes of its tensors, in order, with dtypes and shapes."""
    hashes = {}
    for name, part in parts.items():
        digest = hashlib.sha256()
        for x in part if isinstance(part, (list, tuple)) else [part]:
            digest.update(f"{x.dtype} {tuple(x.shape)};".encode())
            digest.update(x.detach().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
        hashes[name] = digest.hexdigest()[:32]
    return hashes


# ------------------------------------------------------------------------------------------- what no processor changes: the ops

OP_DTYPES = {  # of parameter, gradient and the two moments
    **{name: (dtype,) * 4 for name, dtype in DTYPES.items()},
    "bfloat16, float32 states": (BF16, BF16, F32, F32),
    "float16, float32 gradient and states": (F16, F32, F32, F32),
    "float64, low states": (F64, F32, BF16, F16),
}
# One number for each of SHAPES. Step 0 leaves a tensor alone; a beta1 below a half takes another form of the mean.
_STEP = (1, 2, 0, 3, 7, 1, 10, 1000, 123456)
_BETA1 = (0.9, 0.3, 0.9, 0.0, 0.9, 0.95, 0.49, 0.9, 0.9)
_BETA2 = (0.999, 0.95, 0.999, 0.99, 0.9, 0.0, 0.999, 0.98, 0.999)
_EPS = (1e-8, 1e-6, 1e-8, 1e-3, 1e-8, 1e-8, 1e-10, 1e-8, 1e-8)
_STEP_SIZE = (1e-3, 0.1, 1.0, 3e-4, 0.5, 1e-2, 1e-3, 2e-3, 7e-3)
_DECAY = (1.0, 0.99, 0.5, 0.999, 0.9, 0.0, 1.01, 0.9999, 0.997)
_GRAD_SCALE = (1.0, -1.0, 1.0, 0.37, 1.0, 2.0**-10, 0.0, -0.11, 0.7)


def vector(values):
    return torch.tensor(values, dtype=F64)


def update_op(dtypes, *, amsgrad=False, rounding_seed=None, scaled=True):
    p, g, m, v = (tensors(dtype, seed, absolute=seed == 4) for seed, dtype in enumerate(dtypes, 1))
    g[3] = g[3].new_empty(0)  # no gradient
    maxima = tensors(dtypes[3], 5, absolute=True) if amsgrad else None
    ops.adamw_update_(
        p, g, m, v, vector(_STEP_SIZE), vector(_DECAY), step=vector(_STEP), betas=(vector(_BETA1), vector(_BETA2)),
        eps=vector(_EPS), max_exp_avg_sqs=maxima, grad_scale=vector(_GRAD_SCALE) if scaled else None,
        rounding_seed=rounding_seed, backend="cpp",
    )  # fmt: skip
    return {"params": p, "exp_avg": m, "exp_avg_sq": v, **({"max_exp_avg_sq": maxima} if amsgrad else {})}


def stats_op(dtypes):
    p, g, m, v = (tensors(dtype, seed, absolute=seed == 4) for seed, dtype in enumerate(dtypes, 1))
    g[3] = g[3].new_empty(0)  # no gradient
    stats = functools.partial(ops.tensor_stats, g, m, backend="cpp")
    return {
        "of gradient and momentum": [stats(), stats(dtype=F64)],
        "of all": [stats(p, v, dtype=F64), stats(p), stats(None, v)],
        "counts": [stats(p, v, count_nonzero=True), stats(count_nonzero=True, dtype=F64)],
        "dot products": [ops.tensor_dots(p, v, dtype=F64, backend="cpp")],
    }


def op_cases():
    cases = {}
    for name, dtypes in OP_DTYPES.items():
        cases[f"tensor_stats: {name}"] = functools.partial(stats_op, dtypes)
        cases[f"adamw_update_: {name}"] = functools.partial(update_op, dtypes, scaled=False)
        cases[f"adamw_update_: {name}, amsgrad, grad_scale"] = functools.partial(update_op, dtypes, amsgrad=True)
        if not set(dtypes).isdisjoint((BF16, F16)):
            options = {"amsgrad": True, "rounding_seed": 0x123456789ABCDEF}
            cases[f"adamw_update_: {name}, amsgrad, grad_scale, rounded by chance"] = functools.partial(
                update_op, dtypes, **options
            )
    return cases


# ------------------------------------------------------------------------------------------ what no processor changes: AdamW runs


def state_parts(opt):
    """Everything in ``opt.state``, by name."""
    params = [p for group in opt.param_groups for p in group["params"]]
    states = [opt.state.get(p, {}) for p in params]
    keys = sorted({key for state in states for key in state})
    return {"params": params, **{key: [torch.as_tensor(state[key]) for state in states if key in state] for key in keys}}


def adamw_run(dtype, *, missing=False, overflow=False, scaler=False, **options):
    """Thirty steps with both ranges 0 over tensors of all kinds, in two groups with hyper-parameters of their own.

    ``missing``: some steps find no gradient for two of the parameters. ``overflow``: two steps find an infinity in one.
    """
    params = [nn.Parameter(x) for x in tensors(dtype, 9)]
    rest = {"lr": 3e-3, "betas": (0.3, 0.95), "eps": 1e-6, "weight_decay": 0.2}
    groups = [{"params": params[:5]}, {"params": params[5:], **rest}]
    opt = MetaAdamW(groups, lr=1e-2, weight_decay=0.1, grouping="param_groups", backend="cpp", **OFF, **options)
    grad_scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4, growth_interval=10) if scaler else None
    read = []
    for step in range(1, STEPS + 1):
        if step == 11:
            for group in opt.param_groups:
                group["lr"] *= 0.5
        factor = float(grad_scaler.scale(torch.ones(()))) if grad_scaler else 1.0  # a power of two
        for t, (p, g) in enumerate(zip(params, gradients_of(step), strict=True)):
            # The gradient of a parameter with gaps has none.
            p.grad = (g * factor).to(dtype) if t == WITH_GAPS else placed((g * factor).to(dtype), t + step % 2)
        if overflow and step in (4, 17):
            params[3].grad[step] = torch.inf
        if missing and step % 5 in (0, 3):
            params[2].grad = params[7].grad = None
        if grad_scaler:
            grad_scaler.step(opt)
            grad_scaler.update()
        else:
            opt.step()
        read += [opt.statistics.clone(), opt.grad_norm.clone()]
    return {**state_parts(opt), "statistics and norms": read, "lagged statistics": opt.lagged_statistics()}


ADAMW_RUNS = {
    "plain": {},
    "amsgrad": {"amsgrad": True},
    "maximize": {"maximize": True},
    "max_grad_norm": {"max_grad_norm": 0.5},
    "lagged": {"statistics": "lagged"},
    "lagged, max_grad_norm": {"statistics": "lagged", "max_grad_norm": 0.5},
    "missing gradients": {"missing": True},
    "lagged, missing gradients": {"statistics": "lagged", "missing": True},
    "amsgrad, maximize, max_grad_norm, lagged, missing gradients": {
        "amsgrad": True, "maximize": True, "max_grad_norm": 0.5, "statistics": "lagged", "missing": True
    },
}  # fmt: skip
LOW_RUNS = {
    "stochastic_rounding": {"stochastic_rounding": True, "seed": 5},
    "stochastic_rounding, amsgrad, lagged": {
        "stochastic_rounding": True, "seed": 2**63 + 7, "amsgrad": True, "statistics": "lagged"
    },
    "master_weights": {"master_weights": True},
    "master_weights, amsgrad, max_grad_norm, lagged": {
        "master_weights": True, "amsgrad": True, "max_grad_norm": 0.5, "statistics": "lagged"
    },
    "float32 states": {"state_dtype": F32},
    "float32 states, stochastic_rounding, maximize": {"state_dtype": F32, "stochastic_rounding": True, "maximize": True},
}  # fmt: skip
FLOAT32_RUNS = {
    "released": {"variant": "released"},
    "enhanced features": {"features": "enhanced"},
    "enhanced features, lagged": {"features": "enhanced", "statistics": "lagged"},
    "bfloat16 states, stochastic_rounding": {"state_dtype": BF16, "stochastic_rounding": True, "seed": 3},
    "skip_nonfinite, overflows": {"skip_nonfinite": True, "overflow": True},
    "skip_nonfinite, lagged, overflows": {"skip_nonfinite": True, "statistics": "lagged", "overflow": True},
    "GradScaler, overflows": {"scaler": True, "overflow": True},
    "GradScaler, max_grad_norm, lagged, overflows": {
        "scaler": True, "max_grad_norm": 0.5, "statistics": "lagged", "overflow": True
    },
}  # fmt: skip


def run_cases():
    cases = {}
    for name, dtype in DTYPES.items():
        runs = {**ADAMW_RUNS, **(LOW_RUNS if name in LOW else {}), **(FLOAT32_RUNS if name == "float32" else {})}
        cases |= {f"{STEPS} steps: {name}, {run}": functools.partial(adamw_run, dtype, **options) for run, options in runs.items()}
    return cases


PORTABLE = {**op_cases(), **run_cases()}  # name of a case: a function that returns parts, each some tensors

# --------------------------------------------------------------------------------- what one processor does: encoder, meta-updates


class Net(nn.Module):
    """Names with layer indices, a norm, a bias: several fine-grained groups."""

    def __init__(self, inputs=6, width=8, depth=3, dtype=F32):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(inputs if i == 0 else width, width) for i in range(depth)])
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, 2)
        for i, p in enumerate(self.parameters()):
            p.data = numbers(p.shape, 20_000 + i).to(dtype)

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.out(self.norm(x))


def batch(model, seed):
    p = model.layers[0].weight
    return numbers((5, p.shape[1]), 30_000 + seed).to(p.dtype), numbers((5, 2), 40_000 + seed).to(p.dtype)


def mean_squared(model, data):
    return (model(data[0]) - data[1]).square().mean()


def set_gradients(model, step, nonfinite=False):
    for i, p in enumerate(model.parameters()):
        p.grad = numbers(p.shape, 50_000 + 100 * step + i).to(p.dtype) if p.requires_grad else None
    if nonfinite:
        model.layers[0].weight.grad[0, 0] = torch.nan


def read_parts(opt):
    shown = ("lr_scale", "wd_scale", "flatness_weight", "alignment_weight", "features", "statistics", "grad_norm")
    return {name: getattr(opt, name) for name in shown}


def optimizer_for(model, *, named=True, **options):
    options = {"lr": 1e-2, "weight_decay": 0.1, "head_init": "xavier", "backend": "cpp", **options}
    return MetaAdamW(model.named_parameters() if named else model.parameters(), **({"model": model} if named else {}), **options)


def encoder_run(*, dtype=F32, double=False, nonfinite=False, frozen=False, **options):
    """Twenty steps with fixed gradients and a head that starts at random, so that scales differ from group to group."""
    model = Net(dtype=dtype)
    opt = optimizer_for(model, **options)
    if double:
        opt.encoder.double()
    model.norm.requires_grad_(not frozen)
    read = []
    for step in range(1, 21):
        set_gradients(model, step, nonfinite and step in (3, 12))
        opt.step()
        read += read_parts(opt).values()
    return {**state_parts(opt), **read_parts(opt), "all that was read": read, "encoder": list(opt.encoder.state_dict().values())}


ENCODER_RUNS = {
    "exact": {},
    "lagged": {"statistics": "lagged"},
    "max_grad_norm": {"max_grad_norm": 0.3},
    "lagged, max_grad_norm": {"statistics": "lagged", "max_grad_norm": 0.3},
    "amsgrad, maximize": {"amsgrad": True, "maximize": True},
    "released": {"variant": "released"},
    "param_groups": {"named": False},
    "fine_grained, total_steps": {"grouping": "fine_grained", "total_steps": 20},
    "lagged, frozen parameters": {"statistics": "lagged", "frozen": True},
    "basic_plus, gating": {"features": FeatureConfig("basic_plus", gating=True)},
    "enhanced": {"features": "enhanced"},
    "enhanced, lagged": {"features": "enhanced", "statistics": "lagged"},
    "norm_basic": {"features": "norm_basic"},
    "norm_basic_plus, no v_norm": {"features": FeatureConfig("norm_basic_plus", v_norm=False), "encoder": EncoderConfig(3, 3, 16)},
    "ranges 1.5 and 0.5": {"lr_scale_range": 1.5, "wd_scale_range": 0.5},
    "float64": {"dtype": F64},
    "float64, strong decay": {"dtype": F64, "lr": 0.9, "weight_decay": 0.8},  # the last bits of the decay are seen beside 1
    "float64 encoder": {"double": True},
    "bfloat16, master_weights": {"dtype": BF16, "master_weights": True},
    "float16, stochastic_rounding": {"dtype": F16, "stochastic_rounding": True},
    "non-finite gradients": {"nonfinite": True},
    "non-finite gradients, skip_nonfinite": {"nonfinite": True, "skip_nonfinite": True},
}


def report_parts(reports):
    names = ("total", "gradient_alignment", "loss_decrease", "generalization_gap", "log_vars", "lr_scale", "wd_scale")
    found = {name: [getattr(report, name) for report in reports] for name in names}
    return {f"report.{name}": [x for x in values if x is not None] for name, values in found.items()}


def learner_for(opt, model, options):
    return MetaLearner(opt, model, mean_squared, **options)


def meta_run(optimizer_options=(), gap_batch=False, **options):
    """Three meta-updates, three training steps before each."""
    model = Net()
    opt = optimizer_for(model, **dict(optimizer_options))
    meta = learner_for(opt, model, options)
    reports = []
    for update in range(3):
        for step in range(3):
            opt.zero_grad()
            mean_squared(model, batch(model, 3 * update + step)).backward()
            opt.step()
        batches = [batch(model, 100 + 4 * update + i) for i in range(4 if gap_batch else 3)]
        reports.append(meta.update(*batches))
    learner = meta.state_dict()["meta_optimizer"]["state"]
    return {
        **state_parts(opt),
        **report_parts(reports),
        "encoder": list(opt.encoder.state_dict().values()),
        "log_vars": meta.log_vars,
        "meta-optimizer": [
            torch.as_tensor(state[key]) for state in learner.values() for key in sorted(state) if state[key] is not None
        ],
    }


META_RUNS = {
    "combined": {},
    "combined, finite differences": {"hvp": "finite_difference"},
    "gradient, exact": {"objective": "gradient", "hvp": "exact"},
    "gradient, finite differences": {"objective": "gradient", "hvp": "finite_difference"},
    "loss_decrease": {"objective": "loss_decrease"},
    "gen_gap": {"objective": "gen_gap"},
    "gen_gap at the look-ahead": {"objective": "gen_gap", "gap_at": "lookahead"},
    "combined, gap at the look-ahead, gap_batch": {"gap_at": "lookahead", "gap_batch": True},
    "fixed": {"balance": "fixed"},
    "sum, no regularisers": {"balance": "sum", "encoder_decay": 0.0, "gate_l1": 0.0},
    "priorities, a classification term": {
        "priorities": (2.0, 5.0, 1.0), "term_kinds": ("regression", "classification", "regression")
    },
    "SGD": {"make_optimizer": torch.optim.SGD, "lr": 1e-2},
    "released, gating": {
        "optimizer_options": {"variant": "released", "features": FeatureConfig(gating=True)}, "make_optimizer": torch.optim.SGD
    },
    "gating, enhanced": {"optimizer_options": {"features": FeatureConfig("enhanced", gating=True)}},
    "norm_basic": {"optimizer_options": {"features": "norm_basic"}},
    "max_grad_norm, amsgrad": {"optimizer_options": {"max_grad_norm": 0.3, "amsgrad": True}},
    "maximize": {"optimizer_options": {"maximize": True}},
    "lagged": {"optimizer_options": {"statistics": "lagged"}},
    "param_groups": {"optimizer_options": {"named": False}},
}  # fmt: skip

LOCAL = {
    **{f"encoder: {name}": functools.partial(encoder_run, **options) for name, options in ENCODER_RUNS.items()},
    **{f"meta-update: {name}": functools.partial(meta_run, **options) for name, options in META_RUNS.items()},
}

# --------------------------------------------------------------------------------------------------------------- checkpoints

TINY = {"encoder": EncoderConfig(1, 1, 2)}
CHECKPOINT_KINDS = {  # options of the optimizer and of the model
    "plain": ({"named": False}, {}),
    "fine_grained": ({"grouping": "fine_grained"}, {}),
    "amsgrad": ({"amsgrad": True}, {}),
    "lagged": ({"statistics": "lagged"}, {}),
    "master_weights": ({"master_weights": True}, {"dtype": BF16}),
    "stochastic_rounding": ({"stochastic_rounding": True, "seed": 11}, {"dtype": BF16}),
    "frozen": ({}, {}),
    "meta": ({"features": FeatureConfig(gating=True)}, {"dtype": F64}),  # differences of losses keep their digits
}
SAVED_AT, GOES_ON = 5, 5


def checkpoint_parts(kind, **ranges):
    """A model of a few parameters, its optimizer and, for ``meta``, the learner."""
    options, of_model = CHECKPOINT_KINDS[kind]
    model = Net(inputs=2, width=3, depth=1, **of_model)
    opt = optimizer_for(model, **TINY, **options, **ranges)
    return model, opt, learner_for(opt, model, {}) if kind == "meta" else None


def write_checkpoint(kind):
    model, opt, meta = checkpoint_parts(kind)
    for step in range(1, SAVED_AT + 1):
        if kind == "frozen" and step == 3:
            model.norm.requires_grad_(False)
        set_gradients(model, step)
        opt.step()
    if meta is not None:
        meta.update(*(batch(model, i) for i in range(3)))
    checkpoint = {"model": model.state_dict(), "optimizer": opt.state_dict()}
    torch.save({**checkpoint, **({"meta": meta.state_dict()} if meta else {})}, CHECKPOINTS / f"{kind}.pt")


def continued(kind, **ranges):
    """What five more steps after the stored checkpoint give, and a meta-update if there is a learner and an encoder to be seen."""
    checkpoint = torch.load(CHECKPOINTS / f"{kind}.pt", weights_only=True)
    model, opt, meta = checkpoint_parts(kind, **ranges)
    model.load_state_dict(checkpoint["model"])
    model.norm.requires_grad_(kind != "frozen")
    opt.load_state_dict(checkpoint["optimizer"])
    if meta is not None:
        meta.load_state_dict(checkpoint["meta"])
    for step in range(SAVED_AT + 1, SAVED_AT + GOES_ON + 1):
        set_gradients(model, step)
        opt.step()
    parts = state_parts(opt)
    if ranges:
        return parts
    scales = {"lr_scale": opt.lr_scale, "wd_scale": opt.wd_scale}
    if meta is None:
        return {**parts, **scales}
    report = meta.update(*(batch(model, 10 + i) for i in range(3)))
    return {**parts, **scales, "total": report.total, "log_vars": meta.log_vars, "head": opt.encoder.head.weight}


def values(parts):
    """The numbers of each part, one list."""
    lists = {name: part if isinstance(part, (list, tuple)) else [part] for name, part in parts.items()}
    return {name: [y for x in xs for y in x.detach().double().flatten().tolist()] for name, xs in lists.items()}


# ------------------------------------------------------------------------------------------------------------------ commands


def golden():
    return json.loads(GOLDEN.read_text())


def write():
    """Writes bits.json, a case a line, and the checkpoints that are missing."""
    CHECKPOINTS.mkdir(exist_ok=True)
    for kind in CHECKPOINT_KINDS:
        if not (CHECKPOINTS / f"{kind}.pt").exists():
            write_checkpoint(kind)
    sections = {
        "portable": {name: hashed(case()) for name, case in PORTABLE.items()},
        "continued, ranges 0": {kind: hashed(continued(kind, **OFF)) for kind in CHECKPOINT_KINDS},
        "continued, values": {kind: values(continued(kind)) for kind in CHECKPOINT_KINDS},
    }
    lines = []
    for section, cases in sections.items():
        rows = ",\n".join(f"  {json.dumps(name)}: {json.dumps(case)}" for name, case in cases.items())
        lines.append(f"{json.dumps(section)}: {{\n{rows}\n}}")
    GOLDEN.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def dump(path, tree):
    """Writes the hashes of all cases, made by the code of ``tree``, for :func:`against`."""
    hashes = {}
    for name, case in {**PORTABLE, **LOCAL}.items():
        try:
            hashes[name] = hashed(case())
        except Exception as error:  # an option that this commit does not know is a difference too, and no reason to stop
            hashes[name] = {"error": f"{type(error).__name__}: {error}"}
    tree = Path(tree).resolve()
    for name, module in sys.modules.items():  # an installed copy would be compared with itself
        if name.split(".")[0] == metaadamw_fast.__name__ and not Path(module.__file__ or tree).resolve().is_relative_to(tree):
            raise SystemExit(f"{name} was imported from {module.__file__}, not from {tree}")
    Path(path).write_text(json.dumps(hashes))


@contextlib.contextmanager
def built_tree(commit):
    """A git worktree of ``commit`` with its extension, built by this Python; removed at the end."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", str(tree), commit], check=True)
        try:
            link = tree / "metaadamw_fast" / "kernels"
            if (tree / "kernels").is_dir() and not link.exists():  # where an installation puts it
                link.symlink_to(tree / "kernels")
            command = [sys.executable, "setup.py", "build_ext", "--inplace"]
            built = subprocess.run(command, cwd=tree, env={**os.environ, "METAADAMW_CUDA": "0"}, capture_output=True, text=True)
            if built.returncode:
                raise SystemExit(f"{commit} does not build:\n{built.stdout[-2000:]}{built.stderr[-4000:]}")
            yield tree
        finally:
            subprocess.run([*git, "remove", "--force", str(tree)], check=True)


def hashes_of(tree):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "hashes.json"
        command = [sys.executable, str(Path(__file__).resolve()), "--dump", str(path), "--tree", str(tree)]
        subprocess.run(command, cwd=tree, env={**os.environ, "PYTHONPATH": str(tree)}, check=True)
        return json.loads(path.read_text())


def compared(here, there):
    """A line for each case, and whether all are the same."""
    lines, same = [], True
    for name in {**there, **here}:
        parts = [here.get(name, {}), there.get(name, {})]
        differing = [part for part in {**parts[1], **parts[0]} if parts[0].get(part) != parts[1].get(part)]
        # The same error in both trees compares nothing.
        differing += ["error"] * any("error" in part for part in parts if "error" not in differing)
        errors = [part["error"] for part in parts if "error" in part]
        same &= not differing
        lines.append(f"{'differs' if differing else 'same   '}  {name}{': ' * bool(differing)}{', '.join([*differing, *errors])}")
    return lines, same


def against(commit):
    """Compares this tree with ``commit``; returns the exit status."""
    with built_tree(commit) as tree:
        lines, same = compared(hashes_of(ROOT), hashes_of(tree))
    print("\n".join(lines))
    print(f"{sum(line.startswith('same') for line in lines)} of {len(lines)} cases are the same as in {commit}")
    return 0 if same else 1


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m tests.bits", description=__doc__.split("\n")[0])
    choice = parser.add_mutually_exclusive_group(required=True)
    choice.add_argument("--write", action="store_true", help="write bits.json and the checkpoints that are missing")
    choice.add_argument("--against", metavar="COMMIT", help="compare all cases with this commit, built in a worktree")
    choice.add_argument("--dump", metavar="FILE", help="write the hashes of all cases (for --against)")
    parser.add_argument("--tree", default=str(ROOT), help="with --dump: where metaadamw_fast must have come from")
    options = parser.parse_args(arguments)
    if options.against:
        return against(options.against)
    if options.dump:
        dump(options.dump, options.tree)
    else:
        write()
    return 0


if __name__ == "__main__":
    sys.exit(main())
