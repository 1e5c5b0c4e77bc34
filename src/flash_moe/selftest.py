"""Every kernel against its reference on the device at hand: fresh random inputs, error, and speed beside MLX's ops."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np

from .errors import FlashMoEError
from .formats import ProjectionFormat, Quantization
from .ops import (
    decode_attention,
    delta_net_step,
    expert_kernels,
    norm_kernel,
    qk_norm_rope,
    router,
    router_kernel,
)
from .ops.dispatch import kernels, on_gpu
from .ops.experts import experts_for_token
from .ops.linear import linear
from .ops.quantized_matvec import quantized_matvec
from .record import PROJECTIONS, RecordLayout
from .rope import frequencies

TOLERANCE = {mx.float32: 1e-4, mx.float16: 5e-3, mx.bfloat16: 3e-2}  # of the largest value
_NAMES = {mx.float32: "float32", mx.float16: "float16", mx.bfloat16: "bfloat16"}
_CALLS = 20


@dataclass(frozen=True)
class Sizes:
    """Dimensions of the test; the defaults are those of Qwen3.5-397B-A17B."""

    hidden: int = 4096
    intermediate: int = 1024
    experts: int = 512
    heads: int = 32
    kv_heads: int = 2
    head_dim: int = 256
    key_heads: int = 16
    value_heads: int = 64
    delta_dim: int = 128
    context: int = 4096


@dataclass(frozen=True)
class Result:
    """One kernel: its largest error relative to the largest value, and seconds per call beside MLX's ops."""

    name: str
    dtype: str
    error: float
    tolerance: float
    seconds: float
    mlx_seconds: float

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance


def run(sizes: Sizes | None = None, *, seed: int | None = None) -> Iterator[Result]:
    """Runs all kernels in bfloat16, float16 and float32, one after the other.

    Raises:
        FlashMoEError: there is no GPU that MLX can use.
    """
    if not on_gpu():
        raise FlashMoEError(
            "found no GPU that MLX can use; kernels need Metal or CUDA, everything else runs on the CPU"
        )
    mx.random.seed(time.time_ns() % 2**32 if seed is None else seed)
    for dtype in TOLERANCE:
        for name, ours, reference in _cases(sizes or Sizes(), dtype):
            with kernels(False):
                expected, mlx_seconds = _timed(reference)
            found, seconds = _timed(ours)
            yield Result(name, _NAMES[dtype], _error(found, expected), TOLERANCE[dtype], seconds, mlx_seconds)


def _timed(function: Callable[[], Any]) -> tuple[list[np.ndarray], float]:
    """The function's results, and seconds per call when many are evaluated together."""
    first = _listed(function())
    mx.eval(first)
    values = [np.array(array.astype(mx.float32), dtype=np.float64) for array in first]
    start = time.perf_counter()
    mx.eval([function() for _ in range(_CALLS)])
    return values, (time.perf_counter() - start) / _CALLS


def _listed(value: Any) -> list[mx.array]:
    return [value] if isinstance(value, mx.array) else list(value)


def _error(found: list[np.ndarray], expected: list[np.ndarray]) -> float:
    """NaN counts as infinitely wrong."""
    errors = [
        np.abs(a.ravel() - b.ravel()).max() / max(np.abs(b).max(), 1e-9) for a, b in zip(found, expected, strict=True)
    ]
    return float(np.nan_to_num(max(errors), nan=np.inf))


def _random(*shape: int, dtype: mx.Dtype = mx.float32, scale: float = 1.0) -> mx.array:
    array = (scale * mx.random.normal(shape)).astype(dtype)
    mx.eval(array)
    return array


def _cases(s: Sizes, dtype: mx.Dtype) -> Iterator[tuple[str, Callable[[], Any], Callable[[], Any]]]:
    """Name, kernel and reference of every case."""
    x = _random(1, s.hidden, dtype=dtype)
    for bits in (2, 3, 4, 6, 8):
        q = Quantization(bits, 64)
        w, scales, biases = mx.quantize(
            _random(s.hidden, s.hidden, scale=s.hidden**-0.5).astype(dtype), group_size=64, bits=bits
        )
        yield (
            f"{bits}-bit matvec",
            partial(quantized_matvec, x, w, scales, biases, q),
            partial(linear, x, w, scales, biases, q),
        )
    yield from _moe(s, dtype, x)
    weight = _random(s.hidden, dtype=dtype)
    yield (
        "RMSNorm", lambda: norm_kernel.rms_norm_kernel(x, weight, 1e-6),
        lambda: mx.fast.rms_norm(x, weight, 1e-6),
    )  # fmt: skip
    yield from _attention(s, dtype)
    yield from _delta_net(s, dtype)


def _moe(s: Sizes, dtype: mx.Dtype, x: mx.array) -> Iterator[tuple[str, Callable[[], Any], Callable[[], Any]]]:
    stored = {mx.float32: "F32", mx.float16: "F16", mx.bfloat16: "BF16"}[dtype]
    fmt = ProjectionFormat(stored, Quantization(4, 64))
    layout = RecordLayout.build(s.hidden, s.intermediate, dict.fromkeys(PROJECTIONS, fmt))
    rows = []
    for _ in range(4):
        row = np.zeros(layout.stride, np.uint8)
        for _, projection in layout.projections:
            out, words = projection.weight.shape
            parts = mx.quantize(_random(out, words * 8, scale=(words * 8) ** -0.5).astype(dtype), group_size=64, bits=4)
            for part, array in zip(projection.parts, parts, strict=True):
                data = np.array(mx.contiguous(array).view(mx.uint8), copy=False).reshape(-1)
                row[part.offset : part.offset + part.nbytes] = data
        rows.append(row)
    bank = mx.array(np.stack(rows).view(np.uint32))
    weights = mx.array([0.4, 0.3, 0.2, 0.1])
    separate = [mx.array(row.view(np.uint32)) for row in rows]
    reference = lambda: experts_for_token(x, bank, weights, layout)  # noqa: E731
    yield "experts, bank", lambda: expert_kernels.experts_for_token(x, bank, weights, layout), reference
    yield "experts, separate", lambda: expert_kernels.experts_for_token(x, separate, weights, layout), reference
    logits = _random(1, s.experts, scale=3.0, dtype=dtype)
    k = min(10, s.experts)
    yield (
        "router", lambda: mx.sort(router_kernel.route(logits, k, True)[1]),
        lambda: mx.sort(router.route(logits, k, True)[1]),
    )  # fmt: skip


def _attention(s: Sizes, dtype: mx.Dtype) -> Iterator[tuple[str, Callable[[], Any], Callable[[], Any]]]:
    qg, k = _random(1, 2 * s.heads * s.head_dim, dtype=dtype), _random(1, s.kv_heads * s.head_dim, dtype=dtype)
    weight = _random(s.head_dim, dtype=dtype)
    options: dict[str, Any] = {"frequencies": frequencies(s.head_dim // 4, 1e7), "eps": 1e-6}
    place = qk_norm_rope.place(1000, 1)
    yield (
        "q/k norm + RoPE", lambda: qk_norm_rope.qk_norm_rope_kernel(qg, k, weight, weight, place=place, **options),
        lambda: qk_norm_rope.qk_norm_rope_reference(qg, k, weight, weight, start=1000, **options),
    )  # fmt: skip
    q, gate = _random(s.heads, 1, s.head_dim, dtype=dtype), _random(1, s.heads * s.head_dim, dtype=dtype)
    keys, values = (_random(1, s.kv_heads, s.context, s.head_dim, dtype=dtype) for _ in "kv")
    scale, length = s.head_dim**-0.5, s.context - 3
    sizes = decode_attention.cache_sizes(length, keys)
    yield (
        "decode attention", lambda: decode_attention.decode_attention_kernel(q, keys, values, sizes, gate, scale),
        lambda: decode_attention.decode_attention_reference(q, keys, values, length, gate, scale),
    )  # fmt: skip


def _delta_net(s: Sizes, dtype: mx.Dtype) -> Iterator[tuple[str, Callable[[], Any], Callable[[], Any]]]:
    value_dim = s.value_heads * s.delta_dim
    channels = 2 * s.key_heads * s.delta_dim + value_dim
    projected = _random(1, channels + value_dim + 2 * s.value_heads, dtype=dtype)
    conv_state, state = _random(3, channels, dtype=dtype), _random(s.value_heads, s.delta_dim, s.delta_dim)
    constants = delta_net_step.pack_constants(
        -mx.exp(_random(s.value_heads)), _random(s.value_heads), _random(s.delta_dim), l2_eps=1e-6, eps=1e-6
    )
    options: dict[str, Any] = {
        "conv_weight": _random(4, channels, dtype=dtype, scale=0.5), "constants": constants, "key_heads": s.key_heads,
    }  # fmt: skip
    yield (
        "delta-net step", lambda: delta_net_step.delta_net_step_kernel(projected, conv_state, state, **options),
        lambda: delta_net_step.delta_net_step_reference(projected, conv_state, state, **options),
    )  # fmt: skip
