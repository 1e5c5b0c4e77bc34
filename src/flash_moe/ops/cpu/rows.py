"""The kernels of a format as C functions: multiply rows with a vector, dequantise rows, and reorder x."""

from __future__ import annotations

from dataclasses import astuple
from functools import cache
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, types
from numba.extending import intrinsic

from ...formats import GLOBAL_SCALE
from .compiling import kernel
from .formats import Format
from .vectors import FLOAT, I64, ITEM_SIZES, LANES, WIDTH, Emitter, constant, vector


def _format(literals: tuple[Any, ...]) -> Format:
    return Format(*(literal.literal_value for literal in literals))


@intrinsic(prefer_literal=True)
def _multiply(typing, dtype, bits, group_size, mode, scaled, w, s, b, columns, x, sums, y, first, last):  # type: ignore[no-untyped-def]
    literals = dtype, bits, group_size, mode, scaled
    fmt = _format(literals)

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        e = Emitter(builder)
        w, s, b, columns, x, sums, y, first, last = args[5:]
        with e.loop(first, last) as r:
            total = e.variable(FLOAT)
            for part in _parts(e, fmt, w, s, b, columns, r):
                total.value = builder.fadd(total.value, _dot(e, fmt, part, x, sums))
            found = builder.fmul(total.value, _factor(e, b)) if fmt.global_scale else total.value
            e.store(found, e.offset(y, r, 4))
        return context.get_dummy_value()

    return types.void(*literals, *(types.int64,) * 9), generate


@intrinsic(prefer_literal=True)
def _dequantize(typing, dtype, bits, group_size, mode, scaled, w, s, b, columns, out, stride, first, last):  # type: ignore[no-untyped-def]
    literals = dtype, bits, group_size, mode, scaled
    fmt = _format(literals)

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        e = Emitter(builder)
        w, s, b, columns, out, stride, first, last = args[5:]
        with e.loop(first, last) as r:
            row = e.builder.add(out, builder.mul(builder.sub(r, first), stride))
            for part in _parts(e, fmt, w, s, b, columns, r):
                _expand(e, fmt, part, row, _factor(e, b) if fmt.global_scale else None)
        return context.get_dummy_value()

    return types.void(*literals, *(types.int64,) * 8), generate


def _factor(e: Emitter, address: Any) -> Any:
    """Returns the factor for products from a global scale."""
    return e.builder.fdiv(e.load(FLOAT, address, 4), ir.Constant(FLOAT, GLOBAL_SCALE))


# Prefetch distance in bytes. On a Xeon with 10 GB/s per core, it doubles the speed of reads from memory; half of this
# distance helps less.
_AHEAD, _SCALES_AHEAD = 4096, 512


class _Part:
    """Consecutive blocks of a row with the same number of lanes."""

    def __init__(self, e: Emitter, fmt: Format, lanes: int, blocks: Any, before: Any, row: tuple[Any, ...]) -> None:
        nbytes, count = fmt.pack
        w, s, b = row
        self.lanes, self.blocks, self.steps = lanes, blocks, fmt.steps(lanes)
        self.scales = max(1, lanes * count // fmt.group_size) if fmt.bits else 0
        self.weights = lanes * count * self.steps  # of a block
        self.w = e.offset(w, before, nbytes)
        self.before = before  # packs
        if fmt.bits:
            groups = e.builder.sdiv(e.builder.mul(before, I64(count)), I64(fmt.group_size))
            self.s = e.offset(s, groups, ITEM_SIZES[fmt.dtype])
            self.b = e.offset(b, groups, ITEM_SIZES[fmt.dtype]) if fmt.has_biases else None


def _parts(e: Emitter, fmt: Format, w: Any, s: Any, b: Any, columns: Any, r: Any) -> list[_Part]:
    """Returns the parts of a row: blocks of 16 lanes, and smaller ones at the end."""
    builder, (_, count) = e.builder, fmt.pack
    if fmt.bits:
        scales = builder.mul(builder.mul(builder.sdiv(columns, I64(fmt.group_size)), r), I64(ITEM_SIZES[fmt.dtype]))
        s, b = builder.add(s, scales), builder.add(b, scales)
        for a in (s, b):
            e.prefetch(e.plus(a, _SCALES_AHEAD))
    row = builder.add(w, builder.mul(fmt.row_bytes(e, columns), r)), s, b
    packs = builder.sdiv(columns, I64(count))
    packs_of_block = LANES * fmt.steps(LANES)
    full = builder.sdiv(packs, I64(packs_of_block))
    parts = [_Part(e, fmt, LANES, full, I64(0), row)]
    if fmt.unit < LANES:
        before = builder.mul(full, I64(packs_of_block))
        left = builder.sdiv(builder.sub(packs, before), I64(fmt.unit * fmt.steps(fmt.unit)))
        parts.append(_Part(e, fmt, fmt.unit, left, before, row))
    return parts


def _dot(e: Emitter, fmt: Format, part: _Part, x: Any, sums: Any) -> Any:
    """Returns the product of a part of a row with x."""
    nbytes, count = fmt.pack
    lanes, kind = part.lanes, vector(FLOAT, part.lanes)
    total = e.variable(kind)
    x = e.offset(x, part.before, 4 * count)
    sums = e.offset(sums, e.builder.sdiv(part.before, I64(fmt.steps(LANES))), 4)
    with e.loop(I64(0), part.blocks) as i:
        block, xs = e.offset(part.w, i, lanes * nbytes * part.steps), e.offset(x, i, 4 * part.weights)
        e.prefetch(e.plus(block, _AHEAD))
        found: Any = None
        for step in range(part.steps):
            values = fmt.unpack(e, e.plus(block, step * lanes * nbytes), lanes)
            for j, value in enumerate(values):
                mine = e.load(kind, e.plus(xs, 4 * lanes * (step * count + j)))
                if found is None and fmt.bits:
                    found = e.builder.fmul(value, mine)
                else:
                    found = e.multiply_add(value, mine, total.value if found is None else found)
        if fmt.bits:
            found = e.multiply_add(_spread(e, fmt, part, part.s, i), found, total.value)
        if fmt.has_biases:
            bias = _spread(e, fmt, part, part.b, i)
            found = e.multiply_add(bias, e.load(kind, e.offset(sums, i, 4 * lanes)), found)
        total.value = found
    return e.sum(total.value)


def _spread(e: Emitter, fmt: Format, part: _Part, scales: Any, block: Any) -> Any:
    """Returns the scales (or biases) of a block, each repeated in the lanes of its group."""
    size = ITEM_SIZES[fmt.dtype]
    return e.spread(fmt.scales(e, e.offset(scales, block, size * part.scales), part.scales), part.lanes)


def _expand(e: Emitter, fmt: Format, part: _Part, out: Any, factor: Any) -> None:
    """Stores a part of a row as float32 in the order of blocks, with scales multiplied by a factor if there is one."""
    nbytes, count = fmt.pack
    lanes, factors = part.lanes, [2.0**shift for shift in fmt.shifts]
    out = e.offset(out, part.before, 4 * count)
    with e.loop(I64(0), part.blocks) as i:
        block, to = e.offset(part.w, i, lanes * nbytes * part.steps), e.offset(out, i, 4 * part.weights)
        if fmt.bits:
            scale = _spread(e, fmt, part, part.s, i)
            scale = scale if factor is None else e.builder.fmul(scale, e.splat(factor, lanes))
        if fmt.has_biases:
            bias = _spread(e, fmt, part, part.b, i)
            biases = [e.builder.fmul(bias, constant(FLOAT, [f] * lanes)) if f != 1 else bias for f in factors]
        for step in range(part.steps):
            for j, value in enumerate(fmt.unpack(e, e.plus(block, step * lanes * nbytes), lanes)):
                if fmt.has_biases:
                    value = e.multiply_add(value, scale, biases[j])
                elif fmt.bits:
                    value = e.builder.fmul(value, scale)
                e.store(value, e.plus(to, 4 * lanes * (step * count + j)))


@intrinsic(prefer_literal=True)
def tile(typing, rows, tokens, w, stride, x, columns, out):  # type: ignore[no-untyped-def]
    """Computes out [tokens, rows] float32 = x · Wᵀ for reordered rows at w, ``stride`` bytes apart."""
    row_count, token_count = rows.literal_value, tokens.literal_value

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        e = Emitter(builder)
        w, stride, x, columns, out = args[2:]
        kind = vector(FLOAT, WIDTH)
        ws = [builder.add(w, builder.mul(stride, I64(r))) for r in range(row_count)]
        xs = [e.load(I64, e.plus(x, 8 * t)) for t in range(token_count)]
        totals = [[e.variable(kind) for _ in ws] for _ in xs]
        with e.loop(I64(0), builder.sdiv(columns, I64(WIDTH))) as i:
            values = [e.load(kind, e.offset(a, i, 4 * WIDTH)) for a in xs]
            for r, a in enumerate(ws):
                weight = e.load(kind, e.offset(a, i, 4 * WIDTH))
                for value, of_token in zip(values, totals, strict=True):
                    of_token[r].value = e.multiply_add(weight, value, of_token[r].value)
        for t, of_token in enumerate(totals):
            for r, total in enumerate(of_token):
                e.store(e.sum(total.value), e.plus(out, 4 * (t * row_count + r)))
        return context.get_dummy_value()

    return types.void(rows, tokens, *(types.int64,) * 5), generate


@intrinsic(prefer_literal=True)
def mix(typing, tokens, vectors, p, p_stride, values, stride, count, out, out_stride):  # type: ignore[no-untyped-def]
    """Computes out [tokens, vectors · WIDTH] = p [tokens, count] · values [count, vectors · WIDTH]; strides are in
    bytes.
    """
    token_count, vector_count = tokens.literal_value, vectors.literal_value

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        e = Emitter(builder)
        p, p_stride, values, stride, count, out, out_stride = args[2:]
        kind = vector(FLOAT, WIDTH)
        totals = [[e.variable(kind) for _ in range(vector_count)] for _ in range(token_count)]
        with e.loop(I64(0), count) as i:
            row = builder.add(values, builder.mul(i, stride))
            parts = [e.load(kind, e.plus(row, 4 * WIDTH * v)) for v in range(vector_count)]
            for t, of_token in enumerate(totals):
                place = builder.add(e.offset(p, i, 4), builder.mul(p_stride, I64(t)))
                factor = e.splat(e.load(FLOAT, place, 4), WIDTH)
                for part, total in zip(parts, of_token, strict=True):
                    total.value = e.multiply_add(part, factor, total.value)
        for t, of_token in enumerate(totals):
            for v, total in enumerate(of_token):
                place = e.plus(builder.add(out, builder.mul(out_stride, I64(t))), 4 * WIDTH * v)
                e.store(total.value, place)
        return context.get_dummy_value()

    return types.void(tokens, vectors, *(types.int64,) * 7), generate


@intrinsic
def pointer(typing, address):  # type: ignore[no-untyped-def]
    """Converts an address to a pointer, for ``carray``."""

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.inttoptr(args[0], ir.IntType(8).as_pointer())

    return types.voidptr(types.int64), generate


@cache
def multiply(fmt: Format) -> Any:
    """Returns a function rows(w, s, b, columns, x, sums, y, first, last), which computes y[first:last] from a reordered
    x.
    """
    dtype, bits, group_size, mode, scaled = astuple(fmt)

    @kernel(9)
    def multiply_rows(w, s, b, columns, x, sums, y, first, last):  # type: ignore[no-untyped-def]
        _multiply(dtype, bits, group_size, mode, scaled, w, s, b, columns, x, sums, y, first, last)

    return multiply_rows


@cache
def dequantize(fmt: Format) -> Any:
    """Returns a function rows(w, s, b, columns, out, stride, first, last), which dequantises rows to reordered float32."""
    dtype, bits, group_size, mode, scaled = astuple(fmt)

    @kernel(8)
    def dequantize_rows(w, s, b, columns, out, stride, first, last):  # type: ignore[no-untyped-def]
        _dequantize(dtype, bits, group_size, mode, scaled, w, s, b, columns, out, stride, first, last)

    return dequantize_rows


@kernel(4)
def _arrange(order, columns, source, target):  # type: ignore[no-untyped-def]
    """Writes x [columns] in the order of a format, followed by its sums per lane.

    Args:
        order: address of :meth:`Format.arrangement`.
        source, target: addresses of float32.
    """
    shape = carray(pointer(order), 16, np.int64)
    width, packs, count, main, block, tail = shape[0], shape[1], shape[2], shape[3], shape[4], shape[5]
    x, out = carray(pointer(source), columns, np.float32), carray(pointer(target), width, np.float32)
    if block == 0:  # plain weights: in the same order, padded to a whole vector
        for i in range(width):
            out[i] = x[i] if i < columns else np.float32(0)
        return
    sums = carray(pointer(target + 4 * width), packs, np.float32)
    first, at, lanes = 0, 0, LANES
    while first < packs:
        if first == main:
            lanes = block = tail
        for lane in range(lanes):
            sums[at + lane] = np.float32(0)
        for start in range(first, first + block, lanes):
            for j in range(count):
                factor = np.float32(2.0) ** -np.float32(shape[6 + j])
                for lane in range(lanes):
                    value = x[(start + lane) * count + j]
                    out[start * count + j * lanes + lane] = value * factor
                    sums[at + lane] += value
        first += block
        at += lanes


ARRANGE = _arrange.address
