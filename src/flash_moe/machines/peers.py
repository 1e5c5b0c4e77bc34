"""The control connections between rank 0 and all others, and a watchdog over what the ranks do."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any

from ..errors import PeerError
from .link import Link
from .ring import end_connections, host_addresses
from .sums import Sums

_log = logging.getLogger(__name__)
_SLOWEST = 1e6  # bytes per second: a network that adds less counts as down


@dataclass
class _State:
    """The state of a rank; times are those of this process's clock.

    Attributes:
        heard: when a message of it came last.
        entered: sums it has begun; records: that it has fetched; cpu: seconds it has computed.
        layer: in which it is; doing: ``"idle"``, ``"works"`` or ``"waits"`` (in a sum).
        seen, changed: the progress that counted last, and when.
    """

    heard: float = field(default_factory=time.monotonic)
    entered: int = 0
    records: int = 0
    cpu: float = 0.0
    layer: int = -1
    doing: str = "idle"
    seen: tuple[int, int, float] = (-1, -1, 0.0)
    changed: float = field(default_factory=time.monotonic)

    def progress(self, now: float, enough: float) -> float:
        """Returns for how many seconds there was no progress: no sum, no record, no ``enough`` seconds of computing.

        A rank that waits in a sum computes nothing, though the ring spins.
        """
        computes = self.doing != "waits" and self.cpu - self.seen[2] > enough
        if (self.entered, self.records) != self.seen[:2] or computes:
            self.seen, self.changed = (self.entered, self.records, self.cpu), now
        return now - self.changed


class Peers:
    """The other ranks as one rank sees them: rank 0 sees all, the others see rank 0.

    Nothing in MLX ends a sum whose partner is silent. So this looks at every rank, twice a second or more often: a rank
    that is gone or silent, or that makes no progress while others wait for it, ends the group everywhere. The ring's
    sockets are shut down then, and what waits for them raises. Other back ends have nothing that could be ended: there,
    and where a rank that follows is stuck elsewhere, the process ends itself after another timeout.

    Args:
        connections: by rank.
        timeout: seconds after which a silent or stuck rank counts as lost.

    Attributes:
        failure: why the group is broken; empty while it works.
    """

    def __init__(self, rank: int, connections: Mapping[int, Connection], timeout: float) -> None:
        self.rank, self.timeout, self.failure = rank, timeout, ""
        self._sums: Sums | None = None
        self._records: Callable[[], int] = lambda: 0
        self.working = False  # a pass runs
        self._inbox: SimpleQueue[tuple[int, list[Any]] | None] = SimpleQueue()
        self._causes: dict[int, str] = {}  # by number of the pass
        self._number = 0
        self._lock, self._closed = threading.RLock(), threading.Event()
        self._interval = min(0.5, timeout / 4)
        self._states = {other: _State() for other in connections}
        self._own = _State()
        self._links = {
            other: Link(
                connection,
                lambda message, other=other: self._received(other, message),  # type: ignore[misc]
                lambda other=other: self._lost(other),  # type: ignore[misc]
                self._beat,
                self._interval,
            )
            for other, connection in connections.items()
        }
        threading.Thread(target=self._watch, name="flash-moe watchdog", daemon=True).start()

    def watch(self, sums: Sums, records: Callable[[], int]) -> None:
        """Looks at progress from now on: at sums, and at the number of records that were fetched."""
        sums.cause, sums.broken, self._sums, self._records = self.cause, self.fail, sums, records

    def send(self, *message: Any) -> None:
        """Queues a message to all ranks that this one is connected with."""
        for link in self._links.values():
            link.send(list(message))

    def receive(self) -> tuple[int, list[Any]]:
        """Waits for a message; returns the rank that sent it, and the message.

        Raises:
            PeerError: the group is broken.
        """
        found = self._inbox.get()
        if found is None:
            self._inbox.put(None)
            raise PeerError(self.failure)
        return found

    def begin(self, number: int) -> None:
        """A pass of this number begins.

        Raises:
            PeerError: the group is broken.
        """
        if self.failure:
            raise PeerError(
                f"the group of machines is broken: {self.failure}; close the model and start all ranks again"
            )
        self._number, self.working = number, True
        self._causes = {n: cause for n, cause in self._causes.items() if n >= number}

    def end(self) -> None:
        """The pass has ended."""
        self.working = False

    def say_cause(self, error: BaseException) -> None:
        """Tells the other ranks why this rank's pass fails."""
        self.send("cause", self._number, f"rank {self.rank}: {type(error).__name__}: {error}")

    def cause(self) -> str:
        """Waits a moment for why the pass fails; returns an empty text where nobody says it."""
        deadline = time.monotonic() + self.timeout
        while not self.failure and self._number not in self._causes and time.monotonic() < deadline:
            time.sleep(0.005)
        return self.failure or self._causes.get(self._number, "")

    def fail(self, reason: str) -> None:
        """Breaks the group: ends what runs on this rank, and tells the others."""
        with self._lock:
            if self.failure or self._closed.is_set():
                return
            self.failure = reason
        self.send("broken", reason)
        self._inbox.put(None)
        if self._sums is not None:  # while models load nobody waits in a sum, and the group can be used for another one
            end_connections(host_addresses())
            threading.Thread(target=self._end_if_stuck, args=(self._number,), daemon=True).start()

    def close(self) -> None:
        """Ends the connections; what they have queued is sent."""
        self._closed.set()
        for link in self._links.values():
            link.close()

    def _received(self, rank: int, message: list[Any]) -> None:
        state, (kind, *rest) = self._states[rank], message
        state.heard = time.monotonic()
        if kind == "beat":
            state.entered, state.records, state.cpu, state.layer, state.doing = rest
        elif kind == "broken":
            self.fail(rest[0])
        elif kind == "cause":
            self._causes[rest[0]] = rest[1]
            for other, link in self._links.items():  # rank 0 is connected with all
                if other != rank:
                    link.send(message)
        else:
            if kind == "stop":  # what ends from now on is no failure
                self._closed.set()
            self._inbox.put((rank, message))

    def _lost(self, rank: int) -> None:
        self.fail(f"rank {rank} is gone: its process ended, or the connection to it did")

    def _beat(self) -> list[Any]:
        self._look(self._own)
        own = self._own
        return ["beat", own.entered, own.records, own.cpu, own.layer, own.doing]

    def _look(self, state: _State) -> None:
        """Notes what this rank does."""
        sums = self._sums
        state.heard, state.records, state.cpu = time.monotonic(), self._records(), time.process_time()
        if sums is not None:
            state.entered, state.layer = sums.entered, sums.layer
            state.doing = "waits" if sums.waiting else "works" if self.working else "idle"

    def _watch(self) -> None:
        last = time.monotonic()
        while not self._closed.wait(self._interval) and not self.failure:
            now = time.monotonic()
            late = now - last - self._interval  # this process got no processor, or none of the machine's did
            for state in (self._own, *self._states.values()):
                state.heard, state.changed = min(now, state.heard + late), min(now, state.changed + late)
            last = now
            for rank, state in self._states.items():
                if now - state.heard > self.timeout:
                    self.fail(f"rank {rank} has been silent for {now - state.heard:.1f} s")
            if self.rank == 0:
                self._watch_progress(now)

    def _watch_progress(self, now: float) -> None:
        self._look(self._own)
        states, sums = {0: self._own, **self._states}, self._sums
        quiet = {rank: state.progress(now, self.timeout / 20) for rank, state in states.items()}
        if sums is None or not (sums.pending or sums.waiting):  # all ranks have entered all sums of the pass
            for state in states.values():
                state.changed = now
            return
        least = min(state.entered for state in states.values())
        behind = [rank for rank, state in states.items() if state.entered == least and state.doing != "waits"]
        stuck = [rank for rank in behind or states if quiet[rank] > self.timeout]
        if behind and stuck:
            rank = stuck[0]
            what = (
                "does not follow; it must call model.follow()" if states[rank].doing == "idle" else "makes no progress"
            )
            self.fail(f"rank {rank} {what}: nothing for {quiet[rank]:.1f} s in layer {states[rank].layer}")
        elif not behind and min(quiet.values()) > self.timeout + sums.nbytes / _SLOWEST:
            self.fail(
                f"the sum of layer {sums.layer} has not ended for {min(quiet.values()):.1f} s; is the network up?"
            )

    def _end_if_stuck(self, number: int) -> None:
        """Ends the process where nothing else would: in a sum of other back ends, or a follower that is stuck."""
        time.sleep(self.timeout)
        in_sum = self._sums is not None and self._sums.waiting
        if self.working and self._number == number and (in_sum or self.rank):
            _log.critical("rank %d is stuck, and ends: %s", self.rank, self.failure)
            os._exit(1)
