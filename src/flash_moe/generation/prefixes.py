"""Reuses the caches of earlier sequences for prompts with the same prefix."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from threading import RLock

from ..checks import integer
from ..limits import memory_limit
from ..nn.network import Cache

MARKS = 3  # marks of a sequence; each takes the memory of the recurrent states of all layers


class Prefixes:
    """Keeps the caches of the most recently used sequences, up to a number of bytes.

    A stream takes a cache and extends it. Two streams never share a cache.

    Args:
        new_cache: function that creates an empty cache.
        ends: ids of tokens that end a message.
        limit: maximum number of bytes of all kept caches.
        least: number of sequences that are kept even if they exceed the limit.
    """

    def __init__(self, new_cache: Callable[[], Cache], ends: Collection[int], limit: int = 0, least: int = 1) -> None:
        self._new_cache, self._ends = new_cache, ends
        self._limit, self._least = limit, least
        self._kept: list[Cache] = []  # the most recently used cache is last
        self._lock = RLock()  # reentrant: a stream that is collected returns its cache in any thread

    def take(self, tokens: Sequence[int]) -> Cache:
        """Returns a cache with the longest possible prefix of ``tokens``.

        The prefix excludes the last token, whose logits are needed.
        """
        with self._lock:
            length, best = max(
                ((usable(cache, tokens), cache) for cache in self._kept), key=lambda found: found[0], default=(0, None)
            )
            if best is None or not length or best not in self._kept:
                cache = self._new_cache()
            elif length < len(best.tokens) and 2 * best.nbytes <= self._limit:
                cache = best.fork(length)  # the other conversation may continue as well
                if length >= max(best.marks, default=0):  # or it is this conversation, with its last reply rewritten
                    self._kept.remove(best)
                    self._kept.insert(0, best)
            else:
                self._kept.remove(best)
                cache = best
                if length < len(cache.tokens):
                    cache.cut_back(length)
        self.mark(cache, tokens)
        return cache

    def mark(self, cache: Cache, tokens: Sequence[int]) -> None:
        """Requests marks at positions where other prompts are likely to differ from ``tokens``.

        The cache holds a prefix of ``tokens``.
        """
        ahead = [length for length in boundaries(tokens, self._ends) if length > len(cache.tokens)]
        wanted = sorted({*cache.marks, *([len(cache.tokens)] if cache.tokens else []), *ahead})
        cache.mark([*wanted[:1], *wanted[1:][1 - MARKS :]])  # the first is often the end of a system prompt

    def put(self, cache: Cache) -> None:
        """Returns a cache to the pool. If its last pass failed, the cache is truncated to a mark, or dropped."""
        if not cache.recover() or not cache.tokens:
            return
        with self._lock:
            self._kept.append(cache)
            while len(self._kept) > self._least and sum(kept.nbytes for kept in self._kept) > self._limit:
                del self._kept[0]

    @property
    def sequences(self) -> list[Cache]:
        """The kept caches; the most recently used one is last."""
        with self._lock:
            return list(self._kept)

    def clear(self) -> None:
        """Drops all caches and frees their memory."""
        with self._lock:
            self._kept.clear()


def kept(prompt_cache: int | None) -> tuple[int, int]:
    """Returns the bytes and the number of sequences to keep; None means a sixteenth of the memory and one.

    Raises:
        ArgumentError: ``prompt_cache`` is not a number of bytes.
    """
    return (memory_limit() // 16, 1) if prompt_cache is None else (integer("prompt_cache", prompt_cache, 0), 0)


def usable(cache: Cache, tokens: Sequence[int]) -> int:
    """Returns the length of the longest prefix of ``tokens``, without the last, to which a cache can be truncated."""
    common = shared(cache.tokens, tokens[:-1])
    return common if common == len(cache.tokens) else cache.reach(common)


def shared(a: Sequence[int], b: Sequence[int]) -> int:
    """Returns the length of the common prefix of two sequences."""
    low, high = 0, min(len(a), len(b))
    while low < high:  # the first `low` tokens are equal; comparing slices is much faster than comparing elements
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def boundaries(tokens: Sequence[int], ends: Collection[int]) -> list[int]:
    """Returns lengths at which another prompt is likely to differ.

    These are the ends of the first and the last message or, without messages, the position before the last token.
    """
    after = [i for i, token in enumerate(tokens[:-1], start=1) if token in ends]
    if after:
        return sorted({after[0], after[-1]})
    return [len(tokens) - 1] if len(tokens) > 1 else []
