"""Filters of probabilities: top_k, top_p and min_p."""

from __future__ import annotations

from typing import Protocol

import numpy as np

_CANDIDATES = 1024  # most probable tokens that top_p looks at first; nearly always they are enough


class Filters(Protocol):
    """Bounds of the filters; :class:`~flash_moe.generation.sampling.Sampling` has them."""

    @property
    def top_k(self) -> int: ...

    @property
    def top_p(self) -> float: ...

    @property
    def min_p(self) -> float: ...


def kept_tokens(logits: np.ndarray, filters: Filters) -> tuple[np.ndarray, np.ndarray]:
    """Token ids that top_k, top_p and min_p leave, and their renormalised probabilities.

    Most probable first, or by id where all are kept: sorting a whole vocabulary takes longer than all the rest.
    """
    probabilities = np.exp(logits - logits.max())
    probabilities /= probabilities.sum()
    if filters.top_k == 0 and filters.top_p == 1 and filters.min_p == 0:
        return np.arange(probabilities.size), probabilities
    ids = _candidates(probabilities, filters)
    ids = ids[np.argsort(-probabilities[ids], kind="stable")]
    kept = probabilities[ids]
    if filters.top_k:
        ids, kept = ids[: filters.top_k], kept[: filters.top_k] / kept[: filters.top_k].sum()
    if filters.top_p < 1:
        count = int(np.searchsorted(np.cumsum(kept), filters.top_p)) + 1
        ids, kept = ids[:count], kept[:count]
    above = kept >= filters.min_p * kept[0]
    ids, kept = ids[above], kept[above]
    return ids, kept / kept.sum()


def _candidates(probabilities: np.ndarray, filters: Filters) -> np.ndarray:
    """Ids, in order, of all tokens that the filters can keep: few of a vocabulary, as a rule."""
    if filters.top_k:
        return largest(probabilities, filters.top_k)
    if filters.top_p == 1:
        return np.flatnonzero(probabilities >= filters.min_p * probabilities.max())
    count, ids = _CANDIDATES, largest(probabilities, _CANDIDATES)
    while ids.size < probabilities.size and probabilities[ids].sum() < filters.top_p:
        count *= 8
        ids = largest(probabilities, count)
    return ids


def largest(values: np.ndarray, count: int) -> np.ndarray:
    """Indices of the ``count`` largest values, or of all, in order."""
    if count >= values.size:
        return np.arange(values.size)
    return np.sort(np.argpartition(-values, count - 1)[:count])
