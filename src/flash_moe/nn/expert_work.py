"""The work of a token on the records of its experts on a GPU, for timing stores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import mlx.core as mx

from ..experts.store import ExpertStore, Records
from ..ops import expert_kernels
from ..ops.experts import enough, experts_for_rows, experts_in_place, parts_of
from ..record import RecordLayout


class ExpertWork:
    """Fetches the experts of a token and computes them, as decoding does.

    It uses the kernels, or MLX's products on banks by part or on records in place.

    Args:
        layouts: the record layouts, by layer.
        dtype: dtype of activations.
        kernels: whether experts use this library's kernels.

    Attributes:
        name: name of the kind of work, under which the faster store is stored.
    """

    def __init__(self, layouts: Mapping[int, RecordLayout], dtype: mx.Dtype, *, kernels: bool) -> None:
        self._layouts, self._dtype, self._kernels = layouts, dtype, kernels
        self.name = "kernels" if kernels else "ops"

    def __call__(self, store: ExpertStore, layer: int, experts: Sequence[int]) -> None:
        """Does the work of one token in one layer, including its evaluation."""
        records = store.fetch(layer, experts)
        outputs = self._multiply(records, self._layouts[layer], len(experts))
        for y in outputs:
            records.used_by(y)
        mx.eval(outputs)

    def _multiply(self, records: Records, layout: RecordLayout, count: int) -> list[mx.array]:
        x = mx.ones((1, layout.hidden_size), dtype=self._dtype)
        bank = records.arrays[0] if records.rows is not None else None
        if self._kernels:
            found = records.arrays if bank is None else bank
            return [expert_kernels.experts_for_token(x, found, mx.ones(count), layout, rows=records.rows)]
        if isinstance(bank, dict):
            return [experts_in_place(x, bank, enough(mx.array(list(records.rows or ()), dtype=mx.uint32)), layout)]
        if bank is not None:
            return [experts_for_rows(mx.broadcast_to(x, (count, x.shape[1])), records.stacked(), [1] * count, layout)]
        first = mx.zeros(1, dtype=mx.uint32)
        return [experts_in_place(x, parts_of(record, layout), first, layout) for record in records.arrays]
