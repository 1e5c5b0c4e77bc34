"""The cases of Qwen3.5-397B-A17B, for machines without a model."""

from __future__ import annotations

import json
from collections.abc import Iterator

from ..formats import ProjectionFormat, Quantization
from ..ops.dispatch import Case
from ..record import PROJECTIONS, RecordLayout

DTYPES = ("bfloat16", "float16", "float32")
_STORED = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


def standard_cases(dtypes: tuple[str, ...] = DTYPES) -> Iterator[Case]:
    """Yields every kernel at the layer sizes of Qwen3.5-397B-A17B, and products at other bit widths."""
    for dtype in dtypes:
        for bits in (4, 2, 3, 6, 8):
            yield "quantized_matvec", 1, 4096, 16384, bits, 64, dtype, dtype
        yield "quantized_matvec", 1, 8192, 4096, 4, 64, dtype, dtype
        formats = dict.fromkeys(PROJECTIONS, ProjectionFormat(_STORED[dtype], Quantization(4, 64)))
        layout = json.dumps(RecordLayout.build(4096, 1024, formats).to_json())
        for k in (4, 10):
            yield "experts", k, k, 1, layout, dtype
            yield "router", 512, k, 1, 1, dtype
        yield "attention", 32, 2, 256, 64, dtype
        yield "delta_net", 16, 64, 128, 128, 4, dtype
        yield "delta_chunks", 16, 64, 128, 128, dtype
        yield "add_rms_norm", 4096, dtype
