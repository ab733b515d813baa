"""What nvcc and Triton make of the kernels: PTX, SASS and ptxas's report of each, by its name. Needs no GPU.

Shared by the tests (test_cuda_build.py, test_triton_compile.py) and by `python -m bench.kernels`.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import re
import runpy
import shutil
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent
ARCHITECTURES = ("8.0", "9.0", "10.0")  # for nvcc; Triton's targets are 80, 90, 100


class Kernel(NamedTuple):
    """One kernel, compiled for one architecture."""

    ptx: str
    sass: str
    report: str  # what ptxas says of it
    warps: int | None = None  # Triton's choice, where one is made
    dynamic_shared: int = 0  # bytes that the launch asks for

    def _number(self, pattern: str, default: int | None = None) -> int:
        found = re.search(pattern, self.report)
        if found is None and default is None:
            raise ValueError(f"ptxas does not say {pattern!r}:\n{self.report}")
        return default if found is None else int(found[1])  # type: ignore[return-value]

    @property
    def registers(self) -> int:
        """Per thread."""
        return self._number(r"Used (\d+) registers")

    @property
    def shared(self) -> int:
        """Bytes per block."""
        return self._number(r"(\d+) bytes smem", 0) + self.dynamic_shared

    @property
    def spills(self) -> int:
        """Bytes written to local memory for want of registers."""
        return self._number(r"(\d+) bytes spill stores")

    @property
    def threads(self) -> int:
        """Per block, as the kernel's bounds or Triton's options say."""
        if self.warps is not None:
            return 32 * self.warps
        found = re.search(r"\.maxntid (\d+)", self.ptx)
        if found is None:
            raise ValueError("the kernel has no __launch_bounds__, so its PTX does not say how many threads a block has")
        return int(found[1])


# ------------------------------------------------------------------------------------------------------------------ nvcc


@functools.cache
def build() -> dict[str, Any]:
    """The names in setup.py, which says how the extension is built."""
    return runpy.run_path(str(ROOT / "setup.py"), run_name="setup")


def sources_hash(csrc: Path = ROOT / "csrc") -> str:
    """SHA-256 over the sources of all kernels, by which predictions tell whether they are of these."""
    digest = hashlib.sha256()
    for path in (*build()["source_files"](csrc), *sorted((ROOT / "kernels").glob("*.py"))):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def cuda_home() -> Path | None:
    """Where nvcc lives, None if there is none."""
    home: Path | None = build()["cuda_home"]()
    return home


def disassembler() -> str:
    """Nvdisasm of the toolkit, or Triton's: some packages of nvcc come without."""
    triton, home = importlib.util.find_spec("triton"), cuda_home()
    directories = [home / "bin"] if home else []
    if triton is not None and triton.origin is not None:
        directories.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin")
    path = os.pathsep.join([*map(str, directories), os.environ.get("PATH", "")])
    found = shutil.which("nvdisasm", path=path)
    if found is None:
        raise FileNotFoundError("there is no nvdisasm, neither with nvcc nor with Triton")
    return found


def disassembled(cubin: Path) -> str:
    """The SASS of all kernels in a cubin."""
    return subprocess.run([disassembler(), "-c", str(cubin)], capture_output=True, text=True, check=True).stdout


def kernel_names(mangled: list[str]) -> list[str]:
    """``measure_kernel<metaadamw::AdamW, false>`` for each mangled name."""
    text = subprocess.run(["c++filt"], input="\n".join(mangled), capture_output=True, text=True, check=True).stdout
    names = []
    for line in text.splitlines():
        found = re.search(r"(\w+(?:<[^()]*>)?)\(", line)
        names.append(found[1] if found else line)
    return names


def sections(text: str, start: str) -> dict[str, str]:
    """The parts of a text that begin with a match of ``start``, whose group is a kernel's mangled name."""
    parts = re.split(start, text)[1:]
    return dict(zip(kernel_names(parts[::2]), parts[1::2], strict=True))


def compile_cuda(architecture: str, directory: Path, sources: Path | None = None) -> dict[str, Kernel]:
    """Every kernel of csrc/cuda.cu, or of that in another folder ``sources``, with the flags of setup.py.

    Raises:
        RuntimeError: nvcc fails; its message.
    """
    from torch.utils.cpp_extension import include_paths

    directory.mkdir(parents=True)
    command = build()["nvcc_command"](cuda_home(), include_paths(), [architecture])
    place = command.index("-c")
    command[place : place + 2] = ["-cubin", str((sources or ROOT / "csrc") / "cuda.cu")]
    cubin = directory / "cuda.cubin"
    keep = ["-o", str(cubin), "--keep", "--keep-dir", str(directory), "-Xptxas", "-v"]
    run = subprocess.run([*command, *keep], capture_output=True, text=True)
    if run.returncode != 0:
        raise RuntimeError(f"nvcc for {architecture} fails:\n{run.stderr}")
    (ptx,) = directory.glob("*.ptx")
    texts = [
        sections(ptx.read_text(), r"\.entry (\w+)"),
        sections(disassembled(cubin), r"\n\s*\.section\s+\.text\.(\w+)"),
        sections(run.stderr, r"Compiling entry function '(\w+)'"),
    ]
    if not set(texts[0]) == set(texts[1]) == set(texts[2]):
        raise RuntimeError(f"PTX, SASS and ptxas's report name other kernels: {[sorted(x) for x in texts]}")
    return {name: Kernel(*(x[name] for x in texts)) for name in texts[0]}


# ---------------------------------------------------------------------------------------------------------------- Triton


def kind(*codes: int, strided: bool = False) -> int:
    """Dtypes of gradient, momentum, parameter, second moment, maximum: 1 float32, 2 bfloat16, 3 float16, 4 float64."""
    from metaadamw_fast.kernels.elements import STRIDED_KIND

    return sum(code << (4 * i) for i, code in enumerate(codes)) | STRIDED_KIND * strided


# Types of a launch, by the names of the kernels' arguments; whatever is not here is a vector of float64.
TRITON_TYPES = dict.fromkeys(("table", "order", "begin", "group_of"), "*i64") | {"tickets": "*i32", "go": "*i1"}
TRITON_TYPES |= dict.fromkeys(("out", "statistics", "template", "features", "numel", "scales", "scaled", "norm"), "*fp32")
TRITON_TYPES |= dict.fromkeys(("tensors", "chunks", "width", "dim", "ahead", "total_steps", "row_stride", "group_stride"), "i32")
TRITON_TYPES |= {"rounding_seed": "i64", "max_norm_bits": "i64", "loss_scale": "*fp32"}
TRITON_TYPES |= dict.fromkeys(("clip_bits", "lion1_bits", "lion2_bits"), "i64")
TRITON_TYPES |= {"set_of": "*i64", "freeze_steps": "i32", "flags": "i32"}


def triton_assembly(kernel: Any, constants: dict[str, Any], target: Any, **options: Any) -> Any:
    """A Triton kernel compiled ahead of time, for arguments of the types above or ``constants``; ``.asm`` has each stage."""
    import triton
    from triton.compiler import ASTSource

    names = kernel.arg_names
    source = ASTSource(
        fn=kernel,
        signature={name: "constexpr" if name in constants else TRITON_TYPES.get(name, "*fp64") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in ("table", "partials", "tickets") if name in names},
    )
    return triton.compile(source, target=target, options=options)


def ptxas_report(ptx: str, architecture: int, directory: Path) -> tuple[str, Path]:
    """What Triton's ptxas says of a kernel, and the cubin that it writes."""
    from triton.backends.nvidia.compiler import get_ptxas

    (directory / "kernel.ptx").write_text(ptx)
    target = re.search(r"\.target (\w+)", ptx)
    assert target is not None
    cubin = directory / "kernel.cubin"
    command = [get_ptxas(architecture).path, "-v", "--fmad=false", f"--gpu-name={target[1]}", "kernel.ptx", "-o", str(cubin)]
    return subprocess.run(command, cwd=directory, capture_output=True, text=True, check=True).stderr, cubin


def compile_triton(kernel: Any, constants: dict[str, Any], architecture: int, directory: Path, **options: Any) -> Kernel:
    """A Triton kernel for an NVIDIA GPU, with Triton's own ptxas."""
    from triton.backends.compiler import GPUTarget

    directory.mkdir(parents=True, exist_ok=True)
    made = triton_assembly(kernel, constants, GPUTarget("cuda", architecture, 32), enable_fp_fusion=False, **options)
    report, cubin = ptxas_report(made.asm["ptx"], architecture, directory)
    return Kernel(made.asm["ptx"], disassembled(cubin), report, made.metadata.num_warps, made.metadata.shared)
