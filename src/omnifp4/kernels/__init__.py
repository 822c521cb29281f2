"""Kernels that run packed NVFP4 weights on a GPU, each with its reference in `reference`."""
