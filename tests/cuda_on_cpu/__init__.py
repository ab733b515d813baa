"""csrc/cuda.cu compiled for the CPU by g++: see cuda_on_cpu.h. A backend of its ops: tests/emulated.py."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils.cpp_extension import include_paths

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
SOURCES = ROOT / "csrc"
COMPILER = shutil.which(os.environ.get("CXX", "g++"))
CUDA_HEADERS = ("cuda_runtime.h", "cuda_fp16.h", "cuda_bf16.h")
FLAGS = [
    "-std=c++17", "-fPIC", "-pthread", "-fvisibility=hidden",
    "-ffp-contract=off",  # as nvcc's -fmad=false
    "-fno-strict-aliasing",  # kernels read numbers of all types as words
    "-Dmetaadamw_fast=metaadamw_emulated",  # the namespace of the ops
    "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000", '-DMETAADAMW_CUDA="emulated"', '-DMETAADAMW_SOURCE_HASH=""',
    '-DMETAADAMW_SOURCE_NAMES=""',
]  # fmt: skip


def unavailable() -> str | None:
    """Why nothing can be built here; None if it can."""
    if not SOURCES.is_dir():
        return "the C++ sources are not here"
    if COMPILER is None:
        return "there is no g++"
    return None if sys.platform == "linux" else "fibers and thread-local memory are those of Linux"


def with_launches_as_calls(text: str) -> str:
    """``kernel<<<grid, block>>>(x)`` as C++: see Launch in cuda_on_cpu.h. Lines stay where they are."""
    return re.sub(r"(\w+(?:<\w+>)?)<<<(.*?)>>>\(", r"emulated::Launch(\2).of([&](auto... x) { \1(x...); })(", text, flags=re.DOTALL)


class Edit(NamedTuple):
    """In a file of csrc/, soon after a text that it has once: the text ``old`` becomes ``new``."""

    file: str
    after: str
    old: str
    new: str = ""

    def of(self, text: str) -> str:
        if text.count(self.after) != 1:
            raise ValueError(f"csrc/{self.file} has this {text.count(self.after)} times instead of once: {self.after}")
        at = text.index(self.after) + len(self.after)
        before, soon, later = text[:at], text[at : at + 500], text[at + 500 :]
        if self.old not in soon:
            raise ValueError(f"csrc/{self.file} does not have this soon after {self.after!r}: {self.old}")
        return before + soon.replace(self.old, self.new, 1) + later


def build(edit: Edit | None = None, flags: tuple[str, ...] = ("-O2",)) -> Path:
    """The library, built if it is not there yet. Loaded by torch.ops.load_library it makes ``torch.ops.metaadamw_emulated``.

    Args:
        edit: a change of the sources, to break them.
        flags: more of the compiler's; a sanitizer's are for the kernels only.
    """
    setup = runpy.run_path(str(ROOT / "setup.py"), run_name="setup")
    sources = {path.name: path.read_text() for path in setup["source_files"]()}
    if edit is not None:
        sources[edit.file] = edit.of(sources[edit.file])
    for name in sources:
        if name.endswith((".cu", ".cuh")):
            sources[name] = with_launches_as_calls(sources[name])
    own = {path.name: path.read_text() for path in sorted(HERE.iterdir()) if path.suffix in (".h", ".cpp")}
    version = subprocess.run([COMPILER, "--version"], capture_output=True, text=True, check=True).stdout
    key = hashlib.sha256(repr((sources, own, FLAGS, flags, version, torch.__version__)).encode()).hexdigest()
    directory = ROOT / "build" / "cuda_on_cpu" / key[:16]
    library = directory / "emulated.so"
    (directory / "csrc").mkdir(parents=True, exist_ok=True)
    with (directory / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process may be at it
        if not library.exists():
            for name, text in sources.items():
                (directory / "csrc" / name).write_text(text)
            for name in CUDA_HEADERS:
                (directory / "csrc" / name).write_text('#include "cuda_on_cpu.h"\n')
            _compile(directory, flags).replace(library)
    return library


def _compile(directory: Path, flags: tuple[str, ...]) -> Path:
    includes = [f"-I{x}" for x in (HERE, directory / "csrc", sysconfig.get_paths()["include"], *include_paths())]
    units = {HERE / "ops.cpp": flags, directory / "csrc" / "ops.cpp": flags, HERE / "cuda_on_cpu.cpp": ("-O2",)}
    objects = [directory / f"{i}.o" for i in range(len(units))]
    processes = [
        subprocess.Popen([COMPILER, *FLAGS, *more, *includes, "-c", str(source), "-o", str(out)], stderr=subprocess.PIPE, text=True)
        for (source, more), out in zip(units.items(), objects, strict=True)
    ]
    for process in processes:
        errors = process.communicate()[1]
        if process.returncode != 0:
            raise RuntimeError(f"g++ failed:\n{errors}")
    unfinished = directory / "unfinished.so"
    shared = runpy.run_path(str(ROOT / "setup.py"), run_name="setup")["cxx_library"]()
    libraries = [*shared, f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch_cpu", "-ltorch", "-lc10"]
    subprocess.run([COMPILER, "-shared", "-pthread", *flags, *map(str, objects), *libraries, "-o", str(unfinished)], check=True)
    return unfinished
