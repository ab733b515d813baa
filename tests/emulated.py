"""The backend "emulated": the C++ backend with the CUDA kernels, which run on the CPU (tests/cuda_on_cpu). For the tests alone.

With CUDA_ON_CPU=LIBRARY in the environment, `use()` loads that library and makes the backend known. As a plugin (`pytest -p
tests.emulated`) this puts the kernels in the place of those of "cpp", so that tests which never heard of them run on them.
"""

from __future__ import annotations

import ctypes
import os
from types import SimpleNamespace

import torch
from torch._ops import OpOverload

from metaadamw_fast import ops
from metaadamw_fast.launch import CppLaunch

from .cases import CHUNK_ON_GPU

LIBRARY = os.environ.get("CUDA_ON_CPU")


class Checked:
    """The ops of a namespace. One that takes a launch table must leave its copy as it was: the next launch reads the same."""

    def __init__(self, namespace):
        self._namespace = namespace

    def __getattr__(self, name):
        op = getattr(self._namespace, name).default

        def checked(table, copy, *others):
            result = op(table, copy, *others)
            # Not by torch's ops: a test may count them.
            copied_bytes = ctypes.c_int64.from_address(table.data_ptr()).value
            there, here = (ctypes.string_at(x.data_ptr(), copied_bytes) for x in (copy, table))
            assert there == here, f"{name} has left the launch table changed"
            return result

        takes_table = [x.name for x in op._schema.arguments][:2] == ["table", "copy"]
        setattr(self, name, SimpleNamespace(default=checked if takes_table else op))
        return getattr(self, name)


def use():
    """Whether the environment asks for the emulation, which then is ready."""
    if LIBRARY is None:
        return False
    if "emulated" not in ops.BACKENDS:
        torch.ops.load_library(LIBRARY)
        backend = type("EmulatedBackend", (ops.CppBackend,), {"name": "emulated", **_of_backend()})
        backend.launch = type("EmulatedLaunch", (CppLaunch,), _of_launch())
        ops.BACKENDS["emulated"] = lambda: backend
    return True


def pytest_configure():
    """Of the plugin."""
    if not use():
        raise RuntimeError("CUDA_ON_CPU must name a library: python -m tests.cuda_on_cpu builds one")
    for kind, attributes in ((ops.CppBackend, _of_backend()), (CppLaunch, _of_launch())):
        for name, value in attributes.items():
            setattr(kind, name, value)


def _of_launch():
    return {"namespace": Checked(torch.ops.metaadamw_emulated), "on_gpu": True, "chunk_size": CHUNK_ON_GPU}


def _of_backend():
    emulated = torch.ops.metaadamw_emulated
    found = {name: value.__func__ for name, value in vars(ops.CppBackend).items() if isinstance(value, staticmethod)}
    found = {name: op for name, op in found.items() if isinstance(op, OpOverload)}
    return {name: staticmethod(getattr(emulated, op._schema.name.split("::")[1]).default) for name, op in found.items()} | {
        "namespace": emulated
    }
