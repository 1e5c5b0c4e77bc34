"""An authenticated connection between two ranks that carries only JSON, so that no code can be executed."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from queue import Empty, SimpleQueue
from typing import Any

_LONGEST = 64 << 20  # maximum bytes of a message; the longest messages are chunks of token ids


class Link:
    """Sends queued messages and delivers received ones, in two threads.

    Queueing is a single operation of the interpreter, so no signal or garbage collection can interrupt it.

    Args:
        received: function that is called with every message. lost: function that is called once, when the connection is
            lost.
        beat: function that returns the heartbeat message, which is sent every ``interval`` seconds.
    """

    def __init__(
        self,
        connection: Connection,
        received: Callable[[Any], None],
        lost: Callable[[], None],
        beat: Callable[[], list[Any]],
        interval: float,
    ) -> None:
        self._connection, self._received, self._lost = connection, received, lost
        self._beat, self._interval = beat, interval
        self._queue: SimpleQueue[Any] = SimpleQueue()
        self._process = os.getpid()
        self._socket = socket.socket(fileno=os.dup(connection.fileno()))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._threads = [
            threading.Thread(target=work, name="flash-moe control", daemon=True) for work in (self._send, self._receive)
        ]
        for thread in self._threads:
            thread.start()

    def send(self, message: list[Any]) -> None:
        """Queues a message. If the connection is lost, so is the message."""
        self._queue.put(message)

    def close(self, seconds: float = 2.0) -> None:
        """Sends queued messages for at most ``seconds`` seconds, and closes the connection, except in a forked process."""
        if os.getpid() != self._process:
            return
        sender, receiver = self._threads
        self._queue.put(None)
        sender.join(seconds)
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        if receiver is not threading.current_thread():
            receiver.join()  # it must not read from a closed descriptor, which may now belong to another connection
        self._socket.close()
        self._connection.close()

    def _send(self) -> None:
        due = time.monotonic()
        with suppress(OSError):  # the thread that receives notices
            while True:
                try:
                    message = self._queue.get(timeout=max(0.0, due - time.monotonic()))
                except Empty:
                    message, due = self._beat(), time.monotonic() + self._interval
                if message is None:
                    return
                self._connection.send_bytes(json.dumps(message).encode())

    def _receive(self) -> None:
        with suppress(OSError, EOFError, ValueError):  # an invalid message ends the connection
            while True:
                self._received(json.loads(self._connection.recv_bytes(_LONGEST)))
        self._lost()
