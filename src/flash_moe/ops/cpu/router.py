"""Routes tokens: softmax over the experts, and the K largest."""

from __future__ import annotations

import numpy as np
from numba import types

from .compiling import MATRIX, function

f32 = np.float32


@function(MATRIX, types.boolean, types.int64[:, ::1], MATRIX)
def route(logits, normalize, ids, weights):  # type: ignore[no-untyped-def]
    """Chooses the K most probable experts of each token, in descending order, and their weights.

    Args:
        logits: [T, E] float32, overwritten. normalize: whether the K weights sum to one.
        ids: [T, K] int64, an output. weights: [T, K] float32, an output. NaN logits give NaN weights.
    """
    for t in range(ids.shape[0]):
        row, k = logits[t], ids.shape[1]
        largest = row[0]
        for e in range(row.size):
            largest = max(largest, row[e])
        total = f32(0)
        for e in range(row.size):
            row[e] = np.exp(row[e] - largest)
            total += row[e]
        chosen = f32(0)
        for i in range(k):
            best = 0
            for e in range(1, row.size):
                if row[e] > row[best]:
                    best = e
            ids[t, i], weights[t, i] = best, row[best]
            chosen += row[best]
            row[best] = f32(-1)
        for i in range(k):
            weights[t, i] = total if total != total else weights[t, i] / (chosen if normalize else total)  # keeps NaN
