"""Predicts the share of a token's experts that are in memory, from the number of records that fit.

The model assumes independent references: in each layer, a token draws K of E experts, independent of earlier tokens.
The probability of the i-th most popular expert is proportional to i^-s. Memory drops the least recently used record.
Then Che's approximation holds. A record stays in memory for a fixed time t after each use; t is the time in which as
many distinct records are requested as fit. With q the probability of the record per token, it is in memory with
probability 1 - (1 - q)^t. Source: Che, Tung, Wang, "Hierarchical Web Caching Systems" (IEEE JSAC 20, 2002).

Real routing has more temporal locality than this model, so real hit rates should be higher for the same popularity.
"""

from __future__ import annotations

import numpy as np

_FOREVER = 1 << 40  # tokens
SKEW = 0.5  # the exponent s, an assumption; 0 means perfectly balanced routing, 1 means Zipf's law


def popularity(experts: int, k: int, skew: float = SKEW) -> np.ndarray:
    """Returns the probability that a token uses each expert of a layer, [E] float64, descending; the sum is K."""
    weights = np.arange(1, experts + 1, dtype=np.float64) ** -skew
    chosen = np.ones(experts)
    certain = 0
    while certain < k:  # each round sets probabilities above 1 to 1, until none of the others exceeds 1
        chosen[certain:] = (k - certain) * weights[certain:] / weights[certain:].sum()
        more = int(np.count_nonzero(chosen[certain:] > 1))
        if not more:
            break
        chosen[certain : certain + more] = 1
        certain += more
    return chosen


def distinct(probabilities: np.ndarray, tokens: float) -> float:
    """Returns the expected number of experts of a layer that this many tokens use."""
    return float((1 - (1 - probabilities) ** tokens).sum())


def hit_rate(probabilities: np.ndarray, records: float) -> float:
    """Returns the expected share of requests whose record is in memory.

    Args:
        probabilities: probability of each expert of a layer per token.
        records: number of records per layer that fit into memory.

    Returns:
        The share, from 0 to 1. Tokens pass through all layers in turn, so a record stays for a whole number of tokens.
    """
    touched = int(np.count_nonzero(probabilities))
    if records >= touched:
        return 1.0
    tokens = _lifetime(probabilities, records)
    return float((probabilities * (1 - (1 - probabilities) ** tokens)).sum() / probabilities.sum())


def _lifetime(probabilities: np.ndarray, records: float) -> int:
    """Returns the maximum number of tokens whose distinct experts fit into memory."""
    high = 1
    while distinct(probabilities, high) <= records and high < _FOREVER:
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if distinct(probabilities, middle) <= records else (low, middle)
    return low
