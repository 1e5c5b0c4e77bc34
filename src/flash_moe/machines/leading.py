"""Rank 0: it sends every pass of its network to the other ranks."""

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
    """A network that sends its passes to the other ranks. All other attributes are those of the network.

    Attributes:
        network: the network of this rank.
        rank: 0.
        stop: function that ends the other ranks' wait for commands.
    """

    rank = 0

    def __init__(self, network: Any, sums: Sums, peers: Peers, store: Any) -> None:
        self.network, self.sums, self.peers, self._store = network, sums, peers, store
        evict = weakref.WeakMethod(self._evict)  # no reference cycle, so that closing frees the weights immediately
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
        """Gives a cache a number, and creates its counterparts on the other ranks with the command."""
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
            PeerError: another rank stopped, failed or has different settings.
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
        """Returns whether a wait for reads must end."""
        wanted = self._cancelled is None or not self._cancelled()
        return bool(self.peers.failure) or self.sums.stopped() or not wanted

    def common_lengths(self, cache: LedCache) -> set[int]:
        """Returns the lengths to which all ranks can truncate their cache of a sequence."""
        return set(cache.cache.held).intersection(*self._ask("held", cache.number))

    def _evict(self, flush: bool) -> None:
        """Makes the stores of all other ranks drop their records, and waits until they have."""
        self._ask("evict", flush)

    def _ask(self, command: str, *arguments: Any) -> list[Any]:
        """Sends a command to all other ranks and returns their answers."""
        with self._asking:
            question, answers = next(self._questions), list[Any]()
            self.peers.send(command, question, *arguments)
            while len(answers) < self.sums.size - 1:
                _, (_, answered, answer) = self.peers.receive()
                if answered == question:  # other answers belong to an interrupted command
                    answers.append(answer)
            return answers


def _stop(peers: Peers) -> None:
    """Ends the other ranks' wait for commands."""
    peers.send("stop")
    peers.close()


class LedCache:
    """The cache of a sequence on rank 0; every rank has its own counterpart. Other attributes are those of the cache.

    Attributes:
        cache: the cache of this rank.
        number: number of the sequence on all ranks.
        failed: whether the last pass failed, so that the ranks may hold different lengths.
    """

    def __init__(self, cache: Any, leader: LeadingNetwork, number: int) -> None:
        self.cache, self.number, self.failed = cache, number, False
        self._leader = leader
        weakref.finalize(self, leader.peers.send, "drop", number).atexit = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.cache, name)

    def mark(self, lengths: Sequence[int]) -> None:
        """Requests marks at these lengths on all ranks."""
        with held_interrupts():
            self.cache.mark(lengths)
            self._leader.peers.send("mark", self.number, list(lengths))

    def cut_back(self, length: int) -> None:
        """Truncates the caches of all ranks to ``length``."""
        with held_interrupts():
            self.cache.cut_back(length)
            self._leader.peers.send("cut_back", self.number, length)

    def fork(self, length: int) -> LedCache:
        """Copies the caches of all ranks with the first ``length`` tokens."""
        return self._leader.own(self.cache.fork(length), "fork", self.number, length)

    def recover(self) -> bool:
        """After a failed pass, truncates the caches to the longest common length of all ranks.

        Returns whether there is one.
        """
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
    """Truncates a cache to a length that it holds, even after a failed pass."""
    if length != len(cache.tokens) or not cache.sound:
        cache.cut_back(length)
