"""The control connections between rank 0 and all other ranks, and a watchdog over the ranks."""

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
_SLOWEST = 1e6  # bytes per second; a network slower than this counts as down


@dataclass
class _State:
    """The state of a rank. Times are those of this process's clock.

    Attributes:
        heard: time of its last message.
        entered: number of sums it has begun. records: number of records it has fetched. cpu: seconds it has computed.
        layer: current layer. doing: ``"idle"``, ``"works"`` or ``"waits"`` (in a sum).
        seen, changed: the last progress that counted, and its time.
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
        """Returns the seconds without progress, i.e. without a sum, a record, or ``enough`` seconds of computing.

        For a rank that waits in a sum, computing time does not count, because the ring busy-waits.
        """
        computes = self.doing != "waits" and self.cpu - self.seen[2] > enough
        if (self.entered, self.records) != self.seen[:2] or computes:
            self.seen, self.changed = (self.entered, self.records, self.cpu), now
        return now - self.changed


class Peers:
    """The other ranks that this rank is connected with: rank 0 with all, the others with rank 0.

    MLX does not end a sum whose partner is silent. So this class checks every rank at least twice a second. If a rank
    stops, is silent, or makes no progress while others wait for it, the group ends on all ranks. Then the sockets of
    the ring are shut down, and evaluations that wait for them raise an error. Other back ends offer no way to end a
    sum. There, and if a following rank is stuck elsewhere, the process ends itself after another timeout.

    Args:
        connections: the connections by rank.
        timeout: seconds after which a silent or stuck rank counts as lost.

    Attributes:
        failure: reason why the group is broken; empty while it works.
    """

    def __init__(self, rank: int, connections: Mapping[int, Connection], timeout: float) -> None:
        self.rank, self.timeout, self.failure = rank, timeout, ""
        self._sums: Sums | None = None
        self._records: Callable[[], int] = lambda: 0
        self.working = False  # whether a pass is running
        self._inbox: SimpleQueue[tuple[int, list[Any]] | None] = SimpleQueue()
        self._causes: dict[int, str] = {}  # causes by number of the pass
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
        """Starts to watch the progress: sums, and the number of fetched records."""
        sums.cause, sums.broken, self._sums, self._records = self.cause, self.fail, sums, records

    def send(self, *message: Any) -> None:
        """Queues a message to all connected ranks."""
        for link in self._links.values():
            link.send(list(message))

    def receive(self) -> tuple[int, list[Any]]:
        """Waits for a message; returns the rank that sent it, and the message.

        Raises:
            PeerError: the group is broken, or this rank has left it.
        """
        found = self._inbox.get()
        if found is None:
            self._inbox.put(None)
            raise PeerError(self.failure or "the model was closed")
        return found

    def begin(self, number: int) -> None:
        """Begins the pass with this number.

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
        """Ends the pass."""
        self.working = False

    def say_cause(self, error: BaseException) -> None:
        """Tells the other ranks why the pass fails on this rank."""
        self.send("cause", self._number, f"rank {self.rank}: {type(error).__name__}: {error}")

    def cause(self) -> str:
        """Waits briefly for the cause of a failed pass; returns an empty string if no rank sends it."""
        deadline = time.monotonic() + self.timeout
        while not self.failure and self._number not in self._causes and time.monotonic() < deadline:
            time.sleep(0.005)
        return self.failure or self._causes.get(self._number, "")

    def fail(self, reason: str) -> None:
        """Breaks the group: ends the pass on this rank, and tells the others."""
        with self._lock:
            if self.failure or self._closed.is_set():
                return
            self.failure = reason
        self.send("broken", reason)
        self._inbox.put(None)
        if self._sums is not None:  # while models load, no rank waits in a sum, and the group can be used again
            end_connections(host_addresses())
            threading.Thread(target=self._end_if_stuck, args=(self._number,), daemon=True).start()

    @property
    def closed(self) -> bool:
        """Whether the connections are ended, or rank 0 has ended the work."""
        return self._closed.is_set()

    def close(self) -> None:
        """Sends queued messages and closes the connections."""
        self._closed.set()
        self._inbox.put(None)  # a thread may wait for an answer
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
            for other, link in self._links.items():  # rank 0 is connected with all ranks
                if other != rank:
                    link.send(message)
        else:
            if kind == "stop":  # connections that end from now on are not failures
                self._closed.set()
            self._inbox.put((rank, message))

    def _lost(self, rank: int) -> None:
        self.fail(f"rank {rank} is gone: its process ended, or the connection to it did")

    def _beat(self) -> list[Any]:
        self._look(self._own)
        own = self._own
        return ["beat", own.entered, own.records, own.cpu, own.layer, own.doing]

    def _look(self, state: _State) -> None:
        """Updates the state of this rank."""
        sums = self._sums
        state.heard, state.records, state.cpu = time.monotonic(), self._records(), time.process_time()
        if sums is not None:
            state.entered, state.layer = sums.entered, sums.layer
            state.doing = "waits" if sums.waiting else "works" if self.working else "idle"

    def _watch(self) -> None:
        last = time.monotonic()
        while not self._closed.wait(self._interval) and not self.failure:
            now = time.monotonic()
            late = now - last - self._interval  # this process, or the whole machine, was suspended
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
        """Ends the process if it is stuck in a sum of another back end, or in a follower."""
        time.sleep(self.timeout)
        in_sum = self._sums is not None and self._sums.waiting
        if self.working and self._number == number and (in_sum or self.rank):
            _log.critical("rank %d is stuck, and ends: %s", self.rank, self.failure)
            os._exit(1)
