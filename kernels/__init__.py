"""Triton kernels, installed as metaadamw_fast.kernels. Importing this imports Triton; nothing here imports the rest of the library."""

from .launch import TritonBackend, TritonLaunch

__all__ = ["TritonBackend", "TritonLaunch"]
