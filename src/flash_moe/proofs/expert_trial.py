"""The trial of the expert kernels."""

from __future__ import annotations

import json

import mlx.core as mx

from ..dtypes import DTYPES
from ..ops import expert_kernels
from ..ops.experts import add_weighted, dequantized, enough, experts_in_place, parts_of
from ..record import RecordLayout
from .operands import codes, dtype_of, product, random, scales_of
from .trial import Trial

_BY_PART = 6  # number of operands before the parts, which only MLX's ops take


def experts(fewest: int, count: int, shared: int, layout_json: str, x_dtype: str) -> Trial:
    """Returns the trial of the experts of one token.

    The kernel is timed with the operands that the decoder has: the rows, and the shared expert as a separate array.

    Args:
        fewest, count: the smallest and largest number of routed experts.
        shared: whether there is a shared expert.
        layout_json: the layout of the records.
    """
    layout, dtype = RecordLayout.from_json(json.loads(layout_json)), dtype_of(x_dtype)
    records, hidden = count + shared, layout.hidden_size

    def operands() -> tuple[mx.array, ...]:
        x, residual = (random(1, hidden, dtype=dtype) for _ in "xr")
        made = [_record(layout) for _ in range(records)]
        last = made[-1] if shared else mx.zeros((1,), dtype=mx.uint32)
        rows = mx.arange(count - 1, -1, -1, dtype=mx.uint32)  # in another order than in the bank
        by_part = zip(*(parts_of(record, layout).values() for record in made), strict=True)
        weights = mx.random.uniform(0.1, 1.0, (records,))
        return x, residual, weights, rows, mx.stack(made[:count]), last, *(mx.concatenate(list(a)) for a in by_part)

    def in_bank(*arrays: mx.array) -> list[mx.array]:
        x, residual, weights, rows, bank, last = arrays[:_BY_PART]
        own = last if shared else None
        return [expert_kernels.experts_for_token(x, bank, weights, layout, rows=rows, shared=own, residual=residual)]

    def everything(*arrays: mx.array) -> list[mx.array]:
        x, residual, weights, rows, bank, last = arrays[:_BY_PART]
        separate = [*map(mx.contiguous, bank), *([last] if shared else [])]
        found = [expert_kernels.experts_for_token(x, separate, weights, layout, residual=residual)]
        for used in range(fewest, count + 1):
            of_rows = mx.concatenate([weights[:used][::-1], weights[count:]])
            found += in_bank(x, residual, of_rows, rows[count - used :], bank, last)
        return found

    def reference(*arrays: mx.array) -> list[mx.array]:
        x, residual, weights, _, bank, last = arrays[:_BY_PART]
        outputs = []
        for i in range(records):
            record = bank[i : i + 1] if i < count else last[None]
            gate, up, down = (dequantized(record, p, mx.float32)[0] for _, p in layout.projections)
            gated = product(x, gate)
            outputs.append(weights[i] * product(gated * mx.sigmoid(gated) * product(x, up), down))
            mx.eval(outputs[-1])
        sums = [sum(outputs[:used] + outputs[count:], residual.astype(mx.float32)) for used in range(fewest, count + 1)]
        return [sums[-1], *sums]

    def usual(*arrays: mx.array) -> list[mx.array]:
        x, residual, weights = arrays[:3]
        parts = dict(zip((part.key for part in layout.parts), arrays[_BY_PART:], strict=True))
        y = experts_in_place(x, parts, enough(mx.arange(records, dtype=mx.uint32)), layout)
        return [add_weighted(residual, weights, y)]

    return Trial(everything, reference, usual, operands, dtype, timed=in_bank)


def _record(layout: RecordLayout) -> mx.array:
    """Returns a random record: [words] uint32."""
    words, end = [], 0
    for _, projection in layout.projections:
        q, (rows, packed) = projection.quantization, projection.weight.shape
        assert q is not None
        columns = packed * 32 // q.bits
        if q.is_affine:
            arrays = [codes(rows, columns, q.bits), *scales_of(rows, columns, q, DTYPES[projection.parts[1].dtype])]
        else:
            arrays = list(mx.quantize(random(rows, columns, scale=columns**-0.5), **q.to_json()))
        if projection.global_scale is not None:
            arrays.append(mx.random.uniform(1000, 5000, (1,)))
        for part, array in zip(projection.parts, arrays, strict=True):
            words += [mx.zeros(((part.offset - end) // 4,), dtype=mx.uint32), array.reshape(-1).view(mx.uint32)]
            end = part.offset + part.nbytes
    return mx.concatenate([*words, mx.zeros(((layout.stride - end) // 4,), dtype=mx.uint32)])
