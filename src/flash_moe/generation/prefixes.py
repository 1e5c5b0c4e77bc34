"""Prompts that begin as a sequence before: a conversation that goes on, or another question about the same text."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from threading import RLock

from ..checks import integer
from ..limits import memory_limit
from ..nn.network import Cache

MARKS = 3  # kept of a sequence; each costs the recurrent states of all layers


class Prefixes:
    """Keeps sequences, for prompts that share their beginning with one; those used last, up to a number of bytes.

    A sequence that is being extended belongs to the stream that took it: two streams never share one.

    Args:
        new_cache: makes an empty cache.
        ends: token ids that end a message.
        limit: bytes of caches to keep.
        least: sequences to keep, however large they are.
    """

    def __init__(self, new_cache: Callable[[], Cache], ends: Collection[int], limit: int = 0, least: int = 1) -> None:
        self._new_cache, self._ends = new_cache, ends
        self._limit, self._least = limit, least
        self._kept: list[Cache] = []  # the one used last is last
        self._lock = RLock()  # a stream may be collected, and give its cache back, while its own thread holds it

    def take(self, tokens: Sequence[int]) -> Cache:
        """Returns a cache that holds as much of ``tokens`` as possible, though not the last, whose logits are wanted."""
        with self._lock:
            length, best = max(
                ((usable(cache, tokens), cache) for cache in self._kept), key=lambda found: found[0], default=(0, None)
            )
            if best is None or not length or best not in self._kept:
                cache = self._new_cache()
            elif length < len(best.tokens) and 2 * best.nbytes <= self._limit:
                cache = best.fork(length)  # the other conversation may go on as well
                if length >= max(best.marks, default=0):  # or is this one, with its last reply rewritten
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
        """Asks for marks where other prompts are likely to part from ``tokens``, of which the cache holds a beginning."""
        ahead = [length for length in boundaries(tokens, self._ends) if length > len(cache.tokens)]
        wanted = sorted({*cache.marks, *([len(cache.tokens)] if cache.tokens else []), *ahead})
        cache.mark([*wanted[:1], *wanted[1:][1 - MARKS :]])  # the first is often a system prompt's end

    def put(self, cache: Cache) -> None:
        """Gives a cache back. One whose last pass failed half-way goes back to a mark, or is dropped."""
        if not cache.recover() or not cache.tokens:
            return
        with self._lock:
            self._kept.append(cache)
            while len(self._kept) > self._least and sum(kept.nbytes for kept in self._kept) > self._limit:
                del self._kept[0]

    @property
    def sequences(self) -> list[Cache]:
        """Those that are kept; the one used last is last."""
        with self._lock:
            return list(self._kept)

    def clear(self) -> None:
        """Forgets all sequences and frees their memory."""
        with self._lock:
            self._kept.clear()


def kept(prompt_cache: int | None) -> tuple[int, int]:
    """Returns the bytes and the number of sequences to keep: one, and a sixteenth of the memory, where nothing is said.

    Raises:
        ArgumentError: ``prompt_cache`` is no number of bytes.
    """
    return (memory_limit() // 16, 1) if prompt_cache is None else (integer("prompt_cache", prompt_cache, 0), 0)


def usable(cache: Cache, tokens: Sequence[int]) -> int:
    """Returns how many of ``tokens``, without the last, a cache can be made to hold."""
    common = shared(cache.tokens, tokens[:-1])
    return common if common == len(cache.tokens) else cache.reach(common)


def shared(a: Sequence[int], b: Sequence[int]) -> int:
    """Returns how many tokens two sequences have in common at their beginning."""
    low, high = 0, min(len(a), len(b))
    while low < high:  # the first `low` are alike; slices compare much faster than elements
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def boundaries(tokens: Sequence[int], ends: Collection[int]) -> list[int]:
    """Lengths at which another prompt is likely to part: after the first and last message, or before the last token."""
    after = [i for i, token in enumerate(tokens[:-1], start=1) if token in ends]
    if after:
        return sorted({after[0], after[-1]})
    return [len(tokens) - 1] if len(tokens) > 1 else []
