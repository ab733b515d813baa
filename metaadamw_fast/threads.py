"""Small operations of the CPU in the thread that asks for them."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


def _function(name: str) -> Callable[[int], Any] | None:
    """A C function of the libraries that torch itself is linked with; None where they do not have it."""
    try:
        return getattr(ctypes.CDLL(torch._C.__file__), name)  # type: ignore[no-any-return]
    except (AttributeError, OSError):
        return None


# OpenMP keeps the number of threads per calling thread. MKL keeps a second number, also per thread; 0 stands for "as the process".
_set_openmp_threads = _function("omp_set_num_threads")
_set_mkl_threads = _function("MKL_Set_Num_Threads_Local")


@contextmanager
def one_thread() -> Iterator[None]:
    """Inside, torch's operations on the CPU run in the calling thread alone.

    Matrix products, layer norms and softmaxes of a few rows wake all threads of torch otherwise. That costs more than it saves,
    and in a child of ``fork()``, which does not have the threads that its parent had, the operation never returns.

    Only the calling thread's own setting changes: ``torch.set_num_threads`` would change that of the process. Where torch is built
    without OpenMP, nothing changes.
    """
    before = torch.get_num_threads()  # also lets torch give a new thread the number of the process, which it does once
    if before == 1 or _set_openmp_threads is None:
        yield
        return
    _set_openmp_threads(1)
    mkl_before = 0 if _set_mkl_threads is None else _set_mkl_threads(1)
    try:
        yield
    finally:
        _set_openmp_threads(before)
        if _set_mkl_threads is not None:
            _set_mkl_threads(mkl_before)
