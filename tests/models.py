"""Small models with their batches, and features and scales written from the text of docs/algorithm.md in plain float64 torch."""

import functools
import math

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F  # noqa: N812

from .optimizers import META, spec_of


@pytest.fixture(autouse=True)
def one_thread():
    """For the modules that import it: their tensors are too small for two threads, which only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def relative(actual, expected):
    """2-norm of the difference over the 2-norm of the expected tensor."""
    return float((actual.detach().double() - expected.detach().double()).norm() / expected.detach().double().norm())


def seeded(build):
    """Makes a model builder take dtype and seed, and leave the global random state alone."""

    @functools.wraps(build)
    def built(dtype=torch.float32, seed=0, **options):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return build(**options).to(dtype)

    return built


def noise(shape, seed, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# ------------------------------------------------------------------------------------------------------------------- models


class Perceptron(nn.Module):
    """Layers with indices, a norm and an output: six fine-grained groups or more."""

    shape = (8, 6)

    def __init__(self, depth=3, width=12, factor=1.0):
        super().__init__()
        self.factor = factor
        self.layers = nn.ModuleList([nn.Linear(6 if i == 0 else width, width) for i in range(depth)])
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, 3)

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.factor * self.out(self.norm(x))


class ConvNet(nn.Module):
    """Two convolutions; with batch norm also buffers that every evaluation in train mode changes."""

    shape = (4, 3, 8, 8)

    def __init__(self, batch_norm=False):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1, bias=not batch_norm)  # whose gradient would be rounding errors
        self.bn = nn.BatchNorm2d(6) if batch_norm else nn.Identity()
        self.conv2 = nn.Conv2d(6, 4, 3, stride=2, padding=1)
        self.out = nn.Linear(4, 3)

    def forward(self, x):
        return self.out(torch.tanh(self.conv2(torch.tanh(self.bn(self.conv1(x))))).mean((2, 3)))


class Attention(nn.Module):
    """One pre-norm block with scaled_dot_product_attention, GELU and dropout."""

    shape = (4, 5, 6)

    def __init__(self, dropout=0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(6)
        self.attn_in = nn.Linear(6, 18)
        self.attn_out = nn.Linear(6, 6)
        self.mlp = nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.Dropout(dropout), nn.Linear(12, 6))
        self.out = nn.Linear(6, 3)

    def forward(self, x):
        q, k, v = self.attn_in(self.norm1(x)).view(*x.shape[:2], 3, 2, 3).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attn_out(mixed.transpose(1, 2).flatten(2))
        return self.out(x + self.mlp(x)).mean(1)


class Lstm(nn.Module):
    shape = (4, 5, 6)

    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(6, 5, num_layers=2, batch_first=True, bidirectional=True)
        self.out = nn.Linear(10, 3)

    def forward(self, x):
        return self.out(self.rnn(x)[0].mean(1))


class Tied(nn.Module):
    """A weight used twice, a frozen one, and one that the loss does not reach."""

    shape = (8, 6)

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.unused = nn.Linear(6, 6)
        self.out = nn.Linear(6, 3)

    def forward(self, x):
        return self.out(torch.tanh(self.second(torch.tanh(self.frozen(torch.tanh(self.first(x)))))))


perceptron, conv_net, attention, lstm, tied = (seeded(kind) for kind in (Perceptron, ConvNet, Attention, Lstm, Tied))


def batch(model, seed):
    """Inputs and targets in the model's dtype."""
    dtype = next(model.parameters()).dtype
    return noise(model.shape, 2 * seed, dtype), noise((model.shape[0], 3), 2 * seed + 1, dtype)


def mse(model, data):
    return F.mse_loss(model(data[0]), data[1])


def train(model, optimizer, steps, first=0):
    """Ordinary training steps; batches depend on the step's number only."""
    for step in range(first, first + steps):
        optimizer.zero_grad()
        mse(model, batch(model, step)).backward()
        optimizer.step()


def randomise(encoder, seed=1, scale=0.3):
    """Gives the encoder scales that differ from group to group."""
    with torch.no_grad():
        for i, param in enumerate(encoder.parameters()):
            param.add_(noise(param.shape, 1000 * seed + i, param.dtype), alpha=scale)


def make(model, spec=META, **options):
    """An optimizer, MetaAdamW with fine-grained groups and scales that differ from group to group."""
    opt = spec.of_model(model, **{"lr": 3e-3, "weight_decay": 0.1, **options})
    if spec.encodes:
        randomise(opt.encoder)
    return opt


def ids_of(opt):
    """The group of each parameter, in order."""
    ids = {member: number for number, group in enumerate(opt.groups) for member in group.members}
    return [ids[i] for i in range(len(ids))]


def said(report):
    """What a report of a meta-update says, in tensors of its own."""
    return {name: x.detach().clone() if isinstance(x, torch.Tensor) else x for name, x in vars(report).items()}


def same(a, b):
    """Equal nested dicts, lists and numbers, tensors bit for bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def assert_same_bits(a, b):
    """Two (model, optimizer) pairs have equal parameters, states and readings."""
    (model_a, opt_a), (model_b, opt_b) = a, b
    for p, q in zip(model_a.parameters(), model_b.parameters(), strict=True):
        assert torch.equal(p, q)
        assert opt_a.state[p].keys() == opt_b.state[q].keys()
        assert all(torch.equal(x, opt_b.state[q][name]) for name, x in opt_a.state[p].items())
    for name in spec_of(opt_a).shown:
        assert torch.equal(getattr(opt_a, name), getattr(opt_b, name)), name
    for name, value in opt_a.encoder.state_dict().items() if spec_of(opt_a).encodes else ():
        assert torch.equal(value, opt_b.encoder.state_dict()[name]), name


# -------------------------------------------------------------------------------------------- docs/algorithm.md, section 2 and 3


def cosine(x, y):
    """Of two tensors or groups of tensors, given flat; each norm counts as 1e-8 at least, and a zero gives 0."""
    return (x @ y) / (x.norm().clamp(min=1e-8) * y.norm().clamp(min=1e-8))


def expected_features(version, rows, group_of, t, *, v_norm=True, time_step=True, max_layer=0, dim):
    """[G, dim] before gating and standardisation, group embeddings 0.

    rows: per tensor (gradient, momentum, second moment, parameter, is bias, layer index or None).
    """
    out = torch.zeros(max(group_of) + 1, dim, dtype=torch.float64)
    for group in range(out.shape[0]):
        mine = [row for row, number in zip(rows, group_of, strict=True) if number == group]
        g, m, v, p = ([row[i].double().flatten() for row in mine] for i in range(4))
        norms = [torch.stack([x.norm() for x in xs]) for xs in (g, m, p, v)]
        cosines = torch.stack([cosine(a, b) for a, b in zip(g, m, strict=True)])
        if version == "enhanced":
            zeros = [torch.tensor([(x == 0).double().mean() if x.numel() else 0.0 for x in xs]) for xs in (g, m)]
            columns = [f(x) for x in norms[:2] for f in (torch.mean, population_variance)]
            columns += [zeros[0].mean(), zeros[1].mean()]
            columns.append(sum(math.log(x.numel() + 1) for x in p) / len(p))
            columns.append(sum(row[4] for row in mine) / len(mine))
            columns.append(sum((row[5] or 0) / max(max_layer, 1) for row in mine) / len(mine))
        else:
            values = [*norms[:3], cosines] + [norms[3]] * v_norm
            columns = [x.mean() for x in values]
            if version.endswith("plus"):
                columns += [population_variance(x).sqrt() for x in values]
        columns += [t] * time_step
        out[group, : len(columns)] = torch.tensor(columns, dtype=torch.float64)
    return out


def population_variance(x):
    return ((x - x.mean()) ** 2).mean()


# ------------------------------------------------------------------------------------------------ docs/algorithm.md, section 4


def expected_scales(encoder, features, *, heads, standardised=0, ranges=(1.0, 1.0)):
    """[4, G] by torch.nn.TransformerEncoder with the parameters of ``encoder``, differentiable in them; all groups finite."""
    named = dict(encoder.named_parameters())
    x = features
    if "group_embeddings.0" in named:
        embeddings = torch.stack([named[f"group_embeddings.{i}"] for i in range(len(x))])
        x = torch.cat([x[:, : -embeddings.shape[1]], embeddings], 1)
    if "feature_gates" in named:
        x = x * torch.sigmoid(named["feature_gates"])
    if standardised:
        y = x[:, :standardised]
        std = y.std(0) if len(y) > 1 else y.new_zeros(standardised)
        x = torch.cat([(y - y.mean(0)) / (std + 1e-8), x[:, standardised:]], 1)
    x = torch_encoder_output(named, x, heads)
    a, b, c, d = torch.sigmoid(x @ named["head.weight"].T + named["head.bias"]).T
    return torch.stack([1 + ranges[0] * (a - 0.5), 1 + ranges[1] * (b - 0.5), c, d])


def torch_encoder_output(named, x, heads, masked=None):
    """nn.TransformerEncoder(norm_first, dropout 0) over the rows of x as one sequence, with the parameters ``encoder.*``."""
    own = {name.removeprefix("encoder."): p for name, p in named.items() if name.startswith("encoder.")}
    if not own:
        return x
    layers = 1 + max(int(name.split(".")[1]) for name in own)
    encoder = torch_encoder(x.shape[1], heads, len(own["layers.0.linear1.bias"]), layers, x.dtype)
    mask = None if masked is None else masked[None]
    return functional_call(encoder, own, (x[None],), {"src_key_padding_mask": mask})[0]


@seeded
def torch_encoder_module(dim, heads, hidden, layers):
    layer = nn.TransformerEncoderLayer(dim, heads, hidden, dropout=0.0, batch_first=True, norm_first=True)
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)


@functools.lru_cache
def torch_encoder(dim, heads, hidden, layers, dtype):
    return torch_encoder_module(dtype, dim=dim, heads=heads, hidden=hidden, layers=layers)
