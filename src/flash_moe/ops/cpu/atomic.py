"""Atomic operations, calls by address and a pause instruction for Numba functions. Addresses are integers."""

from __future__ import annotations

import platform
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

_ORDER = "seq_cst"
# LLVM intrinsics with their argument, by machine
_PAUSES: dict[str, tuple[str, list[Any]]] = {
    "x86_64": ("llvm.x86.sse2.pause", []),
    "AMD64": ("llvm.x86.sse2.pause", []),
    "aarch64": ("llvm.aarch64.hint", [ir.IntType(32)(1)]),
    "arm64": ("llvm.aarch64.hint", [ir.IntType(32)(1)]),
}


def _place(builder: Any, address: Any) -> Any:
    return builder.inttoptr(address, ir.IntType(64).as_pointer())


@intrinsic
def load(typing, address):  # type: ignore[no-untyped-def]
    """Loads the 64-bit integer at an address."""

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.load_atomic(_place(builder, args[0]), _ORDER, 8)

    return types.int64(types.int64), generate


@intrinsic
def store(typing, address, value):  # type: ignore[no-untyped-def]
    """Stores a 64-bit integer."""

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        builder.store_atomic(args[1], _place(builder, args[0]), _ORDER, 8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@intrinsic
def add(typing, address, value):  # type: ignore[no-untyped-def]
    """Adds to a 64-bit integer and returns its previous value."""

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.atomic_rmw("add", _place(builder, args[0]), args[1], _ORDER)

    return types.int64(types.int64, types.int64), generate


@intrinsic
def exchange(typing, address, expected, value):  # type: ignore[no-untyped-def]
    """Stores ``value`` if the current value is ``expected``; returns whether it was."""

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        result = builder.cmpxchg(_place(builder, args[0]), args[1], args[2], _ORDER, _ORDER)
        return builder.extract_value(result, 1)

    return types.boolean(types.int64, types.int64, types.int64), generate


@intrinsic
def pause(typing):  # type: ignore[no-untyped-def]
    """Tells the core that the program is busy-waiting."""

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        if (found := _PAUSES.get(platform.machine())) is not None:
            name, values = found
            kind = ir.FunctionType(ir.VoidType(), [value.type for value in values])
            builder.call(cgutils.get_or_insert_function(builder.module, kind, name), values)
        return context.get_dummy_value()

    return types.void(), generate


def _caller(count: int) -> Any:
    """Makes ``call(function, *arguments)``, which calls the C function of that many int64 at an address."""

    @intrinsic
    def call(typing, function, *args):  # type: ignore[no-untyped-def]
        def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
            kind = ir.FunctionType(ir.VoidType(), [ir.IntType(64)] * count)
            values = [builder.extract_value(args[1], i) for i in range(count)]
            builder.call(builder.inttoptr(args[0], kind.as_pointer()), values)
            return context.get_dummy_value()

        return types.void(types.int64, types.StarArgTuple((types.int64,) * count)), generate

    return call


call3, call4, call8, call9, call10 = (
    _caller(3),
    _caller(4),
    _caller(8),
    _caller(9),
    _caller(10),
)  # by number of arguments
