"""Plain attributes of modules after a meta-update: what forward passes keep there is what it was, not that of a look-ahead."""

from collections import OrderedDict, defaultdict, deque

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from metaadamw_fast import MetaAdamW, MetaLearner

from .cases import same_bits
from .models import batch, conv_net, make, mse, noise, one_thread, perceptron, seeded, train  # noqa: F401

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # weight_norm


def taken_down(x):
    """Objects by their identity, tensors and containers also by what is in them."""
    if isinstance(x, torch.Tensor):
        return id(x), x.detach().clone() if x.layout is torch.strided else x.detach().to_dense()
    if isinstance(x, dict):
        return id(x), [(key, taken_down(value)) for key, value in x.items()]
    if isinstance(x, (list, tuple, set, deque)):
        return id(x), list(map(taken_down, x))
    return id(x), None


def attributes(model):
    return [(name, taken_down(x)) for module in model.modules() for name, x in vars(module).items()]


def unchanged(x, y):
    if isinstance(x, torch.Tensor):
        return same_bits(x, y)
    if isinstance(x, (list, tuple)):
        return len(x) == len(y) and all(map(unchanged, x, y))
    return x == y


# ------------------------------------------------------------------------------------------------------------ derived weights


def every_layer(transform):
    def transformed(**options):
        model = perceptron(**options)
        for layer in (*model.layers, model.out):
            transform(layer)
        return model

    return transformed


def pruned_and_normed(layer):
    weight_norm(spectral_norm(layer, "weight"), "bias", dim=None)
    prune.random_unstructured(layer, "weight_orig", 0.3)


class NormedLstm(nn.Module):
    """A recurrent layer lists its weights besides, the derived ones too."""

    shape = (4, 5, 6)

    def __init__(self):
        super().__init__()
        self.rnn = weight_norm(weight_norm(nn.LSTM(6, 5, batch_first=True), "weight_hh_l0"), "weight_ih_l0")
        self.out = nn.Linear(5, 3)

    def forward(self, x):
        return self.out(self.rnn(x)[0].mean(1))


DERIVED = {
    "weight_norm": every_layer(weight_norm),
    "spectral_norm": every_layer(spectral_norm),
    "prune": every_layer(lambda layer: prune.l1_unstructured(layer, "weight", 0.4)),
    "prune, twice and two tensors": every_layer(
        lambda layer: [prune.random_unstructured(layer, name, 0.2) for name in ("weight", "bias", "weight")]
    ),
    "several in a layer": every_layer(pruned_and_normed),
    "lstm": seeded(NormedLstm),
    "parametrized": every_layer(lambda layer: parametrizations.spectral_norm(parametrizations.weight_norm(layer))),
}


@pytest.mark.parametrize("hvp", ["exact", "finite_difference"])
@pytest.mark.parametrize("with_graph", [True, False])
@pytest.mark.parametrize("kind", DERIVED)
def test_a_derived_weight_is_that_of_before(kind, with_graph, hvp):
    model = DERIVED[kind]()
    opt = make(model)
    train(model, opt, 2)
    with torch.set_grad_enabled(with_graph):
        loss = mse(model, batch(model, 3))
    before = attributes(model)
    if with_graph:  # a backward pass that is still to come
        expected = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    report = MetaLearner(opt, model, mse, hvp=hvp).update(*(batch(model, 50 + i) for i in range(3)))
    assert report.loss_decrease != 0  # the look-ahead was somewhere else
    assert unchanged(attributes(model), before)
    if with_graph:
        assert all(map(torch.equal, torch.autograd.grad(loss, list(model.parameters())), expected))


# ------------------------------------------------------------------------------------------- whatever else a forward pass keeps


class Cell(nn.Module):
    """One layer; ``keep`` does with it what it likes before every forward pass."""

    shape = (4, 6)

    def __init__(self, keep, **plain):
        super().__init__()
        self.layer = nn.Linear(6, 3)
        self.keep = keep
        for name, x in plain.items():
            setattr(self, name, x)

    def forward(self, x):
        y = self.layer(x)
        self.keep(self, y)
        return y


def lazily(cell, y):
    if not hasattr(cell, "table"):
        cell.table = cell.layer.weight.detach().clone()


def into(name, change):
    return lambda cell, y: change(getattr(cell, name), cell.layer.weight.detach(), y)


def weight_into_table(cell, y):
    cell.table.copy_(cell.layer.weight.detach())


def refill(cell, y):
    cell.tables.clear()
    cell.tables["w"] = cell.layer.weight.detach().clone()


def swap(cell, y):
    cell.table.data = cell.layer.weight.detach().clone()


def grow(cell, y):
    cell.table.data = torch.cat([cell.table, cell.layer.weight.detach()])


def drop(cell, y):
    if "table" in vars(cell):
        del cell.table


KEPT = {  # what a forward pass does, and what there is before
    "replaces": (lambda cell, y: setattr(cell, "table", y), {"table": torch.ones(2)}),
    "replaces None": (lambda cell, y: setattr(cell, "table", y.detach()), {"table": None}),
    "makes": (lazily, {}),
    "deletes": (drop, {"table": torch.ones(2)}),
    "writes": (weight_into_table, {"table": torch.zeros(3, 6)}),
    "writes beside NaN": (
        into("table", lambda table, w, y: table[:1].copy_(w[:1])),
        {"table": torch.full((3, 6), torch.nan)},
    ),
    "writes a signed zero": (into("table", lambda table, w, y: table.neg_()), {"table": torch.zeros(3)}),
    "writes integers": (into("table", lambda table, w, y: table.add_(1)), {"table": torch.zeros(3, dtype=torch.long)}),
    "writes half precision": (
        weight_into_table,
        {"table": torch.zeros(3, 6, dtype=torch.bfloat16)},
    ),
    "writes complex numbers": (
        weight_into_table,
        {"table": torch.zeros(3, 6, dtype=torch.complex64)},
    ),
    "replaces the data": (swap, {"table": torch.zeros(3, 6)}),
    "replaces the data by more": (grow, {"table": torch.zeros(3, 6)}),
    "replaces a sparse one": (lambda cell, y: setattr(cell, "table", y.detach().to_sparse()), {"table": torch.eye(3).to_sparse()}),
    "counts": (lambda cell, y: setattr(cell, "table", cell.table + 1), {"table": 5}),
    "appends": (into("tables", lambda tables, w, y: tables.append(y)), {"tables": [torch.ones(2)]}),
    "writes in a list": (into("tables", lambda tables, w, y: tables[0].copy_(w)), {"tables": [torch.zeros(3, 6), "x"]}),
    "writes in a tuple": (into("tables", lambda tables, w, y: tables[0][0].copy_(w)), {"tables": ([torch.zeros(3, 6)], 1)}),
    "enters": (into("tables", lambda tables, w, y: tables.update(w=w.clone())), {"tables": {"v": 1}}),
    "enters in order": (into("tables", lambda tables, w, y: tables.move_to_end("v")), {"tables": OrderedDict(v=1, w=2)}),
    "enters in a dict of lists": (
        into("tables", lambda tables, w, y: tables[len(tables)].append(y)),
        {"tables": defaultdict(list, {0: [1]})},
    ),
    "clears and refills": (refill, {"tables": {"w": torch.zeros(3, 6), "v": 1}}),
    "adds": (into("tables", lambda tables, w, y: tables.add(float(w[0, 0]))), {"tables": {1.0}}),
    "moves along": (into("tables", lambda tables, w, y: tables.append(y)), {"tables": deque([1, 2], maxlen=2)}),
}


@pytest.mark.parametrize("kind", KEPT)
def test_what_a_forward_pass_keeps(kind):
    keep, plain = KEPT[kind]
    with torch.random.fork_rng():
        model = nn.Sequential(nn.Identity(), Cell(keep, **plain))
    model.shape = Cell.shape
    opt = make(model)
    before = attributes(model)
    MetaLearner(opt, model, mse).update(*(batch(model, 50 + i) for i in range(3)))
    assert unchanged(attributes(model), before)
    model(batch(model, 1)[0])
    assert not unchanged(attributes(model), before)  # it does keep something


def test_a_table_and_its_length_belong_together():
    """As rotary embeddings keep them: a buffer, a plain number, a plain tensor."""

    class Rotary(nn.Module):
        shape = (4, 6)

        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 3)
            self.length, self.table = 0, None
            self.register_buffer("frequencies", torch.ones(3))

        def forward(self, x):
            if len(x) > self.length:
                self.length = len(x)
                self.frequencies = torch.full((3,), float(len(x)))
                self.table = torch.arange(len(x))[:, None] * self.frequencies
            return self.layer(x) + self.table[: len(x)]

    model = Rotary()
    opt = make(model)
    x, y = batch(model, 1)
    mse(model, (x[:2], y[:2]))
    before = attributes(model)
    MetaLearner(opt, model, mse).update(*(batch(model, 50 + i) for i in range(3)))
    assert unchanged(attributes(model), before)
    assert model.length == len(model.table) == model.frequencies[0] == 2
    mse(model, (x, y))
    assert model.length == len(model.table) == model.frequencies[0] == 4


# --------------------------------------------------------------------------------------------- forward passes that write parameters


class Words(nn.Module):
    """Every forward pass shortens the rows that it looks up."""

    def __init__(self):
        super().__init__()
        self.words, self.out = nn.Embedding(9, 6, max_norm=0.5), nn.Linear(6, 3)

    def forward(self, x):
        return self.out(self.words(x).mean(1))


class Teacher(nn.Module):
    """Every forward pass moves a teacher towards the student, as in momentum contrast."""

    shape = (4, 6)

    def __init__(self):
        super().__init__()
        self.student, self.teacher = nn.Linear(6, 3), nn.Linear(6, 3).requires_grad_(False)

    def forward(self, x):
        for slow, fast in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
            slow.data = 0.9 * slow.data + 0.1 * fast.data
        return self.student(x) + self.teacher(x)


@pytest.mark.parametrize("whose", ["the optimizer's", "another's"])
def test_an_embedding_that_shortens_its_rows(whose):
    with torch.random.fork_rng():
        model = Words()
    opt = MetaAdamW(model.parameters() if whose == "the optimizer's" else model.out.parameters(), lr=1e-2, head_init="xavier")
    before, address = model.words.weight.detach().clone(), model.words.weight.data_ptr()
    assert (before.norm(dim=1) > 0.5).all()
    batches = [(torch.arange(12).reshape(4, 3).add(i) % 9, torch.ones(4, 3)) for i in range(3)]
    assert MetaLearner(opt, model, mse).update(*batches).total.isfinite()
    assert same_bits(model.words.weight, before)
    assert model.words.weight.data_ptr() == address


def test_a_teacher_that_follows_in_forward_passes():
    with torch.random.fork_rng():
        model = Teacher()
    opt = make(model)
    train(model, opt, 2)
    before = [(p.data_ptr(), p.detach().clone()) for p in model.parameters()]
    MetaLearner(opt, model, mse).update(*(batch(model, 50 + i) for i in range(3)))
    for p, (address, value) in zip(model.parameters(), before, strict=True):
        assert p.data_ptr() == address
        assert same_bits(p, value)


# ----------------------------------------------------------------------------------------------------------- unusual buffers


class Graph(nn.Module):
    """Buffers that can be neither compared nor copied as dense numbers are, beside some that every forward pass writes."""

    shape = (4, 6)

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 3)
        self.register_buffer("edges", torch.eye(4).to_sparse())
        self.register_buffer("nowhere", torch.empty(3, device="meta"))
        self.register_buffer("repeated", torch.ones(1).expand(4))
        self.register_buffer("eighths", torch.zeros(4, dtype=torch.float8_e4m3fn))
        self.register_buffer("complex", torch.full((2,), complex(0, float("nan"))))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x):
        self.calls += 1
        self.eighths.copy_(self.eighths.float() + 1)
        self.complex[0] += 1
        return torch.sparse.mm(self.edges, self.layer(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("build", [Graph, lambda: torch.jit.script(conv_net(batch_norm=True))], ids=["any", "scripted"])
def test_unusual_buffers(build):
    with torch.random.fork_rng():
        model = build()
    shape = getattr(model, "shape", (4, 3, 8, 8))
    opt = MetaAdamW(model.named_parameters(), lr=1e-2, head_init="xavier")
    data = [(noise(shape, i), noise((4, 3), 10 + i)) for i in range(4)]
    mse(model, data[0]).backward()
    opt.step()
    before = [(x, taken_down(x)) for x in model.buffers() if not x.is_meta]
    MetaLearner(opt, model, mse).update(*data[1:])
    assert [id(x) for x in model.buffers() if not x.is_meta] == [id(x) for x, _ in before]
    assert all(unchanged(taken_down(x), kept) for x, kept in before)
    mse(model, data[0])
    assert not all(unchanged(taken_down(x), kept) for x, kept in before)
