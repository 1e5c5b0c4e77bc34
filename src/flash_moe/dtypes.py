"""Maps names in safetensors files to MLX's dtypes, and dtypes to names."""

from __future__ import annotations

import mlx.core as mx

DTYPES = {
    "U32": mx.uint32, "F32": mx.float32, "BF16": mx.bfloat16, "F16": mx.float16, "U8": mx.uint8, "I32": mx.int32,
    "I64": mx.int64, "BOOL": mx.bool_, "F8_E4M3": mx.uint8,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in reversed(DTYPES.items())}  # for uint8, the plain name
