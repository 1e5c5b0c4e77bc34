"""Computes SwiGLU experts directly from their records."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache

import mlx.core as mx
import numpy as np

from ..dtypes import DTYPES
from ..formats import GLOBAL_SCALE
from ..record import Part, ProjectionLayout, RecordLayout
from . import kernel
from .blas import cpu_streams, on_cpu, to_numpy, use_blas
from .foreign_weights import from_fp8

_FUSED = 6  # experts whose outputs are added in one launch; each takes two more inputs, and a launch has few
_LARGE = 256 << 10  # minimum bytes of a record for a separate stream
_BLOCK_WEIGHTS = 1 << 24  # weights that are dequantised together on the CPU: 64 MiB of float32


def experts_for_token(
    x: mx.array, records: mx.array | Iterable[mx.array], weights: mx.array, layout: RecordLayout
) -> mx.array:
    """Returns Σ_k weights[k] · down_k(silu(gate_k·x) · up_k·x) for one token.

    Args:
        x: [1, H], float.
        records: [K, words] uint32, one record per row; or, if :func:`takes_each` is True, K arrays of [words], each of
            which is used while the next ones are loaded.
        weights: [K] float32, the routing weights.

    Returns:
        [1, H] in the dtype of x.
    """
    count = weights.shape[0]
    if not isinstance(records, mx.array):
        y = _side_by_side(x, records, layout)
    elif on_cpu(x.dtype):
        y = _all_at_once(x, records, layout)
    else:  # some GPU back ends of MLX have no batched quantised products
        y = experts_for_rows(mx.broadcast_to(x, (count, x.shape[1])), records, [1] * count, layout)
    return weighted_sum(weights, y)


def experts_in_place(
    x: mx.array,
    parts: Mapping[str, mx.array] | mx.array,
    rows: mx.array,
    layout: RecordLayout,
    *,
    grouped: bool = False,
) -> mx.array:
    """Returns down(silu(gate·x) · up·x) of one expert per row of x, with MLX's gathered products.

    Args:
        x: [R, H], float, or [1, H] for the same row for all experts.
        parts: the records as [N, ...] arrays by :attr:`~flash_moe.record.Part.key`, which are used in place if scales
            have the dtype of x; or as [N, words] uint32, from which all parts are copied.
        rows: [R] uint32, the record for each row of x.
        grouped: whether ``rows`` is in ascending order, so that rows of one record are multiplied together.

    Returns:
        [R, H] in the dtype of x.
    """
    views = _Views(parts) if isinstance(parts, mx.array) else _Parts(parts)
    each = _numbers(rows.size, last=rows.size)
    first = each if x.shape[0] == rows.size else _numbers(rows.size, last=0)
    gate, up = (_gathered(x[:, None], views, p, rows, grouped, first) for p in (layout.gate_proj, layout.up_proj))
    return _gathered(_swiglu(gate, up), views, layout.down_proj, rows, grouped, each)[:, 0]


def fewest_products() -> int:
    """Returns the minimum number of gathered products in one call.

    For fewer than 8, MLX 0.32.4 on CUDA uses another kernel, which rounds differently and is slower.
    """
    return 8 if kernel.back_end() == "cuda" else 1


def enough(rows: mx.array) -> mx.array:
    """Returns the rows [K] of a token's experts, with the last one repeated up to :func:`fewest_products` rows."""
    count, least = rows.size, fewest_products()
    return rows if count >= least else rows[_numbers(least, last=count - 1)]


@lru_cache(maxsize=64)
def _numbers(count: int, *, last: int) -> mx.array:
    """Returns 0, 1, ... up to ``last``, [count] uint32.

    Otherwise MLX would create these indices in a launch for each product.
    """
    numbers = mx.minimum(mx.arange(count), last).astype(mx.uint32)
    mx.eval(numbers)
    return numbers


def parts_of(record: mx.array, layout: RecordLayout) -> dict[str, mx.array]:
    """Returns the parts of one record [words] uint32 for :func:`experts_in_place`, as views [1, ...]."""
    return {
        part.key: record[part.offset // 4 : (part.offset + part.nbytes) // 4]
        .view(DTYPES[part.dtype])
        .reshape(1, *part.shape)
        for part in layout.parts
    }


def weighted_sum(weights: mx.array, y: mx.array) -> mx.array:
    """Returns Σ_k weights[k] · y[k] in float32: [K] and [K, H] to [1, H] in the dtype of y."""
    return (weights[None] @ y.astype(mx.float32)).astype(y.dtype)


def add_weighted(rest: mx.array, weights: mx.array, y: mx.array) -> mx.array:
    """Returns rest + Σ_k weights[k] · y[k] in float32. In a trace with a small K, this is one launch.

    Args:
        rest: [1, H]. weights: [K] float32. y: [K, H] in the dtype of rest; further rows are ignored.

    Returns:
        [1, H] in the dtype of rest.
    """
    if (count := weights.size) > _FUSED:
        terms = (weights[:, None] * y[:count].astype(mx.float32)).sum(axis=0, keepdims=True)
    else:
        parts = [weights[k : k + 1] * y[k : k + 1].astype(mx.float32) for k in range(count)]  # slices are views
        terms = sum(parts[1:], parts[0])
    return (rest.astype(mx.float32) + terms).astype(rest.dtype)


def takes_each(layout: RecordLayout, dtype: mx.Dtype) -> bool:
    """Returns whether :func:`experts_for_token` is faster with a separate array for each record."""
    return layout.stride >= _LARGE and on_cpu(dtype)


def _side_by_side(x: mx.array, records: Iterable[mx.array], layout: RecordLayout) -> mx.array:
    """Returns the outputs [K, H]. Computes each record in place as soon as it is loaded, on one stream per core."""
    streams, outputs = cpu_streams(), []
    plain = all(projection.quantization is None for _, projection in layout.projections)
    for i, record in enumerate(records):
        with mx.stream(streams[i % len(streams)]):
            if plain:
                outputs.append(_blas_rows(x, record[None], [1], layout))
            else:
                outputs.append(_all_at_once(x, record[None], layout))
                mx.async_eval(outputs[-1])
    return mx.concatenate(outputs)


def _all_at_once(x: mx.array, records: mx.array, layout: RecordLayout) -> mx.array:
    """Returns the outputs [K, H], with batched products."""
    h, views = x[None], _Views(records)
    h = _swiglu(_batched(h, views, layout.gate_proj), _batched(h, views, layout.up_proj))
    return _batched(h, views, layout.down_proj).reshape(len(records), -1)


def experts_for_rows(x: mx.array, records: mx.array, counts: Sequence[int], layout: RecordLayout) -> mx.array:
    """Returns down_g(silu(gate_g·x) · up_g·x) for rows sorted by expert g.

    Args:
        x: [R, H], float. The first counts[0] rows belong to the first record, and so on.
        records: [G, words] uint32, one record per row.
        counts: number of rows of each record, with sum R.

    Returns:
        [R, H] in the dtype of x.
    """
    if use_blas(x.shape[0], x.dtype):
        return _blas_rows(x, records, counts, layout)
    index = mx.array(np.repeat(np.arange(len(counts), dtype=np.uint32), counts))
    h, views = x[:, None], _Views(records)
    h = _swiglu(_gathered(h, views, layout.gate_proj, index), _gathered(h, views, layout.up_proj, index))
    return _gathered(h, views, layout.down_proj, index)[:, 0]


def _blas_rows(x: mx.array, records: mx.array, counts: Sequence[int], layout: RecordLayout) -> mx.array:
    """Computes rows on the CPU: dequantises a block of experts, then uses BLAS for one expert after the other."""
    rows, out = to_numpy(x), np.empty(x.shape, np.float32)
    ends = np.cumsum(counts)
    step = max(1, _BLOCK_WEIGHTS // (3 * layout.hidden_size * layout.intermediate_size))
    for first in range(0, len(counts), step):
        block = records[first : first + step]
        gates, ups, downs = (to_numpy(dequantized(block, p, mx.float32)) for _, p in layout.projections)
        for g, (gate, up, down) in enumerate(zip(gates, ups, downs, strict=True), start=first):
            mine = slice(ends[g] - counts[g], ends[g])
            gated = rows[mine] @ gate.T
            with np.errstate(over="ignore"):  # exp may overflow to inf for very negative gates, where silu is 0
                gated /= 1 + np.exp(-gated)
            gated *= rows[mine] @ up.T
            np.matmul(gated, down.T, out=out[mine])
    return mx.array(out)


def dequantized(records: mx.array, projection: ProjectionLayout, dtype: mx.Dtype) -> mx.array:
    """Returns the weights of one projection of every record: [records, out, in] in ``dtype``."""
    return _Views(records).matrix(projection, dtype)


class _Views:
    """The parts of records [N, words] as arrays [N, rows, columns] or [N, rows] over the same memory."""

    def __init__(self, records: mx.array) -> None:
        self._count, self._words = records.shape
        self._flat = records.reshape(-1)
        self._typed = {"U32": self._flat}

    def part(self, part: Part) -> mx.array:
        if (typed := self._typed.get(part.dtype)) is None:
            typed = self._typed[part.dtype] = self._flat.view(DTYPES[part.dtype])
        stride, first = 4 * self._words // typed.itemsize, part.offset // typed.itemsize
        inner = (part.shape[1], 1) if len(part.shape) == 2 else (1,)
        return mx.as_strided(typed, (self._count, *part.shape), (stride, *inner), first)

    def quantized(self, projection: ProjectionLayout, dtype: mx.Dtype) -> tuple[mx.array, mx.array, mx.array | None]:
        """Returns weight, scales and biases. Scales of one byte are not converted, and have no biases."""
        assert projection.scales is not None
        weight, scales = self.part(projection.weight), self.part(projection.scales)
        if projection.biases is None:
            return weight, scales, None
        return weight, scales.astype(dtype), self.part(projection.biases).astype(dtype)

    def whole(self, projection: ProjectionLayout, dtype: mx.Dtype) -> tuple[mx.array, mx.array, mx.array | None]:
        """Returns :meth:`quantized` with strided arrays copied, because MLX on CUDA does not accept them.

        The copy also has an advantage if records are in host memory: each record crosses the bus once, not once per
        row.
        """
        weight, scales, biases = self.quantized(projection, dtype)
        return mx.contiguous(weight), mx.contiguous(scales), None if biases is None else mx.contiguous(biases)

    def factor(self, projection: ProjectionLayout, dtype: mx.Dtype) -> mx.array | None:
        """Returns the factor [N, 1, 1] for the outputs; MLX supports a global scale only on a GPU."""
        if projection.global_scale is None:
            return None
        return (self.part(projection.global_scale)[..., None] / GLOBAL_SCALE).astype(dtype)

    def matrix(self, projection: ProjectionLayout, dtype: mx.Dtype) -> mx.array:
        if (q := projection.quantization) is None:
            return self.part(projection.weight).astype(dtype)
        if q.is_foreign:
            assert projection.scales is not None
            return from_fp8(self.part(projection.weight), self.part(projection.scales)).astype(dtype)
        w = mx.dequantize(*self.quantized(projection, dtype), **q.to_json(), dtype=dtype)
        factor = self.factor(projection, dtype)
        return w if factor is None else w * factor


class _Parts(_Views):
    """The parts of records as separate, contiguous arrays."""

    def __init__(self, parts: Mapping[str, mx.array]) -> None:
        self._parts = parts

    def part(self, part: Part) -> mx.array:
        return self._parts[part.key]

    whole = _Views.quantized


def _swiglu(gate: mx.array, up: mx.array) -> mx.array:
    return gate * mx.sigmoid(gate) * up


def _batched(x: mx.array, views: _Views, projection: ProjectionLayout) -> mx.array:
    """Multiplies [1 or K, 1, in] with every record; the result is [K, 1, out]."""
    if (q := projection.quantization) is None:
        return x @ views.matrix(projection, x.dtype).swapaxes(-1, -2)
    y = mx.quantized_matmul(x, *views.quantized(projection, x.dtype), transpose=True, **q.to_json())
    factor = views.factor(projection, x.dtype)
    return y if factor is None else y * factor


def _gathered(
    x: mx.array,
    views: _Views,
    projection: ProjectionLayout,
    index: mx.array,
    grouped: bool = True,
    rows: mx.array | None = None,
) -> mx.array:
    """Multiplies rows of x [.., 1, in], all or those in ``rows``, with the records in ``index``; the result is [R, 1,
    out].
    """
    if (q := projection.quantization) is None:
        dtype = mx.float32 if mx.default_device() == mx.cpu else x.dtype  # MLX on the CPU supports only this
        w = views.matrix(projection, dtype).swapaxes(-1, -2)
        # MLX 0.32.4 on CUDA is wrong with sorted_indices
        return mx.gather_mm(x.astype(dtype), w, lhs_indices=rows, rhs_indices=index).astype(x.dtype)
    y = mx.gather_qmm(
        x, *views.whole(projection, x.dtype), lhs_indices=rows, rhs_indices=index, transpose=True,
        sorted_indices=grouped, **q.to_json(),
    )  # fmt: skip
    factor = views.factor(projection, x.dtype)
    return y if factor is None else y * factor[index]
