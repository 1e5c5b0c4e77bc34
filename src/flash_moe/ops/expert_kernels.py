"""Computes the experts of one token in two launches, directly from their records.

``kernels/expert_gate_up.metal`` computes silu(gate·x) · (up·x) for every record. ``kernels/expert_down.metal`` computes
the weighted sum of the down projections, and adds a residual if there is one. The shared expert is one more record.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import mlx.core as mx

from ..dtypes import DTYPES
from ..record import PROJECTIONS, ProjectionLayout, RecordLayout
from .kernel import SIMD, Kernel, Template
from .quantized_matvec import HOISTED, lanes_per_row

_MODES = ("affine", "mxfp4", "nvfp4", "mxfp8")  # enum Mode of kernels/quantized.h.metal
MAX_RECORDS = 17  # 16 routed experts and the shared one; a Metal kernel has at most 31 buffers
_SIMDGROUPS = 4  # simdgroups per threadgroup of expert_gate_up
_LANES = (32, 16, 8)  # numbers of lanes that may share a row
_GATE_UP_ROWS, _DOWN_ROWS = 2, 4  # rows of each matrix per set of lanes


@dataclass(frozen=True)
class Source:
    """The location of the records of a launch.

    Attributes:
        buffers: inputs of the kernel: one per record, or a bank [N, words], the rows of the records in it, and
            optionally one more record.
        separate: number of buffers that are single records; 0 for a bank.
        shared: whether one more record follows in a separate buffer after those of a bank.
        template: STRIDE, the words from one record of a bank to the next, and ROUTED, the number of records in the
            bank.
    """

    buffers: list[mx.array]
    separate: int
    shared: bool
    template: Template


def supports(layout: RecordLayout, count: int) -> bool:
    """Returns whether :func:`experts_for_token` supports ``count`` records of this layout: SwiGLU, quantised by MLX."""
    if count > MAX_RECORDS or set(layout.linears) != set(PROJECTIONS):
        return False
    kinds = ((p.quantization, p.bias) for _, p in layout.projections)
    return all(q is not None and q.mode in _MODES and bias is None for q, bias in kinds)


def experts_for_token(
    x: mx.array,
    records: mx.array | Sequence[mx.array],
    weights: mx.array,
    layout: RecordLayout,
    *,
    rows: mx.array | Sequence[int] | None = None,
    shared: mx.array | None = None,
    residual: mx.array | None = None,
    form: int = HOISTED,
) -> mx.array:
    """Returns residual + Σ_k weights[k] · down_k(silu(gate_k·x) · up_k·x) for one token.

    With only the first four arguments, it has the contract of :func:`.experts.experts_for_token`.

    Args:
        x: [1, H], float. Its memory must start at a multiple of 16 bytes.
        records: a bank [N, words] uint32 with one record per row, or K arrays of [words] uint32.
        weights: K elements float32, the routing weights, and one more for the shared expert if there is one.
        rows: rows of the K records in the bank, as K elements uint32 or integers; None means all rows.
        shared: [words] uint32, the record of the shared expert, with the same layout.
        residual: [1, H], the dtype of x.

    Returns:
        [1, H] in the dtype of x.
    """
    source = find_records(records, rows, shared)
    h = gate_up(x, source, weights.size, layout, form)
    return down(h, source, weights, residual, layout, form)


def find_records(
    records: mx.array | Sequence[mx.array], rows: mx.array | Sequence[int] | None, shared: mx.array | None
) -> Source:
    """Returns the location of the records of :func:`experts_for_token` for kernels."""
    last = [] if shared is None else [shared]
    if not isinstance(records, mx.array):
        buffers = [*records, *last]
        return Source(buffers, len(buffers), False, [])
    if not isinstance(rows, mx.array):
        rows = mx.array(list(range(records.shape[0]) if rows is None else rows), dtype=mx.uint32)
    template: Template = [("STRIDE", records.shape[1]), ("ROUTED", rows.size)]
    return Source([records, rows, *last], 0, shared is not None, template)


def gate_up(x: mx.array, source: Source, count: int, layout: RecordLayout, form: int) -> mx.array:
    """Returns silu(gate·x) · (up·x) of every record: [K, I] in the dtype of x."""
    columns, out = layout.hidden_size, layout.intermediate_size
    lanes, threads = lanes_per_row(columns, _LANES), _SIMDGROUPS * SIMD
    groups = -(-out // (threads // lanes * _GATE_UP_ROWS))
    (h,) = gate_up_kernel(source.separate, source.shared)(
        [x, *source.buffers],
        template=[
            ("T", x.dtype), ("IN", columns), ("OUT", out), *_places("GATE", layout.gate_proj, "GATE_"),
            *_places("UP", layout.up_proj, "UP_"), *source.template, ("FORM", form), ("ROWS", _GATE_UP_ROWS),
            ("LANES", lanes),
        ],
        grid=(groups * threads, count, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[(count, out)],
        output_dtypes=[x.dtype],
    )  # fmt: skip
    return h


def down(
    h: mx.array, source: Source, weights: mx.array, residual: mx.array | None, layout: RecordLayout, form: int
) -> mx.array:
    """Returns residual + Σ_k weights[k] · down_k(h[k]): [1, H] in the dtype of h."""
    columns, out, count = layout.intermediate_size, layout.hidden_size, h.shape[0]
    lanes = lanes_per_row(columns, _LANES)
    threads, tiles = count * SIMD, -(-out // (SIMD // lanes * _DOWN_ROWS))
    (y,) = down_kernel(source.separate, source.shared, residual is not None)(
        [h, weights, *source.buffers, *([] if residual is None else [residual])],
        template=[
            ("T", h.dtype), ("K", count), ("IN", columns), ("OUT", out), *_places("DOWN", layout.down_proj),
            *source.template, ("FORM", form), ("ROWS", _DOWN_ROWS), ("LANES", lanes),
        ],
        grid=(tiles * threads, 1, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[(1, out)],
        output_dtypes=[h.dtype],
    )  # fmt: skip
    return y


def _places(name: str, projection: ProjectionLayout, prefix: str = "") -> Template:
    """Returns the type of scales, the bits and the group size of a projection, and the offsets of its parts in words."""
    q, scales = projection.quantization, projection.scales
    assert q is not None and scales is not None
    words = {f"{name}_{part.name.upper()}": part.offset // 4 for part in projection.parts}
    return [
        (f"{prefix}S", DTYPES[scales.dtype]), (f"{prefix}BITS", q.bits), (f"{prefix}GROUP", q.group_size),
        (f"{prefix}MODE", _MODES.index(q.mode)), (name, words[f"{name}_WEIGHT"]), (f"{name}_SCALES", words[f"{name}_SCALES"]),
        (f"{name}_BIASES", words.get(f"{name}_BIASES", 0)), (f"{name}_GLOBAL", words.get(f"{name}_GLOBAL_SCALE", 0)),
    ]  # fmt: skip


def _record_access(separate: int, shared: bool) -> tuple[list[str], str]:
    """Returns the input names for the records and the macro RECORD(k), because templates cannot select buffers."""
    if separate:
        names = [f"record{k}" for k in range(separate)]
        choice = "".join(f"(k) == {k} ? {name} : " for k, name in enumerate(names[:-1])) + names[-1]
    else:
        names = ["bank", "bank_rows"] + (["shared"] if shared else [])
        choice = "bank + size_t(bank_rows[k]) * STRIDE"
        choice = f"(k) < uint(ROUTED) ? {choice} : shared" if shared else choice
    return names, f"#define RECORD(k) ({choice})\n"


@cache
def gate_up_kernel(separate: int, shared: bool) -> Kernel:
    """Returns the kernel for records in this form; see :class:`Source`."""
    names, defines = _record_access(separate, shared)
    return Kernel("expert_gate_up", ["x", *names], ["h"], headers=["quantized"], defines=defines)


@cache
def down_kernel(separate: int, shared: bool, residual: bool) -> Kernel:
    """Returns the kernel of the down projections, with or without a residual."""
    names, defines = _record_access(separate, shared)
    defines += f"#define RESIDUAL(i) {'float(residual[i])' if residual else '0.0f'}\n"
    inputs = ["h", "weights", *names, *(["residual"] if residual else [])]
    return Kernel("expert_down", inputs, ["y"], headers=["quantized"], defines=defines)
