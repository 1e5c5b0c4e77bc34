"""The ranks other than 0: they run the commands of rank 0."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NoReturn

from ..errors import ArgumentError, PeerError
from ..mlx_cache import clear_cache
from .interrupts import ignored_interrupts
from .leading import go_back
from .peers import Peers
from .sums import Sums

_log = logging.getLogger(__name__)
_CLEAR_INTERVAL = 16  # passes after which MLX's cached memory is freed, as on rank 0


class NoTokenizer:
    """A placeholder for the tokenizer of a following rank, which needs none."""

    eos_token_ids: frozenset[int] = frozenset()
    chat_template = None

    def token_id(self, text: str) -> None:
        """Returns None: there are no tokens."""

    def __getattr__(self, name: str) -> Any:
        raise ArgumentError("this rank follows rank 0, where text is read and written; call model.follow() here")


class FollowingNetwork:
    """The network of a following rank. It cannot generate by itself; all other attributes are those of the network.

    Attributes:
        rank: rank of this process, 1 or higher.
        stop: leaves the group, and tells rank 0 unless it has closed its model.
    """

    def __init__(self, network: Any, sums: Sums, peers: Peers, store: Any) -> None:
        self.network, self.rank = network, sums.rank
        self._sums, self._peers, self._store = sums, peers, store
        store.stop_if(lambda: bool(peers.failure))  # so that a stuck read does not block this rank
        self._caches: dict[int, Any] = {}
        self._passes = 0
        self.stop = weakref.finalize(self, _leave, peers)
        self.stop.atexit = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.network, name)

    def new_cache(self) -> NoReturn:
        """Raises ArgumentError: only rank 0 generates."""
        raise ArgumentError(f"this is rank {self.rank}, and rank 0 generates; call model.follow() here")

    def follow(self) -> None:
        """Runs the commands of rank 0 until rank 0 closes its model. Meanwhile, this rank ignores Ctrl-C.

        Raises:
            PeerError: the group is broken.
        """
        with ignored_interrupts():
            while True:
                _, (name, *arguments) = self._peers.receive()
                if name == "stop":
                    self._caches.clear()
                    return
                if name in ("run", "together"):
                    self._pass(name, *arguments)
                elif name in ("held", "evict"):
                    self._answer(name, *arguments)
                else:
                    self._change(name, *arguments)

    def _pass(
        self,
        name: str,
        number: int,
        chunks: list[int],
        lengths: list[int],
        which: list[int],
        tokens: list[Any],
        last: int = 0,
    ) -> None:
        try:
            self._peers.begin(number)
            self._sums.begin(chunks)
            caches = [self._cache(n) for n in which]
            if [len(cache.tokens) for cache in caches] != lengths:
                raise ArgumentError("a sequence has another length here than on rank 0; begin it anew")
            if name == "together":
                self.network.run_together(tokens, caches)
            else:
                self._run(tokens, caches[0], last, chunks)
        except Exception as error:
            if not isinstance(error, PeerError):
                self._peers.say_cause(error)
            _log.warning("pass %d ended: %s", number, error)
            with suppress(PeerError):
                self._sums.give_up()
        finally:
            self._peers.end()
        self._passes += 1
        if len(tokens) > 1 or self._passes % _CLEAR_INTERVAL == 0:
            clear_cache()

    def _run(self, tokens: Sequence[int], cache: Any, last: int, chunks: list[int]) -> None:
        """Runs tokens. Logits are computed only if the network's chunks depend on them."""
        as_well_without = self.network.chunks(tokens, cache, 0) == chunks
        self.network.run(tokens, cache, 0 if as_well_without else last)

    def _cache(self, number: int) -> Any:
        if (cache := self._caches.get(number)) is None:
            raise ArgumentError(f"sequence {number} was lost by a failure before; begin it anew")
        return cache

    def _answer(self, name: str, question: int, argument: int) -> None:
        answer = []
        if name == "evict":
            self._store.evict(flush=bool(argument))
        elif argument in self._caches:
            answer = self._caches[argument].held
        self._peers.send("answer", question, answer)

    def _change(self, name: str, number: int, *arguments: Any) -> None:
        """Changes a cache. If the cache cannot be changed, it is dropped, and passes that need it fail."""
        try:
            if name == "new":
                self._caches[number] = self.network.new_cache()
            elif name == "drop":
                self._caches.pop(number, None)
            elif name == "fork":
                self._caches[number] = self._cache(arguments[0]).fork(arguments[1])
            elif name == "mark":
                self._cache(number).mark(*arguments)
            elif name == "cut_back":
                self._cache(number).cut_back(*arguments)
            elif name == "go_back":
                go_back(self._cache(number), *arguments)
        except Exception as error:
            _log.warning("sequence %d is dropped: %s: %s", number, type(error).__name__, error)
            self._caches.pop(number, None)


def _leave(peers: Peers) -> None:
    """Ends this rank's part in the group."""
    peers.fail(f"rank {peers.rank} closed its model")
    peers.close()
