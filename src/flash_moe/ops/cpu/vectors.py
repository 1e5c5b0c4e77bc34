"""Vector code in LLVM IR, for loops that LLVM's vectoriser does not vectorise well.

A vector has 16 lanes on every machine, and LLVM splits it into hardware registers. Addresses are integers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from llvmlite import binding as llvm
from llvmlite import ir
from numba.core import cgutils

LANES = 16
_FEATURES = llvm.get_host_cpu_features()
WIDTH = 16 if _FEATURES.get("avx512f") else 8 if _FEATURES.get("avx2") else 4  # lanes of a vector
VECTORS = 2 if WIDTH == 8 else 4  # of a value row, for that many tokens
ROWS, TOKENS = (3, 4) if WIDTH == 8 else (6, 4)  # sums that fit into the registers together
FLOAT, I8, I16, I32, I64 = ir.FloatType(), ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64)
_FAST = ("contract", "nsz")
ITEM_SIZES = {"BF16": 2, "F16": 2, "F32": 4, "U8": 1}
TOO_SMALL = {4: 14, 8: 8}  # powers of two by which small floats are too small as halves: e2m1 and e4m3, by bits
_PLACES = {
    4: (3, 0x8E00),
    8: (1, 0xBF80),
}  # shift from the top of a word to the places of a half, and mask of the bits to keep


def vector(kind: ir.Type, lanes: int) -> ir.VectorType:
    """Returns the vector type of that many lanes."""
    return ir.VectorType(kind, lanes)


def constant(kind: ir.Type, values: Sequence[float]) -> ir.Constant:
    """Returns a constant vector."""
    return ir.Constant(vector(kind, len(values)), list(values))


class Emitter:
    """Short names for the instructions of kernels.

    Args:
        builder: builder that receives the instructions.
    """

    def __init__(self, builder: ir.IRBuilder) -> None:
        self.builder = builder

    def load(self, kind: ir.Type, address: Any, align: int = 1) -> Any:
        """Loads a value or vector from memory."""
        return self.builder.load(self.builder.inttoptr(address, kind.as_pointer()), align=align)

    def store(self, value: Any, address: Any, align: int = 4) -> None:
        """Stores a value or vector to memory."""
        self.builder.store(value, self.builder.inttoptr(address, value.type.as_pointer()), align=align)

    def prefetch(self, address: Any) -> None:
        """Prefetches a cache line. Any address is allowed."""
        kind = ir.FunctionType(ir.VoidType(), [I8.as_pointer(), I32, I32, I32])
        function = cgutils.get_or_insert_function(self.builder.module, kind, "llvm.prefetch.p0i8")
        self.builder.call(function, [self.builder.inttoptr(address, I8.as_pointer()), I32(0), I32(3), I32(1)])

    def offset(self, address: Any, index: Any, size: int) -> Any:
        """Returns address + index · size."""
        return self.builder.add(address, self.builder.mul(index, I64(size)))

    def plus(self, address: Any, nbytes: int) -> Any:
        """Returns address + a constant."""
        return self.builder.add(address, I64(nbytes)) if nbytes else address

    def multiply_add(self, a: Any, b: Any, total: Any) -> Any:
        """Returns a · b + total, with one rounding if the machine supports it."""
        return self.builder.fadd(self.builder.fmul(a, b, flags=_FAST), total, flags=_FAST)

    def shuffle(self, value: Any, lanes: Sequence[int]) -> Any:
        """Returns the given lanes of a vector; lanes past its end are zero."""
        return self.builder.shuffle_vector(value, ir.Constant(value.type, None), constant(I32, lanes))

    def spread(self, value: Any, lanes: int) -> Any:
        """Widens a vector of n lanes to ``lanes`` lanes, repeating each lane."""
        n = value.type.count
        return self.shuffle(value, [lane * n // lanes for lane in range(lanes)])

    def splat(self, value: Any, lanes: int) -> Any:
        """Returns a vector with a scalar in every lane."""
        one = self.builder.insert_element(ir.Constant(vector(value.type, 1), ir.Undefined), value, I32(0))
        return self.spread(one, lanes)

    def floats(self, kind: str, address: Any, lanes: int) -> Any:
        """Returns stored floats ("BF16", "F16" or "F32") as a vector of float32."""
        b = self.builder
        if kind == "F32":
            return self.load(vector(FLOAT, lanes), address)
        if kind == "F16":
            return b.fpext(self.load(vector(ir.HalfType(), lanes), address), vector(FLOAT, lanes))
        bits = b.zext(self.load(vector(I16, lanes), address), vector(I32, lanes))
        return b.bitcast(b.shl(bits, constant(I32, [16] * lanes)), vector(FLOAT, lanes))

    def small_floats(self, words: Any, bits: int) -> Any:
        """Converts the highest bits of 16-bit words, e2m1 (4 bits) or e4m3 (8 bits), to float32; see :data:`TOO_SMALL`."""
        b, lanes, (down, keep) = self.builder, words.type.count, _PLACES[bits]
        halves = b.and_(b.ashr(words, constant(I16, [down] * lanes)), constant(I16, [keep] * lanes))
        return b.fpext(b.bitcast(halves, vector(ir.HalfType(), lanes)), vector(FLOAT, lanes))

    def sum(self, value: Any) -> Any:
        """Returns the sum of all lanes, by repeated halving."""
        while (n := value.type.count) > 1:
            low, high = (self.shuffle(value, range(start, start + n // 2)) for start in (0, n // 2))
            value = self.builder.fadd(low, high)
        return self.builder.extract_element(value, I32(0))

    def variable(self, kind: ir.Type) -> Variable:
        """Returns a variable with the initial value zero."""
        return Variable(self.builder, kind)

    @contextmanager
    def loop(self, first: Any, last: Any) -> Iterator[Any]:
        """Emits its body as a loop over [first, last)."""
        b = self.builder
        head, body, end = (b.append_basic_block(name) for name in ("head", "body", "end"))
        start = b.block
        b.branch(head)
        b.position_at_end(head)
        index = b.phi(I64)
        index.add_incoming(first, start)
        b.cbranch(b.icmp_signed("<", index, last), body, end)
        b.position_at_end(body)
        yield index
        index.add_incoming(b.add(index, I64(1)), b.block)
        b.branch(head)
        b.position_at_end(end)


class Variable:
    """A value that loops change; LLVM keeps it in registers."""

    def __init__(self, builder: ir.IRBuilder, kind: ir.Type) -> None:
        self._builder = builder
        with builder.goto_entry_block():
            self._place = builder.alloca(kind)
        self._zero = ir.Constant(kind, None if isinstance(kind, ir.VectorType) else 0)
        self.clear()

    def clear(self) -> None:
        self._builder.store(self._zero, self._place)

    @property
    def value(self) -> Any:
        return self._builder.load(self._place)

    @value.setter
    def value(self, value: Any) -> None:
        self._builder.store(value, self._place)


Emit = Callable[..., None]
