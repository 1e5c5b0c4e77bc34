"""Numbers that ops read at run time, as small arrays.

They are cached, because all layers of a token use the same ones.
"""

from __future__ import annotations

from functools import lru_cache

import mlx.core as mx


@lru_cache(maxsize=64)
def floats(*values: float) -> mx.array:
    """Returns the values as an array [n] float32."""
    return mx.array(values, dtype=mx.float32)


@lru_cache(maxsize=64)
def integers(*values: int) -> mx.array:
    """Returns the values as an array [n] int32."""
    return mx.array(values, dtype=mx.int32)
