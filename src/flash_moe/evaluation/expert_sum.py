"""Computes the routed experts of one layer for any number of tokens, and fetches every expert once."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from ..experts.store import ExpertStore
from ..ops.experts import experts_for_rows

_GROUP = 16  # experts that are computed together; limits the number of rows if a store holds all experts


def expert_sum(h: mx.array, chosen: np.ndarray, weights: np.ndarray, layer: int, store: ExpertStore) -> np.ndarray:
    """Returns Σ_k weights[:, k] · expert_k(h).

    :class:`~flash_moe.nn.sparse_moe.SparseMoE` computes the same with T · K rows in memory. Here, memory holds only the
    rows of one group of experts.

    Args:
        h: [T, H], the inputs of the experts.
        chosen: [T, K], ids of the experts.
        weights: [T, K] float32.

    Returns:
        [T, H] float32.

    Raises:
        ExpertReadError: the bytes of an expert could not be read.
    """
    total = np.zeros(h.shape, np.float32)
    order = np.argsort(chosen, axis=None, kind="stable")
    tokens, slots = np.divmod(order, chosen.shape[1])
    experts, counts = np.unique(chosen, return_counts=True)
    ends = np.cumsum(counts)
    step = min(store.capacity, _GROUP)
    for first in range(0, len(experts), step):
        group = slice(first, first + step)
        records = store.fetch(layer, experts[group].tolist())
        store.prefetch(layer, experts[first + step : first + 2 * step].tolist())
        rows = slice(ends[first] - counts[first], ends[group][-1])
        y = experts_for_rows(h[mx.array(tokens[rows])], records.stacked(), counts[group].tolist(), store.layouts[layer])
        records.used_by(y)
        scaled = np.array(y.astype(mx.float32)) * weights[tokens[rows], slots[rows], None]
        for part in np.split(np.arange(len(scaled)), np.cumsum(counts[group])[:-1]):
            total[tokens[rows][part]] += scaled[part]  # the tokens of one expert are distinct
    return total
