"""Triton kernels, installed as metaadamw_fast.kernels: `launch` has the ops. Nothing here imports the rest of the library."""
