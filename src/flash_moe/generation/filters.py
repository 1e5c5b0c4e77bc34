"""The sampling filters top_k, top_p and min_p."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np

_ASKED = 64  # tokens to check against a format one by one, before computing a mask; about 10 µs each
_CANDIDATES = 1024  # number of most probable tokens that top_p considers first; this is almost always enough


class Filters(Protocol):
    """The parameters of the filters, as in :class:`~flash_moe.generation.sampling.Sampling`."""

    @property
    def top_k(self) -> int: ...

    @property
    def top_p(self) -> float: ...

    @property
    def min_p(self) -> float: ...


def kept_tokens(logits: np.ndarray, filters: Filters) -> tuple[np.ndarray, np.ndarray]:
    """Returns the token ids that top_k, top_p and min_p keep, and their renormalised probabilities.

    The most probable token comes first. If all tokens are kept, they are in the order of their ids, because sorting a
    whole vocabulary is slow.
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


def decisive_tokens(logits: np.ndarray, filters: Filters, allows: Callable[[int], bool]) -> np.ndarray | None:
    """Returns allowed tokens, most probable first, including all allowed tokens that the filters keep.

    The caller needs only their probabilities relative to each other. Returns None if too many tokens would have to be
    checked.

    Args:
        allows: function that tells whether a format allows a token.
    """
    ids = largest(logits, _ASKED)
    ids = ids[np.argsort(-logits[ids], kind="stable")]
    weights = np.exp(logits[ids] - logits[ids[0]])
    kept: list[int] = []
    for position, token in enumerate(ids.tolist()):
        if allows(token):
            kept.append(position)
            if len(kept) == filters.top_k or _settled(weights, kept, filters, logits.size):
                return ids[kept]
    return None


def _settled(weights: np.ndarray, kept: list[int], filters: Filters, size: int) -> bool:
    """Returns whether no token after the last of ``kept`` can pass the filters, even if all of them are allowed.

    Args:
        weights: weights of the most probable tokens, in order, relative to the first.
        size: number of all tokens. Those after ``weights`` have at most the weight of its last element.
    """
    behind = weights[kept[-1] + 1 :]
    room = filters.top_k - len(kept) if filters.top_k else size
    if filters.top_p < 1:
        unseen = max(0, min(room - behind.size, size - weights.size))
        sums = np.cumsum(weights[kept])
        totals = sums[-1] + np.array([0, behind[:room].sum() + unseen * weights[-1]])
        fewest, most = np.searchsorted(sums, filters.top_p * totals)
        return bool(fewest == most)
    following = behind[0] if behind.size else weights[-1]
    return bool(following < filters.min_p * weights[kept[0]])


def _candidates(probabilities: np.ndarray, filters: Filters) -> np.ndarray:
    """Returns the ids of all tokens that the filters can keep, in order; usually few."""
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
    """Returns the indices of the ``count`` largest values, or of all values, in descending order."""
    if count >= values.size:
        return np.arange(values.size)
    return np.sort(np.argpartition(-values, count - 1)[:count])
