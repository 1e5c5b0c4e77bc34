"""Drops or replaces missing experts of a decoded token, according to the options.

The K most probable experts of the router are changed in two ways. Missing experts are replaced by almost equally
probable ones in memory, and missing experts with a small weight are left out. Both are off by default, and the user
sets their limits. The functions have no side effects, and call ``in_memory`` for as few experts as possible.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from .streaming_options import StreamingOptions

InMemory = Callable[[Sequence[int]], Sequence[bool]]


@dataclass
class ChoiceCounters:
    """Counters over all decoded tokens and layers.

    Attributes:
        routed: number of experts that the router chose.
        dropped: number of experts that were left out. ``swapped``: number of experts that were replaced by others.
        routed_mass: sum of the router probabilities of the chosen experts.
        dropped_mass: the same sum over dropped experts. ``swapped_mass``: sum of the decreases in probability over all
            swaps.
    """

    routed: int = 0
    dropped: int = 0
    swapped: int = 0
    routed_mass: float = 0.0
    dropped_mass: float = 0.0
    swapped_mass: float = 0.0


class ExpertChoice:
    """Chooses the experts of one token in one layer at a time, and counts the changes.

    Args:
        k: number of experts per token.
        normalize: whether the weights of the used experts are rescaled to sum to one.
    """

    def __init__(self, k: int, normalize: bool, options: StreamingOptions) -> None:
        self._k, self._normalize, self._options = k, normalize, options
        self.counters = ChoiceCounters()

    def __call__(self, probabilities: np.ndarray, in_memory: InMemory) -> tuple[np.ndarray, np.ndarray]:
        """Chooses the experts of one token.

        Args:
            probabilities: [E] float32, the router's softmax.
            in_memory: function that tells which of some experts can be used without a read.

        Returns:
            ids [n] int64 and weights [n] float32, 1 <= n <= K.
        """
        order = np.argsort(-probabilities, kind="stable")
        chosen = order[: self._k].copy()
        counters = self.counters
        counters.routed += len(chosen)
        counters.routed_mass += float(probabilities[chosen].sum(dtype=np.float64))
        missing = ~np.array(in_memory(chosen.tolist()), bool)
        if self._options.prefer_cached and missing.any():
            out, into = swaps(probabilities, order, missing, self._options.prefer_cached, in_memory)
            counters.swapped += len(out)
            counters.swapped_mass += float((probabilities[chosen[out]] - probabilities[into]).sum(dtype=np.float64))
            chosen[out], missing[out] = into, False
        used = chosen
        if self._options.drop_cold_below and missing.any():
            kept = ~cold(probabilities[chosen], missing, self._options.drop_cold_below)
            counters.dropped += int(np.count_nonzero(~kept))
            counters.dropped_mass += float(probabilities[chosen[~kept]].sum(dtype=np.float64))
            used = chosen[kept]
        weights = probabilities[used]
        return used, weights / weights.sum() if self._normalize else weights


def swaps(
    probabilities: np.ndarray, order: np.ndarray, missing: np.ndarray, regret: float, in_memory: InMemory
) -> tuple[np.ndarray, np.ndarray]:
    """Finds as many replacements of missing experts by experts in memory as possible, with the least loss of
    probability.

    The probability of a replacement is at least 1 - ``regret`` times that of the missing expert.

    Args:
        probabilities: [E]. order: [E], all experts by descending probability. missing: [K] bool, for the first K of
            them.

    Returns:
        The positions [n] among the chosen experts, and the experts [n] that replace them.
    """
    k = len(missing)
    out = np.flatnonzero(missing)[::-1]  # the least probable first
    least = (1 - regret) * probabilities[order[out]]
    others = order[k : k + int(np.count_nonzero(probabilities[order[k:]] >= least[0]))]
    present = (e for e in others.tolist() if in_memory([e])[0])  # the most probable first, queried one by one
    into = np.array(list(islice(present, len(out))), int)
    # The cheapest n swaps are between the n least probable missing experts and the n most probable others. If any
    # pairing of these is allowed, then so is the one in order of probability.
    for n in range(len(into), 0, -1):
        if (probabilities[into[:n]] >= least[:n][::-1]).all():
            return out[:n][::-1], into[:n]
    return out[:0], into[:0]


def cold(probabilities: np.ndarray, missing: np.ndarray, threshold: float) -> np.ndarray:
    """Returns a mask of chosen experts to leave out: missing ones whose share is below the threshold, but never all.

    Args:
        probabilities: [K], probabilities of the chosen experts. missing: [K] bool.

    Returns:
        [K] bool.
    """
    dropped = missing & (probabilities < threshold * probabilities.sum())
    if dropped.all():
        dropped[probabilities.argmax()] = False
    return dropped
