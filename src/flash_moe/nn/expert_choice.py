"""Drops or replaces missing experts of a decoded token, as the options say.

The router's K likeliest experts are changed in two ways, each off by default and bounded by a number that the user
gives: missing experts give way to nearly as likely ones that are in memory, and missing experts of little weight are
left out. The functions are pure; ``in_memory`` is asked about as few experts as decide the matter.
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
        routed: experts that the router chose.
        dropped: those of them that were left out; ``swapped``: those that gave way to another.
        routed_mass: sum of the router probabilities of the chosen experts.
        dropped_mass: sum over dropped experts. ``swapped_mass``: sum over swaps of what the probability fell by.
    """

    routed: int = 0
    dropped: int = 0
    swapped: int = 0
    routed_mass: float = 0.0
    dropped_mass: float = 0.0
    swapped_mass: float = 0.0


class ExpertChoice:
    """Chooses for one token and layer at a time, and counts.

    Args:
        k: experts per token.
        normalize: whether the weights of the used experts are rescaled to sum to one.
    """

    def __init__(self, k: int, normalize: bool, options: StreamingOptions) -> None:
        self._k, self._normalize, self._options = k, normalize, options
        self.counters = ChoiceCounters()

    def __call__(self, probabilities: np.ndarray, in_memory: InMemory) -> tuple[np.ndarray, np.ndarray]:
        """Decides on one token.

        Args:
            probabilities: [E] float32, the router's softmax.
            in_memory: which of some experts can be used without reading.

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
    """Returns as many replacements of missing experts by others in memory as there can be, at the least loss of probability.

    A replacement is at least 1 - ``regret`` times as likely as what it replaces.

    Args:
        probabilities: [E]. order: [E], all experts by falling probability. missing: [K] bool, of the first K of them.

    Returns:
        Places [n] among the chosen, and the experts [n] that take them.
    """
    k = len(missing)
    out = np.flatnonzero(missing)[::-1]  # the least likely first
    least = (1 - regret) * probabilities[order[out]]
    others = order[k : k + int(np.count_nonzero(probabilities[order[k:]] >= least[0]))]
    present = (e for e in others.tolist() if in_memory([e])[0])  # the likeliest first, asked for one by one
    into = np.array(list(islice(present, len(out))), int)
    # n swaps cost least between the n least likely missing and the n likeliest others, and if those can be paired at
    # all, then the likeliest with the likeliest.
    for n in range(len(into), 0, -1):
        if (probabilities[into[:n]] >= least[:n][::-1]).all():
            return out[:n][::-1], into[:n]
    return out[:0], into[:0]


def cold(probabilities: np.ndarray, missing: np.ndarray, threshold: float) -> np.ndarray:
    """Returns which of the chosen experts are left out: missing ones whose share is below the threshold, but never all.

    Args:
        probabilities: [K], of the chosen experts. missing: [K] bool.

    Returns:
        [K] bool.
    """
    dropped = missing & (probabilities < threshold * probabilities.sum())
    if dropped.all():
        dropped[probabilities.argmax()] = False
    return dropped
