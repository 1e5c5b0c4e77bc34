"""Find stop strings in text that arrives in pieces."""

from __future__ import annotations

from collections.abc import Iterable

from ..checks import shown
from ..errors import ArgumentError


class StopStrings:
    """Streaming search for the first stop string that is completed.

    The outcome does not depend on how the text is cut into pieces. Where two stop strings are completed by the same
    character, the one that began earlier counts.

    Args:
        stops: the stop strings, possibly none; a single string is one stop string.

    Attributes:
        stops: as given, as a tuple.

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
        self._stopped = False

    def feed(self, text: str) -> tuple[str, bool]:
        """Take the next piece of text.

        Returns:
            The text that is now safe to show, and whether a stop string has been completed. If so, the text ends
            right before it, and whatever is fed later is ignored.
        """
        if self._stopped:
            return "", True
        text = self._held + text
        found = [(start + len(stop), start) for stop in self.stops if (start := text.find(stop)) >= 0]
        if found:
            self._stopped, self._held = True, ""
            return text[: min(found)[1]], True
        cut = len(text) - self._unfinished(text)
        self._held = text[cut:]
        return text[:cut], False

    def flush(self) -> str:
        """Returns the text still held back, once no more is to come."""
        held, self._held = self._held, ""
        return held

    def _unfinished(self, text: str) -> int:
        """Returns length of the longest suffix of `text` with which a stop string begins."""
        for length in range(min(len(text), self._longest - 1), 0, -1):
            suffix = text[-length:]
            if any(stop.startswith(suffix) for stop in self.stops):
                return length
        return 0
