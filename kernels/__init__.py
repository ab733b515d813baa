"""Triton kernels, installed as metaadamw_fast.kernels."""
