"""Compiles the Metal sources of our kernels as CUDA, after a prelude that defines the functions they use.

This file defines the subset of Metal that kernels may use. All other constructs of Metal raise an error with the line
when the kernel is built.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from zlib import crc32

from . import kernel_sources

_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.S)

# Names that the prelude defines. Every name after `metal::` must be one of these.
MATH = (
    *("abs", "as_type", "ceil", "clamp", "cos", "dot", "exp", "exp2", "fabs", "floor", "fma", "fmax", "fmin"),
    *("isfinite", "isinf", "isnan", "log", "log2", "max", "min", "pow", "rint", "round", "rsqrt", "select", "sign"),
    *("sin", "sqrt", "tanh", "trunc", "vec"),
)
FAST = ("cos", "exp", "exp2", "log", "log2", "pow", "sin")
SIMD = (
    *("simd_all", "simd_any", "simd_broadcast", "simd_max", "simd_min", "simd_shuffle", "simd_shuffle_down"),
    *("simd_shuffle_up", "simd_shuffle_xor", "simd_sum"),
)
_BLOCK = "(blockDim.x * blockDim.y * blockDim.z)"
_INDEX = "(threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z))"
ATTRIBUTES = {
    "thread_position_in_grid": "uint3(blockIdx.x * blockDim.x + threadIdx.x, blockIdx.y * blockDim.y + threadIdx.y, "
    "blockIdx.z * blockDim.z + threadIdx.z)",
    "thread_position_in_threadgroup": "uint3(threadIdx.x, threadIdx.y, threadIdx.z)",
    "threadgroup_position_in_grid": "uint3(blockIdx.x, blockIdx.y, blockIdx.z)",
    "threads_per_threadgroup": "uint3(blockDim.x, blockDim.y, blockDim.z)",
    "threadgroups_per_grid": "uint3(gridDim.x, gridDim.y, gridDim.z)",
    "thread_index_in_threadgroup": f"uint({_INDEX})",
    "thread_index_in_simdgroup": f"uint({_INDEX} % 32)",
    "simdgroup_index_in_threadgroup": f"uint({_INDEX} / 32)",
    "simdgroups_per_threadgroup": f"uint({_BLOCK} / 32)",
    "threads_per_simdgroup": "uint(32)",
}

_UNSUPPORTED = {
    r"\bmetal::precise::": "functions of metal::precise; write metal::",
    rf"\bmetal::fast::(?!(?:{'|'.join(FAST)})\b)\w*": f"this function of metal::fast, not one of {', '.join(FAST)}",
    rf"\bmetal::(?!(?:{'|'.join(MATH + SIMD)}|fast::\w+|precise)\b)\w*": "this name of namespace metal",
    rf"(?<![\w:.>])(?:{'|'.join(sorted(set(MATH) - {'vec', 'as_type'}))})\s*\(": "an unqualified function; write metal::",
    rf"\b(?!(?:{'|'.join(SIMD)})\b)simd_\w+": f"this simdgroup function, not one of {', '.join(SIMD)}",
    r"\b(?!simdgroup_index_in_threadgroup\b|simdgroup_barrier\b)simdgroup_\w+": "simdgroup matrices and their like",
    r"\b(?:quad|quadgroup)_\w+": "quadgroups",
    r"\batomic\w*": "atomics",
    r"\b(?:texture\w*|sampler|visible_function_table|imageblock\w*)\b": "textures, samplers and tables",
    r"\[\[.*?\]\]": "attributes in brackets",
    r"\bfunction_constant\b": "function constants",
    r"\b(?:kernel|vertex|fragment|ray_data|object_data)\b": "this keyword",
    r"\.\s*(?:[xyzw]{2,4}|[rgba]{2,4})\b(?!\s*\()": "swizzles",
    r"\.\s*[rgba]\b(?!\s*\()": "colour components; write x, y, z, w",
    r"(?<![\w.])(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?[hH]\b": "half literals",
    r"\b(?:bool|char|uchar|short|ushort|int|uint|long|ulong|half|bfloat|float)[234]x[234]\b": "matrices",
    r"\bpacked_\w+": "packed vectors",
    r"#\s*include\b[^\n]*": "includes, which Metal kernels in MLX do not need",
    r"\bstatic\b|\bconstexpr\s+constant\b|\bconstant\s+constexpr\b": "static and program-scope variables",
    r"(?:^|(?<=[;}\n]))\s*constant\b[^;*&()]*=": "static and program-scope variables",
    r"\bconst\s+constant\b|\bconstant\s+const\b": "`const` beside `constant`, which says so already",
    r"\bthreadgroup_(?!position_in_grid\b|barrier\b)\w+": "this threadgroup function or attribute",
    rf"\b(?!(?:{'|'.join(ATTRIBUTES)})\b)(?:dispatch_)?(?:threads?|threadgroups?|simdgroups?)_\w*(?:in|per|width)\w*": (
        "this attribute"
    ),
    r"\bgrid_(?:size|origin)\b": "this attribute",
}  # fmt: skip
# `threadgroup` becomes `__shared__`, which cannot be part of a pointer type.
_POINTER = r"\bthreadgroup\b\s+(?:const\s+)?[\w:]+(?:<[^<>;(){}]*>)?(?:\s+const)?\s*(?:[*&]|\(\s*&)"


def cuda_source(name: str, headers: Sequence[str], defines: str) -> tuple[str, str]:
    """Returns the body and the header of the kernel ``name`` for ``mx.fast.cuda_kernel``.

    MLX hashes the whole text at every launch, 0.35 µs for each 1,000 characters, so the sources are included, not copied;
    with their checksums, because MLX finds compiled kernels by that hash.

    Raises:
        ValueError: the Metal text uses an unsupported construct.
    """
    body = kernel_sources.read(f"{name}.metal")
    check(body, defines + "".join(kernel_sources.read(f"{stem}.h.metal") for stem in headers))
    used = [name for name in ATTRIBUTES if re.search(rf"\b{name}\b", _without_comments(body))]
    attributes = "".join(f"const auto {name} = {ATTRIBUTES[name]};\n" for name in used)
    includes = "".join(_include(f"{stem}.h.metal") for stem in headers)
    return (
        attributes + _include(f"{name}.metal"),
        f"{_include('cuda_prelude.cuh')}namespace mlx::core::cu {{\n{defines}{includes}}}\n",
    )


def check(body: str, header: str) -> None:
    """Raises ValueError for constructs outside the supported subset of Metal, and names their lines."""
    problems = _problems("header", _without_comments(header)) + _problems("body", _without_comments(body))
    if problems:
        raise ValueError("cannot be compiled as CUDA:\n" + "\n".join(problems))


def _include(file: str) -> str:
    checksum = crc32(kernel_sources.read(file).encode())
    return f'#include "{kernel_sources.folder() / file}"  // {checksum:08x}\n'


def _without_comments(text: str) -> str:
    return _COMMENT.sub(lambda comment: re.sub(r"[^\n]", " ", comment[0]), text)


def _problems(name: str, text: str) -> list[str]:
    """Returns one message per unsupported construct of a text without comments."""
    found = []
    threadgroup = r"\bthreadgroup\b" if name == "header" else _POINTER
    patterns = _UNSUPPORTED | {threadgroup: "threadgroup memory other than the body's own variables"}
    for pattern, what in patterns.items():
        for match in re.finditer(pattern, text):
            start = match.start() + len(match[0]) - len(match[0].lstrip())
            line = text.count("\n", 0, start) + 1
            found.append((line, f"{name} line {line}: no support for {what}; found `{match[0].strip()}`"))
    return [message for _, message in sorted(set(found))]
