"""Adapts our kernels' Metal to CUDA: a small rewriting, and a prelude that defines what the text then still uses.

The subset of Metal in which the kernels are written is what this file lets through. Whatever else Metal has is
reported when the kernel is built, with its line; nothing is passed on in the hope that it means the same.
"""

from __future__ import annotations

import re
from zlib import crc32

from . import sources

_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.S)

# What the prelude defines. Everything after `metal::` must be one of these.
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
    r"\bthreadgroup_(?!position_in_grid\b|barrier\b)\w+": "this threadgroup function or attribute",
    rf"\b(?!(?:{'|'.join(ATTRIBUTES)})\b)(?:dispatch_)?(?:threads?|threadgroups?|simdgroups?)_\w*(?:in|per|width)\w*": (
        "this attribute"
    ),
    r"\bgrid_(?:size|origin)\b": "this attribute",
}  # fmt: skip
_SHARED = re.compile(r"(?:^|(?<=[;{}]))(\s*)threadgroup(\s+[^;*&(){}=]*\[[^;=]*;)")
_SHARED_SCALAR = re.compile(r"(?:^|(?<=[;{}]))(\s*)threadgroup(\s+\w+\s+\w+\s*;)")
# Any other use must be a pointer or a reference: a variable that lost its qualifier would be every thread's own.
_NOT_A_POINTER = r"\bthreadgroup\b(?!\s+(?:const\s+)?[\w:]+(?:<[^<>;(){}]*>)?(?:\s+const)?\s*(?:[*&]|\(\s*&))"


def cuda_source(body: str, header: str) -> tuple[str, str]:
    """The CUDA text of a kernel.

    Args:
        body, header: the Metal text, as for ``mx.fast.metal_kernel``.

    Returns:
        body and header for ``mx.fast.cuda_kernel``. Lines of the body keep their numbers. MLX hashes the whole text at
        every launch, so it is kept short: no indentation, and the prelude is included, not copied.

    Raises:
        ValueError: the text uses something that has no counterpart here.
    """
    body, header = _without_comments(body), _without_comments(header)
    body = _SHARED_SCALAR.sub(r"\1__shared__\2", _SHARED.sub(r"\1__shared__\2", body))
    problems = _problems("header", header) + _problems("body", body)
    if problems:
        raise ValueError("cannot be adapted to CUDA:\n" + "\n".join(problems))
    used = [name for name in ATTRIBUTES if re.search(rf"\b{name}\b", body)]
    attributes = "".join(f"const auto {name} = {ATTRIBUTES[name]}; " for name in used)
    return (
        attributes + _short(_without_qualifiers(body)),
        f"{_prelude()}\nnamespace mlx::core::cu {{\n{_short(_without_qualifiers(header))}\n}}\n",
    )


def _prelude() -> str:
    """Includes the prelude; with its checksum, for MLX keeps compiled kernels on disk under the hash of their text."""
    checksum = crc32(sources.read("cuda_prelude.cuh").encode())
    return f'#include "{sources.folder() / "cuda_prelude.cuh"}"  // {checksum:08x}'


def _short(text: str) -> str:
    """The text without spaces at either end of its lines."""
    return "\n".join(line.strip() for line in text.split("\n"))


def _without_comments(text: str) -> str:
    return _COMMENT.sub(lambda comment: re.sub(r"[^\n]", " ", comment[0]), text)


def _without_qualifiers(text: str) -> str:
    text = re.sub(r"\b(?:const\s+constant|constant\s+const|constant)\b", "const", text)
    return re.sub(r"\b(?:device|thread|threadgroup)\b", "", text)


def _problems(name: str, text: str) -> list[str]:
    """One message per unsupported construct of a text without comments."""
    found = []
    variable = "threadgroup variables in a header" if name == "header" else "this threadgroup variable"
    patterns = _UNSUPPORTED | {_NOT_A_POINTER: f"{variable}; write `threadgroup T name[size];` in the body"}
    for pattern, what in patterns.items():
        for match in re.finditer(pattern, text):
            start = match.start() + len(match[0]) - len(match[0].lstrip())
            line = text.count("\n", 0, start) + 1
            found.append((line, f"{name} line {line}: no support for {what}; found `{match[0].strip()}`"))
    return [message for _, message in sorted(set(found))]
