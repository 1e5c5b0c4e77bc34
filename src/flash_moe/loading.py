"""From the arguments of `Model.load` to values."""

from __future__ import annotations

import mlx.core as mx

from .errors import ArgumentError
from .models import ModelFiles

_DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}


def resolve_dtype(name: str | None, checkpoint: ModelFiles) -> mx.Dtype:
    """The dtype of activations, see :meth:`Model.load`. ArgumentError where there is no such dtype."""
    if name is not None:
        if name not in _DTYPES:
            raise ArgumentError(f"dtype is {name!r}, expected one of {', '.join(_DTYPES)}")
        return _DTYPES[name]
    if mx.default_device() == mx.cpu:
        return mx.float32
    stored = checkpoint.resident["norm.weight"].dtype if "norm.weight" in checkpoint.resident else "BF16"
    return {"F32": mx.float32, "F16": mx.float16}.get(stored, mx.bfloat16)
