"""Prompts that begin as the sequence before: a conversation that goes on, or another question about the same text."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from threading import RLock

from ..nn.cache import SequenceCache

MARKS = 3  # kept of a sequence; each costs the recurrent states of all layers


class Prefixes:
    """Keeps the last sequence, for a prompt that shares its beginning.

    A sequence that is being extended belongs to who took it: streams that run at the same time never share one.

    Args:
        new_cache: makes an empty cache.
        ends: token ids that end a message.
    """

    def __init__(self, new_cache: Callable[[], SequenceCache], ends: Collection[int]) -> None:
        self._new_cache, self._ends = new_cache, ends
        self._last: SequenceCache | None = None
        self._lock = RLock()  # a stream may be collected, and give its cache back, while its own thread holds it

    def take(self, tokens: Sequence[int]) -> SequenceCache:
        """A cache that holds as much of ``tokens`` as possible, though not the last, whose logits are wanted."""
        with self._lock:
            cache, self._last = self._last, None
        if cache is not None:
            common = shared(cache.tokens, tokens[:-1])
            if common < len(cache.tokens):
                mark = max((mark for mark in cache.marks if mark <= common), default=0)
                if mark:
                    cache.cut_back(mark)
                else:
                    cache = None
        if cache is None:
            cache = self._new_cache()
        ahead = [length for length in boundaries(tokens, self._ends) if length > len(cache.tokens)]
        wanted = cache.marks + ahead
        cache.mark([*wanted[:1], *wanted[1:][1 - MARKS :]])  # the first is often a system prompt's end
        return cache

    def put(self, cache: SequenceCache) -> None:
        """Gives a cache back; one whose layers disagree is dropped."""
        if cache.sound:
            with self._lock:
                self._last = cache

    def clear(self) -> None:
        """Forgets the sequence and frees its memory."""
        with self._lock:
            self._last = None


def shared(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two sequences have in common at their beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def boundaries(tokens: Sequence[int], ends: Collection[int]) -> list[int]:
    """Lengths at which another prompt is likely to part: after the first and last message, or before the last token."""
    after = [i for i, token in enumerate(tokens[:-1], start=1) if token in ends]
    if after:
        return sorted({after[0], after[-1]})
    return [len(tokens) - 1] if len(tokens) > 1 else []
