"""Random lists on the device that is there (test_gpu_ops.py says which one), against the C++ backend on the CPU.

The update has the same bits, but that a NaN is a NaN; sums are within their bounds; nothing beside a tensor is written. A number
makes a case. More of them than here:

    python -m tests.test_gpu_random --cases 5000 --first 100 [--small]
"""

import argparse
import random
import sys

import pytest
import torch

from metaadamw_fast import ops

from .cases import BF16, BLOCK, CHUNK, F16, F32, F64, LAYOUTS, Lists, clone, memory_of, place, same_bits, same_surroundings
from .test_gpu_ops import BACKENDS, DEVICE, to
from .tolerances import sum_bound

pytestmark = pytest.mark.gpu

CASES = 100
TYPES = [F32, F64, BF16, F16]
EDGES = [1, 4, 8, 16, BLOCK, 2 * BLOCK, CHUNK // 4, CHUNK // 2, CHUNK]
SIZES = [0, *(n + i for n in EDGES for i in (-1, 0, 1)), 2 * CHUNK + 1, 100_001]
SHAPES = [(), (37, 53), (3, 5, 7, 4), (181, 183), (2, 3, 4, 5, 6), (5, CHUNK + 7), (CHUNK + 7, 3), (1, 9, 1), (2, 0, 3)]
OPERANDS = ("params", "grads", "exp_avgs", "exp_avg_sqs", "maxima")
COLUMNS = ("grads grads", "grads exp_avgs", "exp_avgs exp_avgs", "params params", "exp_avg_sqs exp_avg_sqs")


class Draw(random.Random):
    """What makes up a case."""

    def __init__(self, number, small):
        super().__init__(number)
        self.generator = torch.Generator().manual_seed(number)
        self.elements_left = 3000 if small else 250_000
        self.values_are = self.choice(["plain", "plain", "of any magnitude", "tiny", "spoiled"])

    def often(self, share):
        return self.random() < share

    def shape(self):
        shape = self.choice(SHAPES) if self.often(0.3) else (self.choice(SIZES),)
        if torch.Size(shape).numel() > self.elements_left:
            shape = (self.choice([0, 1, 5, 9]),)
        self.elements_left -= torch.Size(shape).numel()
        return shape

    def values(self, shape, dtype, signed):
        x = torch.randn(shape, generator=self.generator, dtype=F64)
        if self.values_are == "of any magnitude":  # and of more than float32 has
            x = x * torch.exp2(torch.randint(-160, 140, shape, generator=self.generator).double())
        if self.values_are == "tiny":
            x = x * 1e-7
        x = (x if signed else x.abs()).to(dtype)
        if self.values_are == "spoiled":
            bad = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e38], dtype=F64).to(dtype)
            x = torch.where(
                torch.rand(shape, generator=self.generator) < 0.1, bad[torch.randint(6, shape, generator=self.generator)], x
            )
        return x

    def placed(self, x, may_repeat):
        if self.often(0.45):
            return place(x)
        if self.often(0.5) or x.numel() == 0:
            return place(x, offset=self.randrange(1, 9))
        return place(x, **LAYOUTS[self.choice([name for name in LAYOUTS if may_repeat or name != "expanded"])])

    def lists(self):
        count, tiny = self.choice([1, 1, 2, 3, 5, 8]), self.often(0.02)
        if tiny:
            count = 1000 if self.elements_left > 3000 else 100
        one_set_of_types, allowed = self.often(0.5), TYPES if self.often(0.7) else [F32, BF16, F16]
        some_absent, types = self.often(0.3), [self.choice(allowed) for _ in OPERANDS]
        if self.often(0.3):
            types = [types[0]] * len(OPERANDS)
        lists = Lists([], [], [], [], [])
        for _ in range(count):
            shape = (self.choice([0, 1, 3, 64, 65]),) if tiny else self.shape()
            types = types if one_set_of_types else [self.choice(allowed) for _ in OPERANDS]
            for name, dtype, xs in zip(OPERANDS, types, lists, strict=True):
                x = self.placed(self.values(shape, dtype, name in ("params", "grads", "exp_avgs")), name == "grads")
                if name == "grads" and some_absent and self.often(0.4):
                    x = self.choice([None, torch.empty(0)])
                xs.append(torch.empty(0) if name == "maxima" and self.often(0.2) else x)
        return lists if self.often(0.4) else lists._replace(maxima=None)

    def low_precision(self, params):
        """Of some float32 ``params``, which then are masters: their roundings, with other numbers here and there."""
        low = []
        for x in params:
            low.append(self.choice([None, torch.empty(0)]))
            if x.dtype == F32 and self.often(0.7):
                q = x.to(self.choice([BF16, F16]))
                written = torch.rand(x.shape, generator=self.generator) < self.choice([0.0, 0.1, 1.0])
                low[-1] = self.placed(torch.where(written, self.values(x.shape, q.dtype, True), q), False)
        return low

    def hyperparameters(self, count):
        def each(*choices):
            return torch.tensor([self.choice(choices) for _ in range(count)], dtype=F64)

        scale = each(1.0, -1.0, 0.3, 1e-3, 0.0, 7.5, *([float("nan"), float("inf")] if self.often(0.1) else []))
        steps = each(1, 2, 3, 10, 1000, 123456, *([0] if self.often(0.4) else []))
        return [
            each(1e-3, 0.1, 0.0, 3.0),
            each(1.0, 0.99, 0.0, -0.5),
            steps,
            each(0.9, 0.0, 0.4, 0.99),
            each(0.999, 0.5, 0.0, 0.9999999),
            each(1e-8, 0.0, 1e-3),
            scale if self.often(0.6) else None,
        ]


def same_but_nan(x, y):
    """As same_bits, but that any NaN is as good as another: GPUs make others than CPUs."""
    return torch.equal(x.isnan(), y.isnan()) and same_bits(x.masked_fill(x.isnan(), 0), y.masked_fill(y.isnan(), 0))


def assert_within_bounds(sums, lists):
    """Of the five columns, as far as no sum leaves the range of its arithmetic."""
    for t, m in enumerate(lists.exp_avgs):
        row = {name: getattr(lists, name)[t] for name in OPERANDS if getattr(lists, name) is not None}
        row = {name: x for name, x in row.items() if x is not None and x.shape == m.shape}
        arithmetic = F64 if any(x.dtype == F64 for x in row.values()) else F32
        row.setdefault("grads", torch.zeros_like(m))
        for column, names in enumerate(COLUMNS):
            x, y = (row[name].double() for name in names.split())
            terms = x * y
            size = terms.abs().sum()
            if not size.isfinite():
                assert not sums[t, column].isfinite()
            elif arithmetic == F64 or size < torch.finfo(F32).max / 2:
                underflow = m.numel() * torch.finfo(F32).smallest_normal * torch.finfo(F32).eps
                bound = sum_bound(size, m.numel(), arithmetic, F64) + underflow
                assert (sums[t, column] - terms.sum()).abs() <= bound, f"column {column} of tensor {t}"


def assert_updated(there, expected, before, low):
    """``low``: the low-precision parameters there, expected and before."""
    for name in ("params", "exp_avgs", "exp_avg_sqs", "maxima", "low"):
        lists = low if name == "low" else [getattr(x, name) or [] for x in (there, expected, before)]
        for t, (x, y, was) in enumerate(zip(*lists, strict=True)):
            if x is None:
                continue
            x = to("cpu", x)
            assert same_but_nan(x, y), f"{name}[{t}]: other bits than the C++ backend on the CPU"
            assert same_surroundings(x, was), f"{name}[{t}]: written beside it"
    for x, was in zip(there.grads, before.grads, strict=True):
        assert x is None or same_bits(memory_of(to("cpu", x)), memory_of(was)), "a gradient was written"


def check(number, backend, small=False):
    draw = Draw(number, small)
    lists = draw.lists()
    count = len(lists.params)
    there, expected = lists.map(lambda x: to(DEVICE, x)), lists.map(lambda x: None if x is None else clone(x))

    of_low = Draw(number + 10**9, small)
    low = of_low.low_precision(lists.params) if of_low.often(0.5) else [None] * count
    low_there, low_expected = [to(DEVICE, x) for x in low], [None if x is None else clone(x) for x in low]

    def launch_of(name, lists, low, written=True):
        kind = ops.resolve_backend(name, lists.params[0].device).launch
        return kind(lists.grads, lists.exp_avgs, lists.params, lists.exp_avg_sqs, lists.maxima, low, written=written)

    def on_device(x):
        return None if x is None else x.to(DEVICE)

    launch, on_cpu = launch_of(backend, there, low_there), launch_of("cpp", expected, low_expected)

    # ------------------------------------------------------------------------------------------------------------- statistics
    before = launch.tensor_stats(True, True, True, F64).cpu()
    assert_within_bounds(before, lists)
    assert same_bits(before[:, 5:], on_cpu.tensor_stats(True, True, True, F64)[:, 5:]), "counts"
    assert same_but_nan(launch_of(backend, there, low_there, written=False).tensor_stats(True, True, True, F64).cpu(), before)
    dtype, params, squares, counts = draw.choice([F32, F64]), *(draw.often(0.5) for _ in range(3))
    some = launch.tensor_stats(params, squares, counts, dtype).cpu()
    assert same_but_nan(some, before[:, [0, 1, 2] + [3] * params + [4] * squares + [5, 6] * counts].to(dtype)), "columns"
    carried = torch.randn(count, 2, generator=draw.generator, dtype=F64)
    some = launch.tensor_stats(False, False, counts, dtype, on_device(carried)).cpu()
    assert same_but_nan(some, torch.cat([before[:, :3], carried, before[:, 5 : 5 + 2 * counts]], 1).to(dtype)), "carried sums"

    # ----------------------------------------------------------------------------------------------------------------- update
    hyper, seed = draw.hyperparameters(count), draw.choice([None, None, 0, -1, 2**40 + 3])
    vectors = ops.resolve_backend(backend, DEVICE).update_vectors(*map(on_device, hyper))
    expected_vectors = ops.resolve_backend("cpp", torch.device("cpu")).update_vectors(*hyper)
    width = draw.choice([None, 2, 5])
    sums = None if width is None else torch.full((count, width), -1.0, dtype=F64, device=DEVICE)
    launch.update_(vectors, sums, seed)
    on_cpu.update_(expected_vectors, None, seed)
    assert_updated(there, expected, lists, (low_there, low_expected, low))
    after = launch.tensor_stats(True, True, True, F64).cpu()
    if sums is not None:
        absent = [m.numel() > 0 and (g is None or g.numel() == 0) for g, m in zip(lists.grads, lists.exp_avgs, strict=True)]
        alone, sums = torch.tensor(absent) | (hyper[2] == 0), sums.cpu()
        if width == 2:
            assert (sums[alone] == -1).all(), "sums of a row that is left alone"
            assert same_but_nan(sums[~alone], after[~alone, 3:5]), "sums of what the update leaves"
        else:
            assert same_but_nan(sums, before[:, :5]), "sums of what the update finds"

    # -------------------------------------------------------------------------------------------------------- other gradients
    others = [None if x is None or draw.often(0.2) else x.neg() if draw.often(0.2) else clone(x) for x in lists.grads]
    present = [to(DEVICE, x) for x in others]  # a launch does not keep gradients alive
    launch.set_gradients(present)
    on_cpu.set_gradients(others)
    launch.update_(vectors)
    on_cpu.update_(expected_vectors)
    assert_updated(there._replace(grads=present), expected, lists._replace(grads=others), (low_there, low_expected, low))


@pytest.mark.parametrize("number", range(CASES))
@pytest.mark.parametrize("backend", BACKENDS)
def test_random_lists(backend, number):
    reason = ops._unavailable(backend, DEVICE)
    if reason is not None:
        pytest.skip(reason)
    check(number, backend)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=CASES)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--small", action="store_true", help="3000 elements at most: for sanitizers")
    options = parser.parse_args()
    torch.set_num_threads(1)
    failed = []
    for number in range(options.first, options.first + options.cases):
        for backend in BACKENDS:
            try:
                check(number, backend, options.small)
            except (AssertionError, RuntimeError) as error:
                failed.append(number)
                print(f"case {number}, {backend}: {error}", flush=True)
    print(f"{options.cases} cases from {options.first} on, {', '.join(BACKENDS)}: {len(failed)} failed")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
