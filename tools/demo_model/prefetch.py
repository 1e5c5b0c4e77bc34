"""An iterator read ahead by a thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar, cast

Item = TypeVar("Item")


class Prefetch(Generic[Item]):
    """The items of ``source``, at most ``ahead`` of them made in advance; errors of the source are raised here.

    Args:
        stopped: ends the iteration when it returns true, also while the next item is not there yet.
    """

    def __init__(self, source: Iterator[Item], stopped: Callable[[], bool], ahead: int = 4) -> None:
        self._stopped = stopped
        self._queue: queue.Queue[tuple[Item | None, BaseException | None]] = queue.Queue(ahead)
        threading.Thread(target=self._fill, args=(source,), daemon=True).start()

    def __iter__(self) -> Iterator[Item]:
        return self

    def __next__(self) -> Item:
        while not self._stopped():
            try:
                item, error = self._queue.get(timeout=0.5)
            except queue.Empty:
                continue
            if error is not None:
                raise error
            return cast(Item, item)
        raise StopIteration

    def _fill(self, source: Iterator[Item]) -> None:
        try:
            for item in source:
                self._queue.put((item, None))
            self._queue.put((None, StopIteration()))
        except BaseException as error:
            self._queue.put((None, error))
