"""Runs `mx.fast.metal_kernel` kernels on the CPU of any Linux machine, and checks them while they run."""

from .build import check
from .clang import available
from .errors import MetalError
from .kernel import MetalKernel, metal_kernel, options

__all__ = ["MetalError", "MetalKernel", "available", "check", "metal_kernel", "options"]
