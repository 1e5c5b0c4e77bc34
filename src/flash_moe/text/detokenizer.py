"""Turns a stream of token ids into text, without incomplete characters.

The text of a token depends on its neighbours: a character may span several tokens, and some decoders treat the first
token specially (they drop its leading space). So each step decodes a short window of tokens whose text was already
returned (context) and of pending tokens. It returns only the text after the part that was already returned.
"""

from __future__ import annotations

from collections.abc import Callable, Container

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"

# An unfinished UTF-8 character has at most three bytes, hence touches at most three tokens; one more is context.
_UNFINISHED_WINDOW = 4


class Detokenizer:
    """Decodes one stream of tokens incrementally.

    The texts that `add` and `finish` return, joined, equal `decode` of all ids that are not silent.

    Args:
        decode: function that decodes a whole list of ids.
        silent: function that tells whether an id has no text (special tokens, ids outside the vocabulary).
        bytewise: ids of byte-fallback tokens (`<0x0A>`). A decoder turns a sequence of them into text only as a whole,
            so the sequence is held back until another token ends it.
    """

    def __init__(
        self,
        decode: Callable[[list[int]], str],
        *,
        silent: Callable[[int], bool] = lambda token_id: False,
        bytewise: Container[int] = frozenset(),
    ) -> None:
        self._decode = decode
        self._silent = silent
        self._bytewise = bytewise
        self._window: list[int] = []
        self._shown = 0  # characters of the decoded window that were already returned

    def add(self, token_id: int) -> str:
        """Adds one token and returns the text that it completes, possibly empty.

        A final U+FFFD may be the start of an incomplete character, so it is held back until the next token. The cost
        does not depend on the number of earlier tokens.
        """
        if self._silent(token_id):
            return ""
        self._window.append(token_id)
        if token_id in self._bytewise:
            return ""
        text = self._decode(self._window)
        held = 1 if text.endswith(REPLACEMENT) else 0
        piece = text[self._shown : len(text) - held]
        # A window that starts inside a character decodes differently there, but only in the part already returned.
        self._window = self._window[-_UNFINISHED_WINDOW if held else -1 :]
        self._shown = len(self._decode(self._window)) - held
        return piece

    def finish(self) -> str:
        """Returns the text that was held back, and resets the decoder for a new stream."""
        piece = self._decode(self._window)[self._shown :]
        self._window, self._shown = [], 0
        return piece
