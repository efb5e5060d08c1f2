"""Fused float8 kernels for FLUX on Hopper, each beside its reference in plain PyTorch, and the blocks built from them.

Importing this package needs neither Triton nor a GPU; `ops.triton_ops()` needs Triton, and its kernels a GPU.
"""
