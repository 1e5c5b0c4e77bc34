"""Turn a stream of token ids into text, never showing half a character.

A token's text depends on its neighbours: a character may be spread over several tokens, and some decoders treat
the first token specially (they drop its leading space). So each step decodes a short window, made of tokens already
shown (context) and tokens still pending, and returns only what lies behind the part already shown.
"""

from __future__ import annotations

from collections.abc import Callable, Container

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"

# An unfinished UTF-8 character has at most three bytes, hence touches at most three tokens; one more is context.
_UNFINISHED_WINDOW = 4


class Detokenizer:
    """Incremental decoder of one token stream.

    All pieces returned by `add`, followed by `finish`, concatenate to `decode` of all ids that are not silent.

    Args:
        decode: decodes a list of ids in one shot.
        silent: tells whether an id yields no text at all (special tokens, ids outside the vocabulary).
        bytewise: ids of byte-fallback tokens (`<0x0A>`). Their decoder turns a run of them into text as a whole or
            not at all, so a run is held back until another token ends it.
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
        """Appends one token and returns the text that has become certain, possibly empty.

        A trailing U+FFFD may be the start of an unfinished character: it is held back until the next token tells.
        The cost does not depend on how many tokens came before.
        """
        if self._silent(token_id):
            return ""
        self._window.append(token_id)
        if token_id in self._bytewise:
            return ""
        text = self._decode(self._window)
        held = 1 if text.endswith(REPLACEMENT) else 0
        piece = text[self._shown : len(text) - held]
        # A window that starts inside a character decodes differently there, but only in the part already shown.
        self._window = self._window[-_UNFINISHED_WINDOW if held else -1 :]
        self._shown = len(self._decode(self._window)) - held
        return piece

    def finish(self) -> str:
        """Returns what is still held back, and starts afresh: the next `add` begins a new stream."""
        piece = self._decode(self._window)[self._shown :]
        self._window, self._shown = [], 0
        return piece
