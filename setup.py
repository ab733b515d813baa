"""Builds the extension `metaadamw_fast._C`; everything else is in pyproject.toml.

METAADAMW_NO_EXTENSION=1 installs the pure-Python part alone. Without it a missing compiler is an error, never a silent omission.
"""

import hashlib
import os
import shutil
from pathlib import Path

from setuptools import setup

SOURCES = Path(__file__).parent / "csrc"


def source_hash() -> str:
    """SHA-256 over the C++ sources in name order; metaadamw_fast.ops computes the same to notice a stale build."""
    digest = hashlib.sha256()
    for path in sorted(SOURCES.iterdir()):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def extension():
    """The extension and its build command, or two empty values when the user asked for none."""
    if os.environ.get("METAADAMW_NO_EXTENSION") == "1":
        print("metaadamw_fast: METAADAMW_NO_EXTENSION=1, installing without the C++ extension")
        return [], {}
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
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
    module = CppExtension(
        name="metaadamw_fast._C",
        sources=[str(path.relative_to(Path(__file__).parent)) for path in sorted(SOURCES.glob("*.cpp"))],
        depends=[str(path) for path in sorted(SOURCES.glob("*.h"))],
        extra_compile_args=[
            "-O3",
            "-std=c++17",
            "-fno-math-errno",  # or a vector square root would have to set errno
            "-ffp-contract=off",  # the same bits on every machine: see design of csrc/adamw.h
            "-fvisibility=hidden",
            "-Wall",
            "-Wno-psabi",
            "-DPy_LIMITED_API=0x030A0000",
            "-DTORCH_TARGET_VERSION=0x020b000000000000",  # the stable ABI of torch 2.11: one build serves every later one
            f'-DMETAADAMW_SOURCE_HASH="{source_hash()}"',
        ],
        py_limited_api=True,
    )
    return [module], {"build_ext": BuildExtension.with_options(use_ninja=shutil.which("ninja") is not None)}


ext_modules, cmdclass = extension()
setup(
    ext_modules=ext_modules,
    cmdclass=cmdclass,
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if ext_modules else {},
)
