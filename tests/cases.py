"""Tensors for the tests: dtypes, sizes, memory layouts, what must not change around an operand, what must not change at all."""

from __future__ import annotations

import copy
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import nn

from metaadamw_fast import ops, reference

from .optimizers import META, spec_of
from .tolerances import stored, sum_bound, update_bounds

BLOCK, CHUNK, CHUNK_ON_GPU, CHUNK_ON_TRITON = 1024, 32768, 8192, 16384  # elements: csrc/chunks.h, kernels/elements.py
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16

DTYPES = {  # of the parameter, the gradient, the first and the second moment
    "fp32": (F32, F32, F32, F32),
    "fp64": (F64, F64, F64, F64),
    "bf16": (BF16, BF16, BF16, BF16),
    "fp16": (F16, F16, F16, F16),
    "bf16, fp32 states": (BF16, BF16, F32, F32),
    "bf16, fp32 grad and states": (BF16, F32, F32, F32),
    "fp16, fp32 states": (F16, F16, F32, F32),
    "fp32, low states": (F32, F32, BF16, F16),
    "fp64, fp32 states": (F64, F64, F32, F32),
    "fp64, low states": (F64, F32, BF16, F16),
}
LOW = ["bf16", "fp16", "bf16, fp32 states", "fp16, fp32 states", "fp32, low states"]

_EDGES = [0, 1, 2, 3, 15, 16, 17, 31, 33]
_BLOCKS = [BLOCK - 1, BLOCK, BLOCK + 1, BLOCK + 2, BLOCK + 3, 5 * BLOCK + 1, 5 * BLOCK + 2, 5 * BLOCK + 3]
_CHUNKS = [n + more for n in (CHUNK_ON_GPU, CHUNK) for more in (-1, 0, 1, 3)] + [2 * CHUNK + 5]
SIZES = [(), *((n,) for n in _EDGES + _BLOCKS + _CHUNKS)]
# A GPU's kernels know nothing of the CPU's chunk; where they are interpreted or emulated, elements are dear.
SIZES_OF_A_GPU = [*(x for x in SIZES if sum(x) < CHUNK - 1), (CHUNK_ON_TRITON,), (CHUNK_ON_TRITON + CHUNK_ON_GPU + 5,)]
SHAPES = [(7,), (1, 9, 1), (37, 53), (3, 5, 7, 4), (2, 3, 4, 5, 6), (181, 183)]  # the last one is longer than a chunk

LAYOUTS = {  # see place()
    "contiguous": {},
    "offset": {"offset": 1},  # float32 then lies on 4 bytes only
    "step": {"step": 3},
    "rows of a wider tensor": {"gap": 5},
    "transposed": {"order": (4, 3, 2, 1, 0)},
    "channels_last": {"order": (0, 2, 3, 4, 1)},
    "permuted": {"order": (3, 0, 4, 1, 2)},
    "permuted, step, gap, offset": {"order": (3, 0, 4, 1, 2), "step": 2, "gap": 3, "offset": 5},
    "expanded": {"expand": True},
}
_CANARY = 42.0


def place(values, order=(0, 1, 2, 3, 4), step=1, gap=0, offset=0, expand=False):
    """The same values elsewhere in memory, amid canaries.

    ``order`` lists the dimensions from the outermost to the innermost in memory (those that the tensor lacks are skipped), ``step``
    is the stride of the innermost, ``gap`` the elements after each of its rows. ``expand`` repeats the first row instead.
    """
    if expand:
        return place(values[:1]).expand(values.shape) if values.dim() else place(values)
    strides, pitch = [0] * values.dim(), step
    for position, d in enumerate(reversed([d for d in order if d < values.dim()])):
        strides[d] = pitch
        pitch = pitch * max(values.shape[d], 1) + (gap if position == 0 else 0)
    memory = torch.full((offset + pitch + 3,), _CANARY, dtype=values.dtype)
    return memory.as_strided(values.shape, strides, offset).copy_(values)


def memory_of(x):
    """Everything that lies in the storage of a tensor, as one-dimensional."""
    return torch.empty(0, dtype=x.dtype, device=x.device).set_(x.untyped_storage())


def clone(x):
    """A copy with the same strides, offset and surroundings."""
    return torch.empty(0, dtype=x.dtype, device=x.device).set_(x.untyped_storage().clone(), x.storage_offset(), x.shape, x.stride())


def same_bits(x, y):
    """Equal shape, dtype and bits: a NaN equals itself, 0 and -0 differ."""
    integer = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}[x.element_size()]
    return x.dtype == y.dtype and torch.equal(x.detach().contiguous().view(integer), y.detach().contiguous().view(integer))


def same_surroundings(x, before):
    """Whether everything in the storage but the elements of ``x`` is as in ``before``."""
    outside = torch.ones(memory_of(x).shape, dtype=torch.bool)
    outside.as_strided(x.shape, x.stride(), x.storage_offset()).fill_(False)
    return same_bits(memory_of(x)[outside], memory_of(before)[outside])


class Lists(NamedTuple):
    """The operands of the ops over T tensors."""

    params: list
    grads: list
    exp_avgs: list
    exp_avg_sqs: list
    maxima: list | None

    def map(self, f):
        return Lists(*(None if tensors is None else [f(x) for x in tensors] for tensors in self))

    def replaced(self, name, f):
        return self._replace(**{name: [f(x) for x in getattr(self, name)]})

    def rows(self, chosen):
        """The lists of these positions only."""
        return Lists(*(None if tensors is None else [tensors[t] for t in chosen] for tensors in self))

    def doubled(self):
        """Dense copies in float64."""
        return self.map(lambda x: x.detach().double().contiguous().clone())

    def tensors(self):
        return [x for tensors in self if tensors is not None for x in tensors]

    def same_bits(self, other):
        return all(same_bits(x, y) for x, y in zip(self.tensors(), other.tensors(), strict=True))

    def stats(self, backend="cpp", count_nonzero=True, dtype=F64):
        return ops.tensor_stats(
            self.grads, self.exp_avgs, self.params, self.exp_avg_sqs, count_nonzero=count_nonzero, dtype=dtype, backend=backend
        )

    def launch(self, backend="cpp", written=True):
        kind = ops.resolve_backend(backend, torch.device("cpu")).launch
        return kind(self.grads, self.exp_avgs, self.params, self.exp_avg_sqs, self.maxima, written=written)

    def update(self, h, backend="cpp"):
        """Updates in place; returns self."""
        keywords = {"step": h.step, "betas": (h.beta1, h.beta2), "eps": h.eps, "grad_scale": h.grad_scale}
        operands = (self.params, self.grads, self.exp_avgs, self.exp_avg_sqs)
        ops.adamw_update_(*operands, h.step_size, h.decay_factor, **keywords, max_exp_avg_sqs=self.maxima, backend=backend)
        return self


class Hyper(NamedTuple):
    """Hyper-parameters of an update: a number or a [T] float64 tensor each."""

    step_size: object = 0.1
    decay_factor: object = 0.99
    step: object = 3
    beta1: object = 0.9
    beta2: object = 0.999
    eps: object = 1e-8
    grad_scale: object = None

    def of_tensor(self, t, count):
        """Numbers for tensor ``t`` of ``count``."""
        vectors = [torch.as_tensor(1.0 if x is None else x, dtype=F64).expand(count) for x in self]
        return Hyper(*(x[t].item() for x in vectors))

    def of_tensors(self, count, device="cpu"):
        """Vectors [count], as the op on lists takes them."""
        return [None if x is None else torch.as_tensor(x, dtype=F64, device=device).expand(count).contiguous() for x in self]

    def vectors(self, count, backend="cpp", device="cpu"):
        """One tensor [V, count], as a launch of this backend takes it."""
        return ops.resolve_backend(backend, torch.device(device)).update_vectors(*self.of_tensors(count, device))


def random_lists(shapes, dtypes, seed=0, amsgrad=False, integers=False):
    """Lists of these shapes. Elements have sizes in [0.5, 2), so that none is too small for a test to miss; or are in -4..4."""
    generator = torch.Generator().manual_seed(seed)

    def draw(shape, dtype, signed=True):
        if integers:
            return torch.randint(-4, 5, shape, generator=generator).to(dtype)
        size = 0.5 + 1.5 * torch.rand(shape, generator=generator, dtype=F64)
        sign = torch.randint(0, 2, shape, generator=generator) * 2 - 1 if signed else 1
        return (size * sign).to(dtype)

    param, grad, first, second = DTYPES[dtypes]
    lists = [
        [draw(shape, dtype, dtype_index < 3) for shape in shapes] for dtype_index, dtype in enumerate((param, grad, first, second))
    ]
    return Lists(*lists, [draw(shape, second, False) for shape in shapes] if amsgrad else None)


def assert_within(actual, exact, bound, what):
    """Every element within its bound, a NaN exactly where one is due."""
    actual = actual.double()
    wrong = ~((actual - exact).abs() <= bound) & ~(actual.isnan() & exact.isnan())
    if wrong.any():
        index = tuple(wrong.nonzero()[0].tolist())
        message = f"{actual[index].item()!r}, want {exact[index].item()!r} within {bound[index].item():.3g}"
        raise AssertionError(f"{what}{list(index)} of shape {tuple(wrong.shape)}: {message}; {int(wrong.sum())} elements are wrong")


def assert_sums(stats, lists, result):
    """The five sums of each tensor are those of the float64 reference, within their bounds."""
    exact = lists.doubled().stats("reference")
    for t, (p, g, m, v) in enumerate(zip(*lists[:4], strict=True)):
        arithmetic = F64 if F64 in (p.dtype, g.dtype, m.dtype, v.dtype) else F32
        g = g if g.numel() else torch.zeros_like(m)
        terms = [(x.double() * y.double()).abs().sum() for x, y in ((g, g), (g, m), (m, m), (p, p), (v, v))]
        for column, name in enumerate(("grad²", "grad·exp_avg", "exp_avg²", "param²", "exp_avg_sq²")):
            bound = sum_bound(terms[column], m.numel(), arithmetic, result)
            assert_within(stats[t, column], exact[t, column], bound, f"{name} of tensor {t} ({m.numel()} elements) ")


def assert_updated(after, before, h):
    """``after`` is what the float64 reference makes of ``before``, within the bounds of tolerances.py; nothing else was written."""
    exact, operands = before.doubled(), before.doubled()
    reference_hyper = [torch.as_tensor(x, dtype=F64).expand(len(exact.params)) for x in h[:6]]
    scale = None if h.grad_scale is None else torch.as_tensor(h.grad_scale, dtype=F64).expand(len(exact.params))
    reference.adamw_update_(*exact, *reference_hyper, scale)
    for t in range(len(exact.params)):
        row = [tensors[t] for tensors in after if tensors is not None]
        arithmetic = F64 if any(x.dtype == F64 for x in row) else F32
        maximum = None if exact.maxima is None or not exact.maxima[t].numel() else exact.maxima[t]
        bounds = update_bounds(
            *(tensors[t] for tensors in operands[:4]),
            new_v=exact.exp_avg_sqs[t] if maximum is None else maximum,
            h=h.of_tensor(t, len(exact.params)),
            arithmetic=arithmetic,
        )
        for name, bound in zip(("params", "exp_avgs", "exp_avg_sqs", "maxima"), bounds, strict=True):
            if name != "maxima" or maximum is not None:
                got, want = getattr(after, name)[t], getattr(exact, name)[t]
                assert_within(got, want, stored(bound, want, got.dtype, arithmetic), f"{name}[{t}]")
    assert all(same_bits(memory_of(x), memory_of(y)) for x, y in zip(after.grads, before.grads, strict=True)), (
        "a gradient was written"
    )
    for x, y in zip(after.tensors(), before.tensors(), strict=True):
        assert same_surroundings(x, y), f"written beside a tensor of shape {tuple(x.shape)}, strides {x.stride()}"


# --------------------------------------------------------------------------------------------------------------- optimizers


def two_layers(spec=META, **options):
    """A small model and its optimizer after one step with fixed gradients; equal options give equal bits."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
        opt = spec(model.named_parameters(), lr=0.1, **options)
        set_gradients(opt, 1)
        opt.step()
    return model, opt


def set_gradients(opt, seed):
    generator = torch.Generator().manual_seed(seed)
    for group in opt.param_groups:
        for p in group["params"]:
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def everything(opt):
    """All that an optimizer holds and shows, copied."""
    params = [p for group in opt.param_groups for p in group["params"]]
    spec = spec_of(opt)
    parts = {name: getattr(opt, name) for name in (*spec.shown, "steps_done")} | opt.state_dict()
    if spec.encodes:
        parts["groups"] = [(g.name, g.members, g.names) for g in opt.groups]
    return copy.deepcopy(parts | {"params": [p.detach() for p in params], "grads": [p.grad for p in params]})


def same(x, y):
    """Bitwise equality of nested lists, dicts, tensors and plain values; a NaN equals itself."""
    if isinstance(x, torch.Tensor):
        if not isinstance(y, torch.Tensor) or (x.layout, x.device) != (y.layout, y.device):
            return False
        return (
            same_bits(*(z if z.layout is torch.strided else z.to_dense() for z in (x, y))) if not x.is_meta else x.shape == y.shape
        )
    if isinstance(x, dict):
        return isinstance(y, dict) and x.keys() == y.keys() and all(same(x[key], y[key]) for key in x)
    if isinstance(x, (list, tuple)):
        return isinstance(y, (list, tuple)) and len(x) == len(y) and all(map(same, x, y))
    return x == y or (x != x and y != y)


@contextmanager
def unchanged(opt, **options):
    """Nothing of ``opt``, made by ``two_layers`` with ``options``, changes inside; after it, it steps as one never in it."""
    before = everything(opt)
    yield
    after = everything(opt)
    changed = [name for name in before if not same(before[name], after[name])]
    assert not changed, f"changed: {changed}"
    _, twin = two_layers(spec_of(opt), **options)
    for each in (opt, twin):
        set_gradients(each, 3)
        each.step()
    expected, after = everything(twin), everything(opt)
    changed = [name for name in expected if not same(expected[name], after[name])]
    assert not changed, f"the next step differs in: {changed}"
