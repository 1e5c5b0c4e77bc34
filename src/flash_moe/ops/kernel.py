"""A kernel: one Metal source, launched through MLX on the current device.

The body of kernel ``name`` is in ``kernels/name.metal``. Helper functions that several kernels share are in header
files. MLX compiles the text for Apple GPUs; for NVIDIA GPUs, :mod:`.cuda` adapts it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cached_property
from typing import Any
from zlib import crc32

import mlx.core as mx

from . import kernel_sources
from .cuda import cuda_source

Template = Sequence[tuple[str, int | bool | mx.Dtype]]
SIMD = 32  # threads of a simdgroup, and of a warp
_INTEGERS = (mx.uint32, mx.int32)
_poisoned: ContextVar[bool] = ContextVar("flash_moe_poisoned", default=False)


def back_end() -> str | None:
    """Returns the back end of kernels: "metal", "cuda", or None without a GPU. Tests replace it by an emulator."""
    if mx.default_device() == mx.cpu:
        return None
    return "metal" if mx.metal.is_available() else "cuda"


@contextmanager
def poisoned() -> Iterator[None]:
    """Fills outputs inside the block with values that no kernel computes: NaN, or numbers outside the valid range."""
    token = _poisoned.set(True)
    try:
        yield
    finally:
        _poisoned.reset(token)


class Kernel:
    """A kernel that is compiled on first use.

    Args:
        name: stem of the Metal source.
        inputs, outputs: names of the buffers in the body.
        headers: stems of ``.h.metal`` files with helper functions, in order.
        defines: generated text before the headers, for code that templates cannot express.
    """

    def __init__(
        self,
        name: str,
        inputs: Sequence[str],
        outputs: Sequence[str],
        headers: Sequence[str] = (),
        defines: str = "",
    ) -> None:
        self.name, self.inputs, self.outputs = name, list(inputs), list(outputs)
        self._headers, self._defines = tuple(headers), defines
        self._compiled: dict[Any, Any] = {}  # compiled kernels by the function that compiled them

    @cached_property
    def body(self) -> str:
        """The Metal text of the kernel's body."""
        return kernel_sources.read(f"{self.name}.metal")

    @cached_property
    def header(self) -> str:
        """The Metal text of the kernel's helper functions."""
        return self._defines + "".join(kernel_sources.read(f"{stem}.h.metal") for stem in self._headers)

    def _compile(self) -> Any:
        on_cuda = back_end() == "cuda"
        make = mx.fast.cuda_kernel if on_cuda else mx.fast.metal_kernel
        if make not in self._compiled:
            body, header = self.body, self.header
            if on_cuda:
                body, header = cuda_source(self.name, self._headers, self._defines)
            # MLX recompiles a kernel if its text changes under the same name
            name = f"{self.name}_{crc32(self._defines.encode()):08x}" if self._defines else self.name
            self._compiled[make] = make(
                name=name, input_names=self.inputs, output_names=self.outputs, source=body, header=header
            )
        return self._compiled[make]

    def __call__(
        self,
        inputs: Sequence[mx.array],
        *,
        template: Template,
        grid: tuple[int, int, int],
        threadgroup: tuple[int, int, int],
        output_shapes: Sequence[tuple[int, ...]],
        output_dtypes: Sequence[mx.Dtype],
    ) -> list[mx.array]:
        """Launches the kernel.

        Args:
            grid: threads along x, y, z. They must be multiples of ``threadgroup``, because CUDA has only whole blocks.
            threadgroup: threads of one threadgroup along x, y, z. Their total number must be a multiple of 32.
        """
        options: dict[str, float] = {}
        if _poisoned.get():
            whole = any(dtype in _INTEGERS for dtype in output_dtypes)  # these have no NaN
            options["init_value"] = 1e9 if whole else float("nan")
        return self._compile()(
            inputs=list(inputs), template=list(template), grid=grid, threadgroup=threadgroup,
            output_shapes=list(output_shapes), output_dtypes=list(output_dtypes), **options,
        )  # fmt: skip
