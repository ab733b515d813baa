"""csrc/cuda.cu through nvcc, without a GPU: the registers its kernels take, the instructions they may and may not have."""

import importlib.util
import os
import re
import runpy
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
from torch.utils.cpp_extension import include_paths

ROOT = Path(__file__).parent.parent
SETUP = runpy.run_path(str(ROOT / "setup.py"), run_name="setup") if (ROOT / "setup.py").exists() else None
HOME = SETUP and SETUP["cuda_home"]()
ARCHITECTURES = ("8.0", "9.0", "10.0")
STATS = ("tensor_stats_kernelILb0", "tensor_stats_kernelILb1")  # as mangled: without and with counts
# With the sums of what it finds (lagged mode) or without, rounding by chance or to the nearest.
UPDATES = tuple(f"adamw_update_kernelILb{found}ELb{chance}" for found in (0, 1) for chance in (0, 1))
KERNELS = STATS + UPDATES
POLICY = (
    "group_features_kernelIfE",
    "group_features_kernelIdE",
    "scaled_gradients_kernelIfE",
    "scaled_gradients_kernelIdE",
    "vectors_kernelINS_15ModulationInputE",
    "vectors_kernelINS_19HyperparameterInputE",
)  # a few numbers per tensor

pytestmark = pytest.mark.skipif(not HOME, reason="there is no nvcc")


class Compiled(NamedTuple):
    """Texts by kernel: the PTX, the SASS, and what ptxas reports. Those on elements, and what ptxas says of the others."""

    ptx: dict
    sass: dict
    report: dict
    policy_report: dict


def disassembler():
    """nvdisasm of the toolkit, or Triton's; some packages of nvcc come without."""
    triton = importlib.util.find_spec("triton")
    directories = [HOME / "bin", *([Path(triton.origin).parent / "backends/nvidia/bin"] if triton else [])]
    found = shutil.which("nvdisasm", path=":".join(map(str, directories))) or shutil.which("nvdisasm")
    assert found, "there is an nvcc, but no nvdisasm"
    return found


def sections(text, start):
    """The parts of a text that begin with a match of ``start``, by the kernel named there."""
    parts = re.split(start, text)[1:]
    return {next(k for k in KERNELS + POLICY if k in name): body for name, body in zip(parts[::2], parts[1::2], strict=True)}


def compile_for(architecture, directory):
    directory.mkdir()
    command = SETUP["nvcc_command"](HOME, include_paths(), [architecture])
    command[command.index("-c")] = "-cubin"
    cubin = directory / "cuda.cubin"
    keep = ["-o", str(cubin), "--keep", "--keep-dir", str(directory), "-Xptxas", "-v"]
    run = subprocess.run([*command, *keep], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    (ptx,) = directory.glob("*.ptx")
    sass = subprocess.run([disassembler(), "-c", str(cubin)], capture_output=True, text=True, check=True).stdout
    texts = [
        sections(ptx.read_text(), r"\.entry (\w+)"),
        sections(sass, r"\n\s*\.section\s+(\.text\.\w+)"),
        sections(run.stderr, r"Compiling entry function '(\w+)'"),
    ]
    assert all(set(x) == set(KERNELS + POLICY) for x in texts)
    on_elements = [{name: x[name] for name in KERNELS} for x in texts]
    return Compiled(*on_elements, {name: texts[-1][name] for name in POLICY})


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    directory = tmp_path_factory.mktemp("nvcc")
    with ThreadPoolExecutor(2) as pool:
        jobs = {name: pool.submit(compile_for, name, directory / name) for name in ARCHITECTURES}
    return {name: job.result() for name, job in jobs.items()}


@pytest.fixture(params=ARCHITECTURES)
def one(request, compiled):
    return compiled[request.param]


def test_registers_and_no_spills(one):
    constants = dict(re.findall(r"constexpr int (k\w+) = (\d+);", (ROOT / "csrc" / "mapping.h").read_text()))

    def budget(blocks):
        return 65536 // (int(constants["kThreads"]) * int(constants[blocks])) // 8 * 8  # registers are handed out by the eight

    budgets = {
        STATS[0]: budget("kMeasureBlocks"),
        STATS[1]: budget("kMeasureBlocksWithCounts"),
        **dict.fromkeys(UPDATES[:2], budget("kUpdateBlocks")),
        **dict.fromkeys(UPDATES[2:], budget("kUpdateBlocksWithFoundSums")),
    }
    assert [*budgets.values()] == [64, 80, 80, 80, 128, 128]
    for kernel, report in one.report.items():
        assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in report, kernel
        assert int(re.search(r"Used (\d+) registers", report)[1]) <= budgets[kernel], kernel
        assert not re.search(r"\b(LDL|STL)\b", one.sass[kernel]), f"{kernel} uses local memory"


def test_kernels_around_the_encoder_spill_nothing(one):
    for kernel, report in one.policy_report.items():
        assert "0 bytes spill stores, 0 bytes spill loads" in report, kernel


def test_accesses_of_16_bytes_to_global_memory(one):
    for kernel, sass in one.sass.items():
        loads, stores = re.findall(r"\bLDG\.E[.\w]*", sass), re.findall(r"\bSTG\.E[.\w]*", sass)
        # Four tensors are read whatever the dtypes are; the update writes three, with amsgrad four.
        assert sum(".128" in x for x in loads) >= 4, kernel
        if kernel in UPDATES:
            assert sum(".128" in x for x in stores) >= 3 + 4
        assert not re.search(r"\b(LD|ST)\.E", sass), f"{kernel} does not know that an address is global"


def test_the_only_atomics_count_chunks(one):
    for kernel, sass in one.sass.items():
        atomics = re.findall(r"\b(?:ATOM|ATOMG|RED|REDG|ATOMS)\.[.\w]*", sass)
        assert atomics, kernel
        assert not [x for x in atomics if re.search(r"\.B?F\d\d", x)], "float atomics: sums would not be repeatable"


def test_no_fused_approximate_or_flushing_operation(one):
    for kernel, ptx in one.ptx.items():
        wrong = re.findall(r"\b(?:fma\.\S+|mad\.\S*f\d\d|\w+\.\S*(?:approx|ftz)\S*)", ptx)
        assert not wrong, (kernel, set(wrong))
    for operation in ("div.rn.f32", "sqrt.rn.f32", "div.rn.f64", "sqrt.rn.f64"):
        assert all(operation in one.ptx[kernel] for kernel in UPDATES)


def test_an_extension_with_the_kernels_loads_where_there_is_no_gpu(tmp_path):
    """Also with a torch that was built without CUDA. (Where there is a GPU, other tests run them.)"""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("csrc", "kernels", "metaadamw_fast"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    environment = {**os.environ, "METAADAMW_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "9.0+PTX"}
    build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    built = subprocess.run(build, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    assert "building the CUDA kernels: METAADAMW_CUDA=1" in built.stdout
    lines = (
        "import torch, metaadamw_fast as m, metaadamw_fast._C as c",
        "assert c.__file__.startswith(m.__path__[0]) and c.cuda_architectures == '9.0+PTX', c.cuda_architectures",
        "p = torch.nn.Parameter(torch.ones(3)); opt = m.MetaAdamW([p], lr=0.1, backend='cpp'); p.grad = torch.ones(3)",
        "opt.step(); assert (p < 0.95).all(); print(m.backend_report('cuda'))",
    )
    code = "import sys; sys.path.insert(0, '.')\n" + "\n".join(lines)
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=hidden, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "cuda: auto runs reference" in run.stdout
    assert run.stdout.count("torch sees no GPU") == 2
