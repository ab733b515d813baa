"""Bad input to the multi-tensor ops raises RuntimeError and says what is wrong; nothing, no version counter either, has changed."""

import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from .cases import F32, F64, Hyper, clone, random_lists

LISTS = ("params", "grads", "exp_avgs", "exp_avg_sqs", "maxima")
BAD_TENSORS = [  # in the place of [4, 5]
    ("another shape", lambda x: x.new_ones(4, 3), "shape|size"),
    ("a shape that would broadcast", lambda x: x.new_ones(4, 1), "shape|size"),
    ("integers", lambda x: x.long(), "dtype"),
    ("complex", lambda x: x.to(torch.complex64), "dtype"),
    ("sparse", lambda x: x.to_sparse(), "(?i)sparse"),
    ("another device", lambda x: x.to("meta"), "device"),
    ("expanded", lambda x: x.new_ones(4, 1).expand(4, 5), "expanded|single memory location"),
]


def raw_update(lists):
    hyper = [torch.full((3,), x, dtype=F64) for x in (0.1, 0.99, 3.0, 0.9, 0.999, 1e-8)]
    torch.ops.metaadamw_fast.adamw_update_.default(*lists, *hyper, None)


def raw_stats(lists):
    p, g, m, v, _ = lists
    torch.ops.metaadamw_fast.tensor_stats.default(g, m, p, v, True, F32)


CALLS = {
    "raw update": raw_update,
    "cpp update": lambda lists: lists.update(Hyper(), "cpp"),
    "reference update": lambda lists: lists.update(Hyper(), "reference"),
    "raw stats": raw_stats,
    "cpp stats": lambda lists: lists.stats("cpp"),
    "reference stats": lambda lists: lists.stats("reference"),
}


def cases():
    for call in CALLS:
        for name in LISTS[: 4 if "stats" in call else 5]:  # the sums take no maxima
            for bad, spoil, message in BAD_TENSORS:
                if bad != "expanded" or ("update" in call and name != "grads"):  # what is only read may be expanded
                    yield pytest.param(call, name, spoil, message, id=f"{call}, {name}, {bad}")
            yield pytest.param(call, name, None, "tensors", id=f"{call}, {name}, one fewer")


@pytest.mark.parametrize(("call", "name", "spoil", "message"), list(cases()))
@pytest.mark.filterwarnings("ignore:Casting complex values")
def test_lists(call, name, spoil, message):
    lists = random_lists([(3,), (4, 5), (2, 2)], "fp32", amsgrad=True)
    before, versions = lists.map(clone), [x._version for x in lists.tensors()]
    tensors = list(getattr(lists, name))
    if spoil is None:
        tensors.pop()
    else:
        tensors[1] = spoil(tensors[1])
    with pytest.raises(RuntimeError, match=message):
        CALLS[call](lists._replace(**{name: tensors}))
    assert lists.same_bits(before)
    assert [x._version for x in lists.tensors()] == versions


@pytest.mark.parametrize("position", range(7))
@pytest.mark.parametrize(
    "bad",
    [
        torch.ones(3),
        torch.ones(2, dtype=F64),
        torch.ones(3, 1, dtype=F64),
        torch.ones(6, dtype=F64)[::2],
        torch.ones(3, dtype=F64).to("meta"),
    ],
    ids=["float32", "length", "shape", "strides", "device"],
)
def test_hyperparameters_of_the_raw_update(bad, position):
    lists = random_lists([(3,), (4, 5), (2, 2)], "fp32")
    before = lists.map(clone)
    hyper = [torch.full((3,), x, dtype=F64) for x in (0.1, 0.99, 3.0, 0.9, 0.999, 1e-8, 1.0)]
    hyper[position] = bad
    name = ("step_size", "decay_factor", "step", "beta1", "beta2", "eps", "grad_scale")[position]
    with pytest.raises(RuntimeError, match=f"{name} must be|device"):
        torch.ops.metaadamw_fast.adamw_update_.default(*lists, *hyper)
    assert lists.same_bits(before)


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_hyperparameters_and_dtypes_of_the_public_ops(backend):
    lists = random_lists([(3,), (4, 5)], "fp32")
    before = lists.map(clone)
    for name in Hyper._fields:
        with pytest.raises(RuntimeError, match="size"):
            lists.update(Hyper()._replace(**{name: torch.ones(3)}), backend)
    assert lists.same_bits(before)
    for dtype in (torch.bfloat16, torch.int64):
        with pytest.raises(RuntimeError, match="float32 or float64"):
            lists.stats(backend, dtype=dtype)


@pytest.mark.skipif(sys.platform != "linux" or shutil.which("g++") is None, reason="libstdc++ and g++ of Linux")
def test_a_compiler_with_the_archive_of_libstdcxx_only_links_torchs_library(tmp_path):
    """Two copies of libstdc++ in one process cut messages short and crash where one throws what the other catches."""
    source, plain, ours = tmp_path / "x.cpp", tmp_path / "plain.so", tmp_path / "ours.so"
    source.write_text("#include <stdexcept>\nvoid f(const char* x) { throw std::runtime_error(x); }\n")
    cxx_library = runpy.run_path(str(Path(__file__).parent.parent / "setup.py"), run_name="setup")["cxx_library"]()
    assert Path(cxx_library[0]).exists()
    for library, more in ((plain, []), (ours, cxx_library)):
        subprocess.run(["g++", "-shared", "-fPIC", "-static-libstdc++", source, *more, "-o", library], check=True)
    symbols = [subprocess.run(["nm", "-D", x], capture_output=True, text=True, check=True).stdout for x in (plain, ours)]
    assert [re.search(r"(\w) _ZNSt13runtime_errorC1EPKc", x)[1] for x in symbols] == ["T", "U"]  # defined, taken from outside
