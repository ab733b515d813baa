"""MADA's update on random lists, on the device that is there (test_gpu_ops.py says which one): in every bit as in C++ on the CPU.

A number makes a case. Lists, dtypes, layouts, flags, masters, rounding by chance, turns and sums are all drawn.
"""

import pytest
import torch

from metaadamw_fast import ops
from metaadamw_fast.mada_reference import Flags, Half

from .cases import BF16, F16, F32, F64, LAYOUTS, clone, place, same_bits, same_surroundings
from .test_gpu_ops import BACKENDS, DEVICE, to
from .test_gpu_random import Draw, same_but_nan
from .test_mada_ops import CASES, half_of, mapped
from .test_mada_ops import Lists as MadaLists

pytestmark = pytest.mark.gpu

NUMBERS = 60
STATES = MadaLists._fields[1:9]
UNSIGNED = {"exp_avg_sqs", "average_sqs"}
BUFFERS = ("last_grads", "previous_grads")
CPP = ops.resolve_backend("cpp", torch.device("cpu"))


def lists_of(draw, case):
    """The lists of a case: what two buffers share is drawn once."""
    there_are = ("grads", "exp_avgs", "params", "exp_avg_sqs", *CASES[case].lists)
    one_dtype, some_absent = draw.often(0.4), draw.often(0.3)
    types = {name: draw.choice([F32, F32, BF16, F16, F64]) for name in MadaLists._fields[:9]}
    if one_dtype:
        types = dict.fromkeys(types, draw.choice([F32, BF16, F64]))
    types["last_grads"] = types["previous_grads"]
    made = {name: [] for name in there_are}
    for _ in range(draw.choice([1, 2, 3, 5])):
        shape = draw.shape()
        layout = LAYOUTS[draw.choice([name for name in LAYOUTS if name != "expanded"])]
        for name in there_are:
            x = draw.values(shape, types[name], name not in UNSIGNED)
            if name in BUFFERS:
                x = place(x, **layout) if x.numel() else x
            else:
                x = draw.placed(x, name == "grads")
            made[name].append(None if name == "grads" and some_absent and draw.often(0.4) else x)
    return MadaLists(**{name: made.get(name) for name in MadaLists._fields[:9]})


@pytest.mark.parametrize("number", range(NUMBERS))
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_update_has_the_bits_of_the_cpu(backend, number):
    if ops._unavailable(backend, DEVICE) is not None:
        pytest.skip(ops._unavailable(backend, DEVICE))
    draw = Draw(number, small=number % 2 == 0)
    case = draw.choice(list(CASES))
    lists = lists_of(draw, case)
    count = len(lists.params)
    low = draw.low_precision(lists.params) if draw.often(0.4) else [None] * count
    flags = CASES[case].flags | (Flags.V_STARTS if draw.often(0.1) else 0) | (Flags.N_STARTS if draw.often(0.1) else 0)
    turns = torch.tensor([draw.randrange(4) for _ in range(count)], dtype=F64)
    this = half_of(count, case, seed=number, turn=turns, flags=int(flags))
    last = half_of(count, case, seed=number + 1, turn=turns - 1)
    this[Half._fields.index("step")] *= torch.tensor([float(not draw.often(0.15)) for _ in range(count)], dtype=F64)
    vectors = torch.cat([this, last])

    there, expected = mapped(lists, lambda x: to(DEVICE, x)), mapped(lists, clone)
    low_there, low_expected = [to(DEVICE, x) for x in low], [None if x is None else clone(x) for x in low]
    launch = ops.resolve_backend(backend, DEVICE).launch(*there[:9], low_there, written=True, rule="mada")
    on_cpu = CPP.launch(*expected[:9], low_expected, written=True, rule="mada")
    before = launch.measure(0b1111111, F64, None, last.to(DEVICE))
    found, seed = draw.often(0.5), draw.choice([None, None, 0, 2**40 + 3])
    sums = torch.full((count, 7), -1.0, dtype=F64, device=DEVICE) if found else None
    launch.update_(vectors.to(DEVICE), sums, seed)
    on_cpu.update_(vectors, None, seed)
    assert not found or same_but_nan(sums.cpu(), before.cpu()), "sums of what the update finds"
    of_rule = zip(MadaLists._fields[:9], there[:9], expected[:9], lists[:9], strict=True)
    for name, got, want, was in (*of_rule, ("low", low_there, low_expected, low)):
        for t, (x, y, z) in enumerate(zip(got or [], want or [], was or [], strict=True)):
            if x is None:
                continue
            assert same_but_nan(to("cpu", x), y), f"{name}[{t}]: other bits than the C++ backend on the CPU"
            assert same_surroundings(to("cpu", x), z), f"{name}[{t}]: written beside it"
            assert name != "grads" or same_bits(to("cpu", x), z), "a gradient was written"
