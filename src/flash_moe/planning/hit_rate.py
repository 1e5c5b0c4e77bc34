"""Predicts the share of a token's experts that are in memory, from how many fit there.

The model is that of independent references: in each layer a token draws K of E experts, the i-th most popular with a
probability proportional to i^-s, whatever the tokens before it drew. Memory forgets the least recently used record.
Then Che's approximation holds: a record stays for a fixed time t after each use, the time in which as many distinct
records are asked for as fit; it is there with probability 1 - (1 - q)^t, where q is its probability per token.
Source: Che, Tung, Wang, "Hierarchical Web Caching Systems" (IEEE JSAC 20, 2002).

Real routing has more locality in time than this, so real hit rates should be higher for the same popularity.
"""

from __future__ import annotations

import numpy as np

_FOREVER = 1 << 40  # tokens
SKEW = 0.5  # the exponent s; an assumption: 0 is routing that is perfectly balanced, 1 Zipf's law


def popularity(experts: int, k: int, skew: float = SKEW) -> np.ndarray:
    """Returns the probability that a token uses each expert of a layer, [E] float64, descending, at most 1, summing to
    K.
    """
    weights = np.arange(1, experts + 1, dtype=np.float64) ** -skew
    chosen = np.ones(experts)
    certain = 0
    while certain < k:  # each round settles experts that every token uses, until no other would be used more than once
        chosen[certain:] = (k - certain) * weights[certain:] / weights[certain:].sum()
        more = int(np.count_nonzero(chosen[certain:] > 1))
        if not more:
            break
        chosen[certain : certain + more] = 1
        certain += more
    return chosen


def distinct(probabilities: np.ndarray, tokens: float) -> float:
    """Returns how many experts of a layer this many tokens are expected to touch."""
    return float((1 - (1 - probabilities) ** tokens).sum())


def hit_rate(probabilities: np.ndarray, records: float) -> float:
    """Returns the expected share of requests that find their record in memory.

    Args:
        probabilities: per expert and token, of one layer.
        records: records of each layer that fit.

    Returns:
        From 0 to 1. Tokens pass through all layers in turn, so a record lives for whole tokens.
    """
    touched = int(np.count_nonzero(probabilities))
    if records >= touched:
        return 1.0
    tokens = _lifetime(probabilities, records)
    return float((probabilities * (1 - (1 - probabilities) ** tokens)).sum() / probabilities.sum())


def _lifetime(probabilities: np.ndarray, records: float) -> int:
    """Returns the most tokens that do not touch more distinct experts than fit."""
    high = 1
    while distinct(probabilities, high) <= records and high < _FOREVER:
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if distinct(probabilities, middle) <= records else (low, middle)
    return low
