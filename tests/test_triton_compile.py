"""Every Triton kernel compiled ahead of time, without a GPU: what the compilers make of it."""

import functools
import re
import warnings

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is built for Linux only")

from metaadamw_fast.kernels import mada_policy, policy  # noqa: E402
from metaadamw_fast.kernels.adamw import ADAMW, AVGRAD  # noqa: E402
from metaadamw_fast.kernels.elements import WARPS  # noqa: E402
from metaadamw_fast.kernels.engine import (  # noqa: E402
    measure_constants,
    measure_kernel,
    register_limit,
    update_constants,
    update_kernel,
    update_options,
)
from metaadamw_fast.kernels.mada import MADA  # noqa: E402
from metaadamw_fast.kernels.table import LaunchTable  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import make_backend  # noqa: E402
from triton.runtime.jit import create_function_from_signature  # noqa: E402

from bench.compiled import TRITON_TYPES, kind, ptxas_report, triton_assembly  # noqa: E402

CUDA = {"sm_80": 80, "sm_90": 90, "sm_100": 100}
TARGETS = {name: GPUTarget("cuda", number, 32) for name, number in CUDA.items()} | {"gfx942": GPUTarget("hip", "gfx942", 64)}
FP32, BF16_FP32_STATES = kind(1, 1, 1, 1), kind(2, 1, 2, 1)
MASTERS = kind(2, 1, 1, 1, 0, 2)  # of bfloat16 parameters and gradients
MANY = (FP32, kind(2, 2, 2, 2, 2), kind(4, 1, 2, 3, 3), kind(4, 4, 4, 4, 4), kind(0, 1, 3, 1), kind(2, 1, 2, 1, strided=True))
ALL_FOUR, COUNTS = (0, 1, 2, 3, 4), (5, 6)  # columns of the statistics
NO_SUMS, LEFT, FOUND = 0, 2, 5  # sums that an update makes


def stats(kinds, columns=ALL_FOUR):
    return measure_kernel, measure_constants(ADAMW, columns, kinds)


def update(kinds, sums=LEFT, stochastic=False, rule=ADAMW):
    constants = update_constants(rule, sums, kinds)
    absent = ([] if sums else ["new_sums"]) + ([] if stochastic else ["rounding_seed"])
    return update_kernel, constants | dict.fromkeys(absent)


VARIANTS = {
    "stats, fp32": stats((FP32,)),
    "stats, bf16 with fp32 states": stats((BF16_FP32_STATES,)),
    "stats of g and m, counts": stats((FP32,), (0, 1, 2, *COUNTS)),
    "stats, many kinds": stats(MANY, ALL_FOUR + COUNTS),
    "update, fp32": update((FP32,)),
    "update, fp32, lagged": update((FP32,), FOUND),
    "update, fp32, no sums": update((FP32,), NO_SUMS),
    "update, fp32, amsgrad": update((kind(1, 1, 1, 1, 1),)),
    "update, bf16 with fp32 states": update((BF16_FP32_STATES,)),
    "update, bf16 with fp32 states, by chance": update((BF16_FP32_STATES,), stochastic=True),
    "update, all bf16, by chance": update((kind(2, 2, 2, 2),), stochastic=True),
    "update, all fp16, by chance": update((kind(3, 3, 3, 3),), stochastic=True),
    "update, all bf16": update((kind(2, 2, 2, 2),)),
    "update, bf16 with fp32 states, lagged": update((BF16_FP32_STATES,), FOUND),
    "update, all bf16, lagged": update((kind(2, 2, 2, 2),), FOUND),
    "update, masters of bf16": update((MASTERS,)),
    "update, masters of fp16, amsgrad": update((kind(3, 1, 1, 1, 1, 3),)),
    "update, masters of bf16, lagged": update((MASTERS,), FOUND),
    "update, masters of bf16, many kinds": update((MASTERS, *MANY)),
    "stats, masters of bf16": stats((MASTERS,)),
    "update, many kinds": update(MANY),
    "update of AVGrad, fp32, mean": update((kind(1, 1, 1, 1, 1),), rule=AVGRAD),
    "update of AVGrad, all bf16, by chance, mean": update((kind(2, 2, 2, 2, 1),), stochastic=True, rule=AVGRAD),
    "update of AVGrad, masters of bf16, mean": update((kind(2, 1, 1, 1, 1, 2),), rule=AVGRAD),
}
NINE = (1,) * 9  # operands
# With the most registers that they may take; for one target, since each takes seconds to compile.
OF_MADA = {
    "sums": ((measure_kernel, measure_constants(MADA, tuple(range(7)), (kind(*NINE),))), 255),
    "update": (update((kind(*NINE),), NO_SUMS, rule=MADA), 168),
    "update, masters of bf16, by chance": (update((kind(2, *NINE[1:7], 2, 2, 2),), NO_SUMS, True, MADA), 168),
    "update, lagged": (update((kind(*NINE),), MADA.found[-1], rule=MADA), 255),
}
PLAIN = {"enhanced": False, "v_norm": True, "deviations": True, "time": 10, "lanes": 16}
ENHANCED = {"enhanced": True, "v_norm": False, "deviations": False, "time": 9, "lanes": 16}
POLICY = {
    "features": (policy.group_features_kernel, PLAIN),
    "features, enhanced": (policy.group_features_kernel, ENHANCED),
    "clipping": (policy.scaled_gradients_kernel, {"clips": True}),
    "no clipping": (policy.scaled_gradients_kernel, {"sign": None, "loss_scale": None, "clips": False}),
    "modulation": (policy.modulation_kernel, {"go": None, "released": False}),
    "modulation, released": (policy.modulation_kernel, {"released": True}),
    "vectors": (policy.update_vectors_kernel, {"grad_scale": None}),
    "policy of MADA": (mada_policy.mada_policy_kernel, {"lagged": False, "advance": True}),
}  # a few numbers per tensor
# Launches of many kinds, which take seconds to compile, for one GPU of NVIDIA's only: each kind by itself is compiled for all.
EVERY_ON_CUDA = pytest.mark.parametrize(
    ("variant", "target"), [(v, t) for v in VARIANTS for t in CUDA if "many" not in v or t == "sm_90"]
)


@pytest.fixture(autouse=True, scope="module")
def _own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


@functools.cache
def compiled(variant, target, fusion=False):
    """The assembly of each stage."""
    kernel, constants = (VARIANTS | POLICY)[variant]
    limit = {}
    if kernel is update_kernel and target in CUDA:
        limit = register_limit(constants["kinds"], bool(constants["found"]), "rounding_seed" not in constants)
    return triton_assembly(kernel, constants, TARGETS[target], num_warps=WARPS, enable_fp_fusion=fusion, **limit).asm


@pytest.mark.parametrize("variant", VARIANTS | POLICY)
def test_a_launch_finds_its_kernel_by_its_arguments(variant):
    """Triton makes the function that binds a launch's arguments from source text with local names of its own: `params`, `options`.

    An argument of such a name would be hidden by the local one. The ahead-of-time compilation does not go through it.
    """
    kernel, constants = (VARIANTS | POLICY)[variant]
    bind = create_function_from_signature(kernel.signature, kernel.params, make_backend(TARGETS["sm_90"]))
    arguments = {name: constants.get(name, 7) for name in kernel.arg_names}
    bound, specialization, _ = bind(**arguments)
    assert bound == arguments
    constant = [p.name for p in kernel.params if p.is_constexpr]
    assert {name: value for name, (kind, value) in zip(bound, specialization, strict=True) if name in constant} == {
        name: arguments[name] for name in constant
    }
    hash(tuple(specialization))  # the key under which Triton keeps the compiled kernel


@pytest.mark.parametrize("sizes", [[0], [0, 5], [5, 0, 0]])
def test_kinds_of_lists_with_empty_tensors_compile(sizes):
    """A row without elements is of a kind that has types for all operands."""
    lists = [[torch.zeros(n, dtype=dtype) for n in sizes] for dtype in (torch.bfloat16, *[torch.float32] * 3)]
    launch = LaunchTable(*lists, written=True)
    assert len(launch.kinds) == 1
    for sums in (LEFT, FOUND):
        kernel, constants = update(launch.kinds, sums)
        assert triton_assembly(kernel, constants, TARGETS["sm_90"], num_warps=WARPS).asm["ptx"]


def test_a_small_seed_is_shifted_as_a_large_one(monkeypatch):
    """At a launch Triton types it by its value; a shift by all its bits is only warned of."""
    monkeypatch.setitem(TRITON_TYPES, "rounding_seed", "i32")
    kernel, constants = update((kind(2, 2, 2, 2),), stochastic=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        triton_assembly(kernel, constants, TARGETS["sm_90"], num_warps=WARPS)


def inexact(ptx):
    """Floating-point instructions that round otherwise than the C++ on the CPU: contracted, approximate, flushing."""
    return re.findall(r"^.*(?:\bfma\.|\bmad\.(?:rn|rz|f)|\.ftz|\.approx|div\.full|\brcp\b).*$", ptx, re.MULTILINE)


@EVERY_ON_CUDA
def test_cuda_arithmetic_is_exact(variant, target):
    ptx = compiled(variant, target)["ptx"]
    assert not inexact(ptx)
    if "update" in variant:
        assert re.search(r"\bdiv\.rn\.f32\b", ptx)
        assert re.search(r"\bsqrt\.rn\.f32\b", ptx)


def test_contraction_would_be_seen():
    assert inexact(compiled("update, fp32", "sm_80", fusion=True)["ptx"])


@EVERY_ON_CUDA
def test_cuda_resources(variant, target, tmp_path):
    """No spills, no local memory; registers of lists of one kind so that five programs fit a multiprocessor, or four, or three."""
    report, _ = ptxas_report(compiled(variant, target)["ptx"], CUDA[target], tmp_path)
    assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in report, report
    registers = int(re.search(r"Used (\d+) registers", report)[1])
    more = [x for x in ("lagged", "chance", "amsgrad", "mean", "masters") if x in variant]
    limit = 255 if "many" in variant else (96, 128, 168)[len(more)]
    assert registers <= limit, report


@pytest.mark.parametrize(
    ("variant", "loads", "stores"),
    [("sums", 8, 0), ("update", 8, 7), ("update, masters of bf16, by chance", 6, 6), ("update, lagged", 9, 7)],
)
def test_mada(variant, loads, stores, tmp_path):
    """Exact, without spills, 16 bytes at once; an update that only overwrites the other gradient does not read it."""
    (kernel, constants), most = OF_MADA[variant]
    options = {"num_warps": WARPS}
    if kernel is update_kernel:
        options = update_options(MADA, constants["kinds"], bool(constants["found"]), "rounding_seed" not in constants)
    ptx = triton_assembly(kernel, constants, TARGETS["sm_90"], enable_fp_fusion=False, **options).asm["ptx"]
    assert not inexact(ptx)
    report, _ = ptxas_report(ptx, 90, tmp_path)
    assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in report, report
    assert int(re.search(r"Used (\d+) registers", report)[1]) <= most, report
    each = 8 // options["num_warps"]  # accesses of 4 elements that a thread needs for its share of a block
    assert len(re.findall(r"ld\.global(\.\w+)*\.v4\.b32", ptx)) == each * loads
    assert len(re.findall(r"st\.global(\.\w+)*\.v4\.b32", ptx)) == each * stores


@pytest.mark.parametrize("variant", POLICY)
@pytest.mark.parametrize("target", TARGETS)
def test_kernels_around_the_encoder(variant, target, tmp_path):
    """They spill nothing; the modulation is rounded as in C++ and in PyTorch, operation by operation."""
    if target not in CUDA:
        assert re.findall(r"\.private_segment_fixed_size:\s*(\d+)", compiled(variant, target)["amdgcn"]) == ["0"]
        return
    report, _ = ptxas_report(compiled(variant, target)["ptx"], CUDA[target], tmp_path)
    assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in report, report
    if "modulation" in variant or "MADA" in variant:
        assert not inexact(compiled(variant, target)["ptx"])


@pytest.mark.parametrize(
    ("variant", "loads", "stores"),
    [
        ("stats, fp32", 4, 0),
        ("update, fp32", 4, 3),
        ("update, fp32, amsgrad", 5, 4),
        ("update, masters of bf16", 3, 3),
        ("update of AVGrad, fp32, mean", 5, 4),
    ],
)
@pytest.mark.parametrize("target", TARGETS)
def test_dense_fp32_moves_16_bytes_at_once(variant, loads, stores, target):
    """What has 16 bits moves in 8 bytes then, and is not counted."""
    if target in CUDA:
        assembly, load, store = compiled(variant, target)["ptx"], r"ld\.global(\.\w+)*\.v4\.b32", r"st\.global(\.\w+)*\.v4\.b32"
        each = 2  # a thread has 8 of the 1024 lanes; 4 on AMD, whose warps are twice as wide
    else:
        assembly, load, store, each = compiled(variant, target)["amdgcn"], r"global_load_dwordx4", r"global_store_dwordx4", 1
    assert len(re.findall(load, assembly)) >= each * loads
    assert len(re.findall(store, assembly)) >= each * stores


@pytest.mark.parametrize("variant", VARIANTS)
def test_amd_resources(variant):
    """No spills, and subnormal numbers are kept: floating-point mode 3 in both fields."""
    assembly = compiled(variant, "gfx942")["amdgcn"]
    assert re.findall(r"\.[sv]gpr_spill_count:\s*(\d+)", assembly) == ["0", "0"]
    assert re.findall(r"\.private_segment_fixed_size:\s*(\d+)", assembly) == ["0"]
    assert re.findall(r"\.amdhsa_float_denorm_mode_\w+ (\d)", assembly) == ["3", "3"]
