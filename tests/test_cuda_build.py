"""csrc/cuda.cu through nvcc, without a GPU: the registers its kernels take, the instructions they may and may not have."""

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from bench import loops
from bench.compiled import ARCHITECTURES, compile_cuda, cuda_home

ROOT = Path(__file__).parent.parent
STATS = (loops.STATS, loops.STATS.replace("false", "true"))  # without and with counts
# With the sums of what it finds (lagged mode) or without, rounding by chance or to the nearest.
UPDATES = (loops.UPDATE, loops.STOCHASTIC, loops.FOUND, loops.BOTH)
MASTERS = tuple(x.replace("update", "update_masters") for x in UPDATES)  # with low-precision parameters
AVGRAD_STATS = "measure_kernel<metaadamw::AVGrad, false>"
AVGRAD_UPDATES = tuple(x.replace("AdamW", "AVGrad") for x in (loops.UPDATE, loops.STOCHASTIC, *MASTERS[:2]))
# MADA: clipping alone, then all sums; without and with found sums, each for all roundings and masters.
MADA_STATS = tuple(f"measure_kernel<metaadamw::Mada, {extra}>" for extra in ("false", "true"))
MADA_UPDATES = tuple(f"update_kernel<metaadamw::Mada, {found}, true>" for found in ("false", "true"))
ONLINE_STATS, ONLINE_UPDATES = (tuple(x.replace("Mada", "OnlineAdamW") for x in xs) for xs in (MADA_STATS, MADA_UPDATES))
ALL_STATS = (*STATS, AVGRAD_STATS, *MADA_STATS, *ONLINE_STATS)
ALL_UPDATES = (*UPDATES, *MASTERS, *AVGRAD_UPDATES, *MADA_UPDATES, *ONLINE_UPDATES)
KERNELS = ALL_STATS + ALL_UPDATES
POLICY = (
    "group_features_kernel<float>",
    "group_features_kernel<double>",
    "scaled_gradients_kernel<float>",
    "scaled_gradients_kernel<double>",
    "vectors_kernel<metaadamw::ModulationInput>",
    "vectors_kernel<metaadamw::HyperparameterInput>",
    "mada_policy_kernel",
)  # a few numbers per tensor

pytestmark = pytest.mark.skipif(not cuda_home(), reason="there is no nvcc")


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    directory = tmp_path_factory.mktemp("nvcc")
    with ThreadPoolExecutor(2) as pool:
        jobs = {name: pool.submit(compile_cuda, name, directory / name) for name in ARCHITECTURES}
    made = {name: job.result() for name, job in jobs.items()}
    assert all(set(x) == set(KERNELS + POLICY) for x in made.values()), sorted(made["9.0"])
    return made


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
        **dict.fromkeys(MASTERS, budget("kUpdateBlocksWithMasters")),
        AVGRAD_STATS: budget("kMeasureBlocks"),
        AVGRAD_UPDATES[0]: budget("kUpdateBlocks"),
        **dict.fromkeys(AVGRAD_UPDATES[1:], budget("kUpdateBlocksWithMasters")),
        MADA_STATS[0]: budget("kMeasureBlocks"),
        MADA_STATS[1]: budget("kBlocksOfMany"),
        MADA_UPDATES[0]: budget("kBlocksOfMany"),
        MADA_UPDATES[1]: 255,  # one block of its own
        ONLINE_STATS[0]: budget("kMeasureBlocks"),
        ONLINE_STATS[1]: budget("kBlocksOfMany"),
        ONLINE_UPDATES[0]: budget("kBlocksOfMany"),
        ONLINE_UPDATES[1]: 255,
    }
    of_many = [64, 128, 128, 255]
    assert [*budgets.values()] == [64, 80, 80, 80, 128, 128, *[128] * 4, 64, 80, *[128] * 3, *of_many, *of_many]
    for kernel in KERNELS:
        assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in one[kernel].report, kernel
        assert one[kernel].registers <= budgets[kernel], kernel
        assert not re.search(r"\b(LDL|STL)\b", one[kernel].sass), f"{kernel} uses local memory"


def test_kernels_around_the_encoder_spill_nothing(one):
    for kernel in POLICY:
        assert "0 bytes spill stores, 0 bytes spill loads" in one[kernel].report, kernel


def test_accesses_of_16_bytes_to_global_memory(one):
    for kernel in KERNELS:
        sass = one[kernel].sass
        loads, stores = re.findall(r"\bLDG\.E[.\w]*", sass), re.findall(r"\bSTG\.E[.\w]*", sass)
        # Four tensors are read whatever the dtypes are, one to clip alone; the update writes three, with amsgrad four. MADA's sums
        # read all but p, its updates more; these write six states and a gradient.
        all_of_mada = kernel in (MADA_STATS[1], *MADA_UPDATES)
        at_least = 1 if kernel in (AVGRAD_STATS, MADA_STATS[0]) else 8 if all_of_mada else 4
        assert sum(".128" in x for x in loads) >= at_least, kernel
        if kernel in UPDATES + MASTERS:
            assert sum(".128" in x for x in stores) >= 3 + 4
        if kernel in AVGRAD_UPDATES:
            assert sum(".128" in x for x in stores) >= 4
        if kernel in MADA_UPDATES + ONLINE_UPDATES:
            assert sum(".128" in x for x in stores) >= (7 if kernel in MADA_UPDATES else 4 + 5)
        assert not re.search(r"\b(LD|ST)\.E", sass), f"{kernel} does not know that an address is global"


# Seven states and the gradient, of which it writes six and the gradient.
OF_MADA = loops.Case("MADA; fp32", MADA_UPDATES[0], (4,) * 8, (4,) * 7, "float32")


@pytest.mark.parametrize("case", [*(x for x in loops.cases() if x.whole), OF_MADA], ids=lambda x: x.name)
def test_all_operands_are_under_way_together(one, case):
    """A thread waits for the loads of one group together, never for one after the other."""
    loop = loops.cuda_loop(one[case.kernel], case)
    assert loop.bytes_in_flight > 0.99 * loop.elements * sum(case.loads)


def test_the_only_atomics_count_chunks(one):
    for kernel in KERNELS:
        atomics = re.findall(r"\b(?:ATOM|ATOMG|RED|REDG|ATOMS)\.[.\w]*", one[kernel].sass)
        assert bool(atomics) == (kernel not in (*AVGRAD_UPDATES, MADA_UPDATES[0])), kernel  # they make no sums
        assert not [x for x in atomics if re.search(r"\.B?F\d\d", x)], "float atomics: sums would not be repeatable"


def test_no_fused_approximate_or_flushing_operation(one):
    for kernel in KERNELS:
        wrong = re.findall(r"\b(?:fma\.\S+|mad\.\S*f\d\d|\w+\.\S*(?:approx|ftz)\S*)", one[kernel].ptx)
        assert not wrong, (kernel, set(wrong))
    for operation in ("div.rn.f32", "sqrt.rn.f32", "div.rn.f64", "sqrt.rn.f64"):
        assert all(operation in one[kernel].ptx for kernel in ALL_UPDATES)


def test_an_extension_with_the_kernels_loads_where_there_is_no_gpu(tmp_path):
    """Also with a torch that was built without CUDA. (Where there is a GPU, other tests run them.)"""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("csrc", "kernels", "metaadamw_fast"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    environment = {**os.environ, "METAADAMW_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "9.0+PTX"}
    # Whether it loads does not depend on how well it is compiled.
    environment["NVCC_APPEND_FLAGS"] = "-Xcicc -O0 -Xptxas -O0"
    compiler = tmp_path / "c++"
    compiler.write_text(f'#!/bin/sh\nexec {os.environ.get("CXX", "c++")} "$@" -O0\n')
    compiler.chmod(0o755)
    environment["CXX"] = str(compiler)
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
