"""Builds the extension `metaadamw_fast._C`; everything else is in pyproject.toml.

METAADAMW_NO_EXTENSION=1 installs the pure-Python part alone. Without it a missing compiler is an error, never a silent omission.

METAADAMW_CUDA=1 builds the CUDA kernels, 0 leaves them out. By default they are built where there is an nvcc (in CUDA_HOME,
/usr/local/cuda or the PATH) and torch is a CUDA build; whether a GPU is visible does not matter. The decision is printed
(`pip install -v` shows it). TORCH_CUDA_ARCH_LIST says for which GPUs, as for torch's own extensions.
"""

import hashlib
import os
import re
import shutil
import subprocess
from pathlib import Path

from setuptools import setup

SOURCES = Path(__file__).parent / "csrc"
DEFAULT_ARCHITECTURES = "8.0;9.0;10.0+PTX"

TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # the stable ABI of torch 2.11: one build serves every later one
NVCC_FLAGS = [
    "-O3",
    "-std=c++17",
    "-fmad=false",  # as -ffp-contract=off on the CPU: the update has the same bits
    "--ftz=false",
    "--prec-div=true",
    "--prec-sqrt=true",
    "-Xcompiler=-fPIC,-fvisibility=hidden",
    "-DUSE_CUDA",
    TORCH_TARGET,
]


def source_files(directory: Path = SOURCES) -> list[Path]:
    """The C++ and CUDA sources in name order. Editors and people leave other things beside them, folders too."""
    found = [path for path in directory.iterdir() if path.suffix in (".h", ".cpp", ".cu", ".cuh")]
    return sorted(path for path in found if path.is_file() and not path.name.startswith("."))


def source_hash() -> str:
    """SHA-256 over the sources in name order; metaadamw_fast.ops computes the same to notice a stale build."""
    digest = hashlib.sha256()
    for path in source_files():
        digest.update(path.read_bytes())
    return digest.hexdigest()


def cuda_home() -> Path | None:
    """Where nvcc lives, None if there is none."""
    given = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if given:
        return Path(given) if (Path(given) / "bin" / "nvcc").exists() else None
    if (Path("/usr/local/cuda") / "bin" / "nvcc").exists():
        return Path("/usr/local/cuda")
    found = shutil.which("nvcc")
    return Path(found).resolve().parent.parent if found else None


def cuda_decision(torch_cuda: str | None) -> tuple[bool, str]:
    """Whether to build the CUDA kernels, and why. ``torch_cuda`` is the CUDA version that torch was built with."""
    wish, home = os.environ.get("METAADAMW_CUDA", ""), cuda_home()
    if wish not in ("", "0", "1"):
        raise SystemExit(f"metaadamw_fast: METAADAMW_CUDA={wish}: must be 0 or 1")
    if wish == "0":
        return False, "METAADAMW_CUDA=0"
    if home is None:
        if wish == "1":
            raise SystemExit("metaadamw_fast: METAADAMW_CUDA=1, but there is no nvcc: set CUDA_HOME to a CUDA toolkit")
        return False, "there is no nvcc (set CUDA_HOME)"
    if torch_cuda is None:
        if wish == "1":
            return True, f"METAADAMW_CUDA=1, with {home}; this torch is a CPU build, so they cannot run with it"
        return False, f"torch is a CPU build (METAADAMW_CUDA=1 compiles them all the same, with {home})"
    return True, f"{home}; torch has CUDA {torch_cuda}"


def architectures() -> list[str]:
    """Of TORCH_CUDA_ARCH_LIST: ``["8.0", "10.0+PTX"]``."""
    given = (
        re.split(r"[;,\s]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip()) if os.environ.get("TORCH_CUDA_ARCH_LIST") else []
    )
    chosen = given or DEFAULT_ARCHITECTURES.split(";")
    for name in chosen:
        if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", name):
            raise SystemExit(f"metaadamw_fast: TORCH_CUDA_ARCH_LIST has {name!r}: write numbers, as {DEFAULT_ARCHITECTURES!r}")
    return chosen


def nvcc_command(home: Path, includes: list[str], chosen: list[str]) -> list[str]:
    """The call that compiles csrc/cuda.cu, without its output."""
    targets = []
    for name in chosen:
        number = name.removesuffix("+PTX").replace(".", "")
        targets.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if name.endswith("+PTX"):
            targets.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    directories = [f"-I{path}" for path in includes]
    macro = f'-DMETAADAMW_CUDA="{",".join(chosen)}"'
    return [str(home / "bin" / "nvcc"), "-c", str(SOURCES / "cuda.cu"), *NVCC_FLAGS, macro, *targets, *directories]


def cxx_library() -> list[str]:
    """The libstdc++ that torch has loaded into this process, for the linker; nothing where there is none.

    A compiler that comes with the archive of it only would put a second copy into the extension, half of whose symbols the loader
    takes from the first: messages of errors are cut short, and throwing them crashes. A library that is named first goes before
    the compiler's own.
    """
    maps = Path("/proc/self/maps")
    found = re.search(r"/\S*/libstdc\+\+\.so\S*$", maps.read_text(), re.MULTILINE) if maps.exists() else None
    return [found[0]] if found else []


def extension():
    """The extension and its build command, or two empty values when the user asked for none."""
    if os.environ.get("METAADAMW_NO_EXTENSION") == "1":
        print("metaadamw_fast: METAADAMW_NO_EXTENSION=1, installing without the C++ extension")
        return [], {}
    try:
        import torch
        from torch.utils.cpp_extension import BuildExtension, CppExtension, include_paths
    except ImportError:
        raise SystemExit(
            "metaadamw_fast: torch is not importable in the build environment. Install torch >= 2.11 first, then run"
            " `pip install --no-build-isolation .`"
        ) from None
    compiler = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler) is None and shutil.which("g++") is None:
        raise SystemExit(
            f"metaadamw_fast: no C++ compiler found ({compiler}). Install g++ >= 9 (Debian: apt install g++),"
            " or set METAADAMW_NO_EXTENSION=1 to install the pure-Python part alone."
        )
    with_cuda, reason = cuda_decision(torch.version.cuda)
    chosen = architectures() if with_cuda else []
    print(f"metaadamw_fast: {'building' if with_cuda else 'leaving out'} the CUDA kernels: {reason}")
    if with_cuda:
        print(f"metaadamw_fast: for the GPU architectures {', '.join(chosen)}")

    class Build(BuildExtension):
        """Also compiles csrc/cuda.cu. torch's own way would refuse a CPU-only torch and ask which GPU is visible."""

        def build_extensions(self) -> None:
            home = cuda_home()
            if with_cuda and home is not None:
                compiled = Path(self.build_temp) / "cuda.o"
                compiled.parent.mkdir(parents=True, exist_ok=True)
                command = [*nvcc_command(home, include_paths(), chosen), "-o", str(compiled)]
                print(" ".join(command), flush=True)
                subprocess.run(command, check=True)
                (module,) = self.extensions
                module.extra_objects.append(str(compiled))
                # libcudart as a part of the extension: then it also loads where there is no CUDA.
                module.library_dirs += [str(path) for path in (home / "lib64", home / "targets/x86_64-linux/lib") if path.is_dir()]
                module.libraries += ["cudart_static", "rt", "dl", "pthread"]
                if torch.version.cuda is not None:  # only a weak symbol refers to it
                    module.extra_link_args += ["-Wl,--no-as-needed", "-ltorch_cuda"]
            super().build_extensions()

    module = CppExtension(
        name="metaadamw_fast._C",
        sources=[str(path.relative_to(Path(__file__).parent)) for path in source_files() if path.suffix == ".cpp"],
        depends=[str(path) for path in source_files()],
        extra_compile_args=[
            "-O3",
            "-std=c++17",
            "-fno-math-errno",  # or a vector square root would have to set errno
            "-ffp-contract=off",  # the same bits on every machine: see design of csrc/adamw.h
            "-fvisibility=hidden",
            "-Wall",
            "-Wno-psabi",
            "-DPy_LIMITED_API=0x030A0000",
            TORCH_TARGET,
            f'-DMETAADAMW_SOURCE_HASH="{source_hash()}"',
            f'-DMETAADAMW_SOURCE_NAMES="{",".join(path.name for path in source_files())}"',
            *([f'-DMETAADAMW_CUDA="{",".join(chosen)}"'] if with_cuda else []),
        ],
        extra_link_args=cxx_library(),
        py_limited_api=True,
    )
    return [module], {"build_ext": Build.with_options(use_ninja=shutil.which("ninja") is not None)}


if __name__ == "__main__":  # the tests read the flags
    ext_modules, cmdclass = extension()
    setup(
        ext_modules=ext_modules,
        cmdclass=cmdclass,
        options={"bdist_wheel": {"py_limited_api": "cp310"}} if ext_modules else {},
    )
