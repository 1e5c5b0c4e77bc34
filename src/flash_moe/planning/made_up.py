"""Arrays that look like stored weights and mean nothing: finite, of any dtype and shape, and made at once."""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np

from ..record import RecordLayout

_VIEWS = {"BF16": mx.bfloat16, "F16": mx.float16}
_BLOCK = 1 << 16  # numbers, which repeat


def made_up_array(dtype: str, shape: tuple[int, ...]) -> mx.array:
    """Returns an array of a safetensors dtype: random bits for U32, numbers around 0.01 for floats."""
    numbers = np.resize(_block(dtype), math.prod(shape)).reshape(shape)
    array = mx.array(numbers)
    return array.view(_VIEWS[dtype]) if dtype in _VIEWS else array


def made_up_records(layout: RecordLayout, count: int) -> mx.array:
    """Returns a bank of records, [count, words] uint32, all alike."""
    record = np.zeros(layout.stride, np.uint8)
    for part in layout.parts:
        numbers = np.resize(_block(part.dtype), math.prod(part.shape))
        record[part.offset : part.offset + part.nbytes] = numbers.view(np.uint8)
    bank = mx.array(np.tile(record.view(np.uint32), (count, 1)))
    mx.eval(bank)
    return bank


def _block(dtype: str) -> np.ndarray:
    """Returns numbers of a dtype; 16-bit floats as their bits in uint16."""
    rng = np.random.default_rng(0)
    if dtype == "U8":  # scales of one byte: about 0.01 as e4m3, and as e8m0 as far from infinity as others
        return np.full(_BLOCK, 0x06, np.uint8)
    if dtype == "U32":
        return rng.integers(0, 1 << 32, _BLOCK, dtype=np.uint32)
    floats = (0.01 * rng.standard_normal(_BLOCK)).astype(np.float32)
    if dtype == "BF16":
        return (floats.view(np.uint32) >> 16).astype(np.uint16)
    return floats.astype(np.float16).view(np.uint16) if dtype == "F16" else floats
