"""What a generation gives back."""

from __future__ import annotations

import html
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from ..errors import FormatError
from .sampling import TokenLogprobs
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
        logprobs: of the token and of the most probable ones, if asked for.
    """

    text: str
    token: int
    stats: Stats
    finish_reason: FinishReason | None = None
    logprobs: TokenLogprobs | None = None


@dataclass(frozen=True)
class Generation:
    """A finished generation; ``str()`` of it is the text.

    Attributes:
        text: the generated text, without stop strings and special tokens.
        tokens: all generated token ids, a final end-of-sequence token included.
        finish_reason: ``"stop"`` or ``"length"``.
        stats: what it cost.
        logprobs: of every token, if asked for.
        enforced: what the reply was held to: ``"tools"`` (their schemas), ``"json"``, ``"regex"``, ``"choices"``, or
            ``"tools or json"`` and the like; empty where it was free.
    """

    text: str
    tokens: tuple[int, ...]
    finish_reason: FinishReason
    stats: Stats
    logprobs: tuple[TokenLogprobs, ...] | None = None
    enforced: str = ""
    _parse: Callable[[str], Any] | None = field(default=None, repr=False, compare=False)

    @cached_property
    def parsed(self) -> Any:
        """What ``response_format`` makes of the text: an instance of the class, JSON data, a match, or the choice.

        None without a format, and where tools are called instead.

        Raises:
            FormatError: the reply was cut, or the class refuses it. The text is in :attr:`text`.
        """
        if self._parse is None:
            return None
        if self.finish_reason == "length":
            raise FormatError("the reply was cut before its format was complete; raise max_tokens")
        return self._parse(self.text)

    def __str__(self) -> str:
        return self.text

    def _repr_html_(self) -> str:
        return (
            f'<div style="white-space:pre-wrap">{html.escape(self.text)}</div>'
            f'<div style="opacity:.6;font-size:85%;margin-top:.5em">{html.escape(str(self.stats))}</div>'
        )
