"""Rank 0: what its network runs, the other ranks run too."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import count
from threading import Lock
from typing import Any

import mlx.core as mx

from ..errors import PeerError
from .interrupts import held_interrupts
from .peers import Peers
from .sums import Sums


class LeadingNetwork:
    """A network that tells the other ranks what it runs. Everything else is the network's own.

    Attributes:
        network: runs here.
        rank: 0.
        stop: ends what the other ranks follow.
    """

    rank = 0

    def __init__(self, network: Any, sums: Sums, peers: Peers, store: Any) -> None:
        self.network, self.sums, self.peers, self._store = network, sums, peers, store
        evict = weakref.WeakMethod(self._evict)  # no cycle, so that closing frees the weights at once
        store.evict_others = lambda flush: (found := evict()) and found(flush)
        self._cancelled: Callable[[], bool] | None = None
        self._caches, self._passes, self._questions = count(1), count(1), count(1)
        self._asking = Lock()
        self.stop = weakref.finalize(self, _stop, peers)  # at the latest when the process exits

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.network, name)
        return self._together if name == "run_together" else found

    def new_cache(self) -> LedCache:
        """Returns an empty cache for a new sequence, on all ranks."""
        return self.own(self.network.new_cache(), "new")

    def own(self, cache: Any, command: str, *arguments: int) -> LedCache:
        """Gives a cache a number, under which the command makes it on the other ranks."""
        with held_interrupts():
            number = next(self._caches)
            self.peers.send(command, number, *arguments)
            return LedCache(cache, self, number)

    @contextmanager
    def serving(self, task: Any) -> Iterator[None]:
        """As the network's own."""
        with self.network.serving(task):
            self._cancelled = task.cancelled
            try:
                yield
            finally:
                self._cancelled = None

    def run(self, tokens: Sequence[int], cache: LedCache, last: int) -> mx.array:
        """As the network's own, on all ranks.

        Raises:
            PeerError: another rank is gone, failed or disagrees.
        """
        tokens = [int(token) for token in tokens]
        chunks = self.network.chunks(tokens, cache.cache, last)
        with self._pass([cache], chunks, "run", [cache.number], tokens, last):
            logits: mx.array = self.network.run(tokens, cache.cache, last)
            return logits

    def _together(self, tokens: Sequence[Sequence[int]], caches: Sequence[LedCache]) -> mx.array:
        tokens = [[int(token) for token in own] for own in tokens]
        with self._pass(caches, [sum(map(len, tokens))], "together", [cache.number for cache in caches], tokens):
            logits: mx.array = self.network.run_together(tokens, [cache.cache for cache in caches])
            return logits

    @contextmanager
    def _pass(self, caches: Sequence[LedCache], chunks: list[int], command: str, *arguments: Any) -> Iterator[None]:
        number = next(self._passes)
        self.peers.begin(number)
        with held_interrupts() as self.sums.stopped:
            self._store.stop_if(self._stopped)
            self.sums.begin(chunks)
            lengths = [len(cache.tokens) for cache in caches]
            self.peers.send(command, number, chunks, lengths, *arguments)
            try:
                yield
            except BaseException as error:
                for cache in caches:
                    cache.failed = True
                if not isinstance(error, PeerError):
                    self.peers.say_cause(error)
                with suppress(PeerError):  # the first error says more
                    self.sums.give_up()
                if self.peers.failure and not isinstance(error, PeerError):
                    raise PeerError(f"layer {self.sums.layer}: {self.peers.failure}") from error
                raise
            finally:
                self._store.stop_if(self._cancelled)
                self.peers.end()

    def _stopped(self) -> bool:
        """Returns whether a wait for reads has to end."""
        wanted = self._cancelled is None or not self._cancelled()
        return bool(self.peers.failure) or self.sums.stopped() or not wanted

    def common_lengths(self, cache: LedCache) -> set[int]:
        """Returns the lengths to which all ranks can cut their cache of a sequence back."""
        return set(cache.cache.held).intersection(*self._ask("held", cache.number))

    def _evict(self, flush: bool) -> None:
        """Has the stores of all other ranks forget their records, and waits for it."""
        self._ask("evict", flush)

    def _ask(self, command: str, *arguments: Any) -> list[Any]:
        """Returns the answers of all other ranks to a command."""
        with self._asking:
            question, answers = next(self._questions), list[Any]()
            self.peers.send(command, question, *arguments)
            while len(answers) < self.sums.size - 1:
                _, (_, answered, answer) = self.peers.receive()
                if answered == question:  # else to one that was interrupted
                    answers.append(answer)
            return answers


def _stop(peers: Peers) -> None:
    """Ends what the other ranks follow."""
    peers.send("stop")
    peers.close()


class LedCache:
    """The cache of a sequence on rank 0, of which every rank has its own. What it has not, the cache has.

    Attributes:
        cache: the one of this rank.
        number: by which the others know theirs.
        failed: whether the last pass failed, so that the ranks may hold different lengths.
    """

    def __init__(self, cache: Any, leader: LeadingNetwork, number: int) -> None:
        self.cache, self.number, self.failed = cache, number, False
        self._leader = leader
        weakref.finalize(self, leader.peers.send, "drop", number).atexit = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.cache, name)

    def mark(self, lengths: Sequence[int]) -> None:
        """Asks for marks at these lengths, on all ranks."""
        with held_interrupts():
            self.cache.mark(lengths)
            self._leader.peers.send("mark", self.number, list(lengths))

    def cut_back(self, length: int) -> None:
        """Forgets all tokens from ``length`` on, on all ranks."""
        with held_interrupts():
            self.cache.cut_back(length)
            self._leader.peers.send("cut_back", self.number, length)

    def fork(self, length: int) -> LedCache:
        """Returns another cache of the first ``length`` tokens, on all ranks."""
        return self._leader.own(self.cache.fork(length), "fork", self.number, length)

    def recover(self) -> bool:
        """Goes back to the longest beginning that all ranks hold, if a pass failed. Returns whether there is one."""
        if not self.failed:
            return bool(self.cache.recover())
        try:
            length = max(self._leader.common_lengths(self), default=0)
        except PeerError:
            return False
        if length:
            with held_interrupts():
                go_back(self.cache, length)
                self._leader.peers.send("go_back", self.number, length)
                self.failed = False
        return bool(length)


def go_back(cache: Any, length: int) -> None:
    """Cuts a cache back to a length that it holds, whatever a failed pass left in it."""
    if length != len(cache.tokens) or not cache.sound:
        cache.cut_back(length)
