"""Finds stop strings in text that arrives in pieces."""

from __future__ import annotations

from collections.abc import Iterable

from ..checks import shown
from ..errors import ArgumentError


class StopStrings:
    """Searches a stream of text for the first complete stop string.

    The result does not depend on how the text is divided into pieces. If the same character completes two stop strings,
    the one that began earlier counts.

    Args:
        stops: one stop string, several, or None.

    Attributes:
        stops: the stop strings as a tuple.
        found: the stop string that is complete; None before.

    Raises:
        ArgumentError: a stop string is empty or not a string.
    """

    def __init__(self, stops: str | Iterable[str] | None) -> None:
        if stops is None or isinstance(stops, str):
            stops = () if stops is None else (stops,)
        if not isinstance(stops, Iterable):
            raise ArgumentError(f"stop is {shown(stops)}, expected a string, several strings or None")
        self.stops = tuple(stops)
        for stop in self.stops:
            if not isinstance(stop, str) or not stop:
                raise ArgumentError(
                    f"found the stop string {shown(stop)}, expected non-empty strings; remove it from `stop`"
                )
        self._longest = max(map(len, self.stops), default=0)
        self._held = ""
        self.found: str | None = None

    def feed(self, text: str) -> tuple[str, bool]:
        """Adds the next piece of text.

        Returns:
            The text that is now safe to show, and whether a stop string is complete. If so, the text ends directly
                before the stop string, and later text is ignored.
        """
        if self.found is not None:
            return "", True
        text = self._held + text
        found = [(start + len(stop), start, stop) for stop in self.stops if (start := text.find(stop)) >= 0]
        if found:
            _, start, self.found = min(found)
            self._held = ""
            return text[:start], True
        cut = len(text) - self._unfinished(text)
        self._held = text[cut:]
        return text[:cut], False

    def flush(self) -> str:
        """Returns the text that was held back. Call it at the end of the stream."""
        held, self._held = self._held, ""
        return held

    def _unfinished(self, text: str) -> int:
        """Returns the length of the longest suffix of `text` that is a prefix of a stop string."""
        for length in range(min(len(text), self._longest - 1), 0, -1):
            suffix = text[-length:]
            if any(stop.startswith(suffix) for stop in self.stops):
                return length
        return 0
