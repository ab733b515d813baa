"""Every Triton kernel compiled ahead of time, for GPUs that need not be there, and what the machine code must and must not have."""

import re
import subprocess
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
from metaadamw_fast.kernels.adamw_update import adamw_update_kernel  # noqa: E402
from metaadamw_fast.kernels.tensor_stats import tensor_stats_kernel  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

GPUS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
F32, BF16, F16, F64 = 1, 2, 3, 4


def kind(*codes):
    """The dtype codes of a row's operands as the kernels take them; see kernels/elements.py."""
    return sum(code << 4 * i for i, code in enumerate(codes))


KINDS = {
    "fp32": (kind(F32, F32, F32, F32),),
    "mixed": (kind(F32, F32, F32, F32), kind(BF16, F32, BF16, F32), kind(F64, F32, BF16, F16)),
}
KERNELS = {
    "tensor_stats": (tensor_stats_kernel, {"params": True, "squares": True, "counts": True}),
    "adamw_update": (adamw_update_kernel, {}),
}
TYPES = {"table": "*i64", "tensors": "i32", "chunks": "i32", "partials": "*fp64", "tickets": "*i32", "out": "*fp32"}


def compiled(name, kinds, gpu):
    """The kernel's assembly by kind of file."""
    kernel, constants = KERNELS[name]
    constants = {**constants, "kinds": KINDS[kinds]}
    types = {x: "constexpr" if x in constants else TYPES.get(x, "*fp64") for x in kernel.arg_names}
    position = kernel.arg_names.index
    source = ASTSource(
        fn=kernel,
        signature=types,
        constexprs={(position(x),): value for x, value in constants.items()},
        attrs={(position(x),): [["tt.divisibility", 16]] for x in ("table", "partials", "tickets")},
    )
    return triton.compile(source, target=GPUS[gpu], options={"num_warps": 4, "enable_fp_fusion": False}).asm


@pytest.mark.parametrize("kinds", KINDS)
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("gpu", ["sm_80", "sm_90", "sm_100"])
def test_ptx(name, kinds, gpu, tmp_path):
    ptx = compiled(name, kinds, gpu)["ptx"]
    assert re.search(r"ld\.global\S*\.v4\.b32", ptx)
    if name == "adamw_update":
        assert re.search(r"st\.global\S*\.v4\.b32", ptx)
        assert "div.rn.f32" in ptx
        assert "sqrt.rn.f32" in ptx
        assert not re.search(r"\bfma\.|\.approx|\.ftz|div\.full", ptx)
    binaries = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    blackwell = binaries / "ptxas-blackwell"
    ptxas = blackwell if gpu == "sm_100" and blackwell.exists() else binaries / "ptxas"
    file = tmp_path / "kernel.ptx"
    file.write_text(ptx)
    target = re.search(r"\.target (\w+)", ptx).group(1)
    command = [ptxas, "-v", "--fmad=false", f"--gpu-name={target}", file, "-o", tmp_path / "kernel.cubin"]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert re.search(r"Used \d+ registers", run.stderr)
    # Three kinds of rows in one kernel is the most that is asked of it; on sm_80 that spills one register.
    allowed = 8 if kinds == "mixed" and gpu == "sm_80" else 0
    assert int(re.search(r"(\d+) bytes spill stores", run.stderr).group(1)) <= allowed


@pytest.mark.parametrize("name", KERNELS)
def test_amd(name):
    assembly = compiled(name, "fp32", "gfx942")["amdgcn"]
    assert "global_load_dwordx4" in assembly
    assert re.search(r"\.vgpr_spill_count: +0\b", assembly)
    if name == "adamw_update":
        assert "global_store_dwordx4" in assembly
