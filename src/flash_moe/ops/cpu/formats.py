"""Storage formats of weights, and the code that unpacks each format.

How a row is multiplied
    y[r] = Σ_g scale[r, g] · (Σ_i q[r, g, i] · x[g, i]) + bias[r, g] · (Σ_i x[g, i])
The integers q are converted to float32. Scale and bias are applied once per group.

The order of weights
    Stored bits are never moved. A *pack* is the smallest number of whole bytes (or a word) that holds whole weights.
    Each lane of a vector holds one pack, and one mask extracts the j-th weight of 16 packs. So x is reordered once per
    product: [block, lane, j] becomes [block, j, lane], with blocks of 16 packs and smaller blocks at the end of a row.
    Weights are not shifted down. Instead of q, the code uses 16 · q and divides x by 16, which is exact because 16 is a
    power of two.

        bits  pack     weights
        4     4 bytes  8
        8     1 byte   1
        2     1 byte   4
        6     3 bytes  4
        3     3 bytes  8
        5     5 bytes  8

    Plain floats are packs of one weight without scales.

Small floats
    In MLX's other modes, q is e2m1 (mxfp4, nvfp4) or e4m3 (mxfp8), a scale is e8m0, or e4m3 (nvfp4), and there is no
    bias. Both small floats have the fields of a half with fewer bits, including subnormal numbers. The code shifts them
    to the places of a half, and the machine converts them. The value is then too small by a power of two, for which x
    compensates. Packs are 2 bytes with 4 or 2 weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd
from typing import Any

from ...formats import Quantization
from ...record import round_up
from .vectors import FLOAT, I8, I16, I32, I64, ITEM_SIZES, LANES, TOO_SMALL, Emitter, constant, vector

_PACKS = {2: (1, 4), 3: (3, 8), 4: (4, 8), 5: (5, 8), 6: (3, 4), 8: (1, 1)}  # bits: bytes and weights of a pack


@dataclass(frozen=True)
class Format:
    """The storage format of a matrix.

    Attributes:
        dtype: dtype of plain weights, or of scales and biases: "BF16", "F16" or "F32"; "U8" in modes other than affine.
        bits, group_size: bits and group size; 0 for plain weights.
        mode: mode of quantisation.
        global_scale: whether there is a global scale, in the place of biases.
    """

    dtype: str
    bits: int = 0
    group_size: int = 0
    mode: str = "affine"
    global_scale: bool = False

    @classmethod
    def of(cls, dtype: str, quantization: Quantization | None, global_scale: bool = False) -> Format:
        """Returns the format of a stored matrix. ``dtype`` is that of the scales if the matrix is quantised."""
        if (q := quantization) is None:
            return cls(dtype)
        return cls(dtype, q.bits, q.group_size, q.mode, global_scale)

    @property
    def has_biases(self) -> bool:
        return self.bits > 0 and self.mode == "affine"

    @property
    def pack(self) -> tuple[int, int]:
        """The bytes and the weights of a pack."""
        if self.mode != "affine":
            return 2, 16 // self.bits
        return _PACKS[self.bits] if self.bits else (ITEM_SIZES[self.dtype], 1)

    @property
    def unit(self) -> int:
        """The number of packs in the smaller blocks at the end of a row."""
        return gcd(LANES, self.group_size // self.pack[1]) if self.bits else 1

    def steps(self, lanes: int) -> int:
        """Returns the number of vectors of ``lanes`` packs that share a scale."""
        return max(1, self.group_size // (lanes * self.pack[1])) if self.bits else 1

    @property
    def shifts(self) -> tuple[int, ...]:
        """The bits by which each weight of a pack stays shifted up; negative if the value is too small."""
        bits, (nbytes, count) = self.bits, self.pack
        if self.mode != "affine":
            return (-TOO_SMALL[bits] - (TOO_SMALL[8] if self.mode == "nvfp4" else 0),) * count
        if not bits:
            return (0,)
        return tuple(0 if bits * (j + 1) > min(8 * nbytes, 31) else bits * j for j in range(count))

    def arrangement(self, columns: int) -> tuple[int, ...]:
        """Returns the order of x for :func:`~.rows.arrange`: the offset of the sums in floats, then packs and blocks,
        then shifts.
        """
        packs, count, block = columns // self.pack[1], self.pack[1], LANES * self.steps(LANES) if self.bits else 0
        return round_up(columns, LANES), packs, count, packs // max(block, 1) * block, block, self.unit, *self.shifts

    def arranged(self, columns: int) -> int:
        """Returns the number of floats of x in this order, including its sums, in whole cache lines."""
        sums = columns // self.pack[1] // self.steps(LANES) if self.bits else 0
        return round_up(columns, LANES) + round_up(sums, LANES)

    def row_bytes(self, e: Emitter, columns: Any) -> Any:
        """Returns the bytes of a row of ``columns`` weights."""
        nbytes, count = self.pack
        return e.builder.mul(e.builder.sdiv(columns, I64(count)), I64(nbytes))

    def unpack(self, e: Emitter, address: Any, lanes: int) -> list[Any]:
        """Returns the j-th weights of ``lanes`` packs as float32 vectors, each scaled by its shift."""
        if not self.bits:
            return [e.floats(self.dtype, address, lanes)]
        if self.mode != "affine":
            pack = e.load(vector(I16, lanes), address)
            ups = (constant(I16, [16 - self.bits * (j + 1)] * lanes) for j in range(self.pack[1]))
            return [e.small_floats(e.builder.shl(pack, up), self.bits) for up in ups]
        words, last = self._words(e, address, lanes)
        b, bits = e.builder, self.bits
        values = []
        for j, shift in enumerate(self.shifts):
            if shift or j == 0:
                value = b.and_(words, constant(I32, [(1 << bits) - 1 << shift] * lanes)) if self.pack[1] > 1 else words
            elif last is None:
                value = b.lshr(words, constant(I32, [bits * j] * lanes))  # the highest bits of a word
            elif bits * j < 32:  # 5 bits: two of them in the word, three in the fifth byte
                low = b.lshr(words, constant(I32, [30] * lanes))
                value = b.or_(low, b.shl(b.and_(last, constant(I32, [7] * lanes)), constant(I32, [2] * lanes)))
            else:
                value = b.lshr(last, constant(I32, [bits * j - 32] * lanes))
            values.append(b.sitofp(value, vector(FLOAT, lanes)))
        return values

    def scales(self, e: Emitter, address: Any, count: int) -> Any:
        """Returns scales as a float32 vector; scales of nvfp4 are too small by a power of two."""
        if self.mode == "affine":
            return e.floats(self.dtype, address, count)
        b, stored = e.builder, e.load(vector(I8, count), address)
        if self.mode == "nvfp4":
            return e.small_floats(b.shl(b.zext(stored, vector(I16, count)), constant(I16, [8] * count)), 8)
        # 2^(s - 127); the code 0 means 2^-127, and becomes 0
        return b.bitcast(b.shl(b.zext(stored, vector(I32, count)), constant(I32, [23] * count)), vector(FLOAT, count))

    def _words(self, e: Emitter, address: Any, lanes: int) -> tuple[Any, Any]:
        """Returns packs as 32-bit integers, and their fifth bytes if they have them."""
        b, nbytes = e.builder, self.pack[0]
        kind = vector(I32, lanes)
        if nbytes == 4:
            return e.load(kind, address), None
        stored = e.load(vector(I8, nbytes * lanes), address)
        if nbytes == 1:
            return b.zext(stored, kind), None
        behind = nbytes * lanes  # a zero, see Emitter.shuffle
        places = [lane * nbytes + i if i < nbytes else behind for lane in range(lanes) for i in range(4)]
        words = b.bitcast(e.shuffle(stored, places), kind)
        if nbytes < 5:
            return words, None
        return words, b.zext(e.shuffle(stored, [lane * nbytes + 4 for lane in range(lanes)]), kind)
