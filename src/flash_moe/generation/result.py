"""What a generation gives back."""

from __future__ import annotations

import html
from dataclasses import dataclass
from typing import Literal

from .stats import Stats

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Chunk:
    """One step of a stream.

    Attributes:
        text: text that became certain with this token; may be empty.
        token: the token id.
        stats: statistics up to this token.
        finish_reason: in the last chunk, ``"stop"`` (end of sequence or a stop string) or ``"length"``; else None.
    """

    text: str
    token: int
    stats: Stats
    finish_reason: FinishReason | None = None


@dataclass(frozen=True)
class Generation:
    """A finished generation; ``str()`` of it is the text.

    Attributes:
        text: the generated text, without stop strings and special tokens.
        tokens: all generated token ids, a final end-of-sequence token included.
        finish_reason: ``"stop"`` or ``"length"``.
        stats: what it cost.
    """

    text: str
    tokens: tuple[int, ...]
    finish_reason: FinishReason
    stats: Stats

    def __str__(self) -> str:
        return self.text

    def _repr_html_(self) -> str:
        return (
            f'<div style="white-space:pre-wrap">{html.escape(self.text)}</div>'
            f'<div style="opacity:.6;font-size:85%;margin-top:.5em">{html.escape(str(self.stats))}</div>'
        )
