"""How MLX wraps a kernel for CUDA, after its `custom_kernel.cpp`: the text that `mx.fast.cuda_kernel` would compile."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

HEADER = """
#include <cstdint>
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
namespace mlx::core::cu {
template <typename T> struct Dims {
  T values[10];
  __host__ __device__ const T& operator[](int i) const { return values[i]; }
};
using Shape = Dims<int32_t>;
using Strides = Dims<int64_t>;
}
"""
TYPES = {
    mx.float32: "float", mx.float16: "__half", mx.bfloat16: "__nv_bfloat16", mx.uint32: "uint32_t",
    mx.int32: "int32_t", mx.uint8: "uint8_t", mx.bool_: "bool",
}  # fmt: skip


@dataclass
class Recorder:
    """Takes the place of `mx.fast.cuda_kernel`: its kernels return zeros, and ``sources`` keeps what was launched."""

    sources: dict[str, str] = field(default_factory=dict)

    def cuda_kernel(
        self, name: str, input_names: Sequence[str], output_names: Sequence[str], source: str, header: str = ""
    ) -> Any:
        def launch(
            inputs: Sequence[mx.array],
            template: Sequence[tuple[str, Any]],
            grid: tuple[int, int, int],
            threadgroup: tuple[int, int, int],
            output_shapes: Sequence[tuple[int, ...]],
            output_dtypes: Sequence[mx.Dtype],
        ) -> list[mx.array]:
            assert all(g % t == 0 for g, t in zip(grid, threadgroup, strict=True)), "CUDA has only whole blocks"
            assert threadgroup[0] * threadgroup[1] * threadgroup[2] % 32 == 0
            assert all(array.ndim for array in inputs), "a 0-d input is a pointer on CUDA and a reference on Metal"
            text = wrap(name, source, header, input_names, inputs, output_names, output_dtypes, template)
            self.sources[f"{name}_{len(self.sources)}"] = text
            return [mx.zeros(s, d) for s, d in zip(output_shapes, output_dtypes, strict=True)]

        return launch


def wrap(
    name: str,
    source: str,
    header: str,
    input_names: Sequence[str],
    inputs: Sequence[mx.array],
    output_names: Sequence[str],
    output_dtypes: Sequence[mx.Dtype],
    template: Sequence[tuple[str, Any]],
) -> str:
    """The whole CUDA source of one launch."""
    parameters = []
    for key, array in zip(input_names, inputs, strict=True):
        parameters.append(f"const {TYPES[array.dtype]}* {key}")
        for suffix, kind in (("shape", "Shape"), ("strides", "Strides"), ("ndim", "int")):
            if f"{key}_{suffix}" in source:
                parameters.append(f"const __grid_constant__ {kind} {key}_{suffix}")
    parameters += [f"{TYPES[dtype]}* {key}" for key, dtype in zip(output_names, output_dtypes, strict=True)]
    lines = []
    for key, value in template:
        if isinstance(value, mx.Dtype):
            lines.append(f"using {key} = {TYPES[value]};")
        else:
            kind = "bool" if isinstance(value, bool) else "int"
            lines.append(f"constexpr {kind} {key} = {str(value).lower()};")
    return (
        f"{HEADER}{header}namespace mlx::core::cu {{\nnamespace cg = cooperative_groups;\n"
        f"__global__ void custom_kernel_{name}({', '.join(parameters)}) {{\n"
        + "\n".join(lines) + f"\n{source}\n}}\n}}\n"
    )  # fmt: skip
