"""Splits the output of a model into reasoning, text and tool calls, during or after the generation.

Text that was already shown cannot be taken back. So characters that may be markup are held back until the next
characters decide. The result does not depend on how the text is divided into pieces.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ..errors import ToolCallError
from .call_reader import CLOSE, FUNCTION, FUNCTION_END, OPEN, CallReader, ToolCall

THINK, THINK_END = "<think>", "</think>"
REASONING_CLOSED = f"\n{THINK_END}\n\n"  # the end of reasoning, as in chat templates
Where = Literal["reasoning", "text", "tool_call"]

_MARKUP = re.compile(r"<tool_call>|</tool_call>|<function=([^<>\n]+)>")
_UNFINISHED_NAME = re.compile(r"<function=[^<>\n]*\Z")


@dataclass
class Parts:
    """The parts that a piece of a reply completes.

    Attributes:
        tool_calls: the completed tool calls.
        error: the error of the first malformed call.
    """

    reasoning: str = ""
    text: str = ""
    tool_calls: list[ToolCall] = field(default_factory=list)
    error: ToolCallError | None = None


class ReplyParser:
    """Parses one reply.

    White space around reasoning and around calls is dropped. All other text is unchanged.

    Args:
        tools: JSON schemas of the functions that the model may call.
        thinking: whether the prompt ends inside reasoning.
        calls: whether to look for calls; None means only if there are tools.

    Attributes:
        where: the current part of the reply.
    """

    def __init__(
        self, tools: Sequence[Mapping[str, Any]] | None = None, *, thinking: bool = False, calls: bool | None = None
    ) -> None:
        self._calls = CallReader(tools or ()) if (bool(tools) if calls is None else calls) else None
        self.where: Where = "reasoning" if thinking else "text"
        self._step = self._reason if thinking else self._begin
        self._held = ""
        self._known = ""  # the part of a prefill that was held back
        self._tried = 0  # number of characters of a call that were already searched for its end
        self._bare = False  # the current call or the one before has no <tool_call>
        self._gap = False  # the next white space follows reasoning or a call
        self._said = self._reasoned = self._mid_line = False

    def feed(self, text: str, last: bool = False) -> Parts:
        """Adds the next piece of the reply, and returns the parts that it completes.

        Args:
            last: whether the reply ends with it.
        """
        self._held += text
        parts = Parts()
        while self._step(parts):
            pass
        if last:
            self._finish(parts)
        return parts

    def begin(self, prefill: str) -> None:
        """Reads the part of the reply that the prompt contains already. Later parts do not contain its text."""
        self.feed(prefill)
        self._known = self._held

    def _finish(self, parts: Parts) -> None:
        if self.where == "tool_call":
            parts.error = parts.error or ToolCallError(
                f"the reply ends inside a tool call ({self._held[-40:]!r} are its last characters), expected "
                f"{FUNCTION_END if self._bare else CLOSE}; raise max_tokens if that was reached, or generate the reply "
                "again"
            )
        elif self.where == "reasoning":
            parts.reasoning += self._held.rstrip()
        elif not self._gap or self._held.strip():
            self._say(parts, self._held)
        self._held = ""

    def _begin(self, parts: Parts) -> bool:
        """Handles the start of the reply, where a model may open its reasoning itself."""
        start = self._held.lstrip()
        if THINK.startswith(start):
            return False
        if start.startswith(THINK):
            self._held, self.where, self._step, self._known = start[len(THINK) :], "reasoning", self._reason, ""
        else:
            self._step = self._speak
        return True

    def _reason(self, parts: Parts) -> bool:
        if not self._reasoned:
            self._held = self._held.lstrip()
        end = self._held.find(THINK_END)
        shown = self._held[: end if end >= 0 else len(self._held) - _overlap(self._held, THINK_END)].rstrip()
        parts.reasoning += shown
        self._reasoned = self._reasoned or bool(shown)
        if end < 0:
            self._held = self._held[len(shown) :]
            return False
        self._held, self.where, self._step, self._gap = self._held[end + len(THINK_END) :], "text", self._speak, True
        return True

    def _speak(self, parts: Parts) -> bool:
        if self._calls is None:
            text = self._held.lstrip() if self._gap else self._held
            self._say(parts, text)
            self._held = "" if text else self._held
            return False
        if not self._said and self._held.lstrip().startswith("{"):
            known = self._json_call(self._held)
            if known is None:
                return False
            if known:
                return self._open_call(parts, self._held.lstrip(), bare=True)
        for mark in _MARKUP.finditer(self._held):
            before, after = self._held[: mark.start()], self._held[mark.end() :]
            if mark[0] == OPEN:
                self._set_aside(parts, before)
                return self._open_call(parts, after, bare=False)
            if mark[0] == CLOSE:
                if not (self._bare and self._gap and not before.strip()):
                    parts.error = parts.error or ToolCallError(
                        f"found {CLOSE} without {OPEN} in the reply; generate the reply again"
                    )
                self._set_aside(parts, before)
                self._held, self._bare = self._held + after, False
                return True
            if mark[1].strip() in self._calls.functions and self._starts_line(before):
                self._set_aside(parts, before)
                return self._open_call(parts, mark[0] + after, bare=True)
        end = len(self._held[: _certain(self._held)].rstrip())
        if self._held[:end].strip():
            self._say(parts, self._held[:end])
            self._held = self._held[end:]
        return False

    def _set_aside(self, parts: Parts, before: str) -> None:
        """Emits the text before markup, and holds back the white space between them until more text follows."""
        text = before.rstrip()
        if text:
            self._say(parts, text)
        self._held = before[len(text) :] if self._said else ""
        self._gap = True

    def _open_call(self, parts: Parts, rest: str, bare: bool) -> bool:
        self._space, self._held, self._tried = self._held if self._said else "", rest, 0
        self._known = ""
        self.where, self._step, self._bare = "tool_call", self._call, bare
        return True

    def _call(self, parts: Parts) -> bool:
        assert self._calls is not None
        if self._bare and self._held.startswith("{"):
            return self._bare_json(parts)
        close = FUNCTION_END if self._bare else CLOSE
        end = self._held.find(close, self._tried)
        if end < 0:
            self._tried = max(self._tried, len(self._held) - len(close))
            return False
        self._tried = end + len(close)
        read = self._calls.bare if self._bare else self._calls.wrapped
        try:
            if not read(self._held[: self._tried], parts.tool_calls):
                return True
        except ToolCallError as error:
            parts.error = parts.error or error
        return self._close_call(self._tried)

    def _bare_json(self, parts: Parts) -> bool:
        assert self._calls is not None
        try:
            value, end = json.JSONDecoder(strict=False).raw_decode(self._held)
        except (ValueError, RecursionError):
            return False
        try:
            parts.tool_calls.append(self._calls.from_json(value))
        except ToolCallError as error:
            parts.error = parts.error or error
        return self._close_call(end)

    def _close_call(self, end: int) -> bool:
        self._held = self._space + self._held[end:]
        self.where, self._step, self._gap = "text", self._speak, True
        return True

    def _say(self, parts: Parts, text: str) -> None:
        if self._gap and not self._said:
            text = text.lstrip()
        if not text:
            return
        parts.text += text.removeprefix(self._known)
        self._known, self._said, self._gap = "", True, False
        self._mid_line = self._mid_line_after(text)

    def _mid_line_after(self, text: str) -> bool:
        *lines, last = text.split("\n")
        return bool(last.strip()) or (self._mid_line and not lines)

    def _starts_line(self, before: str) -> bool:
        return not self._mid_line_after(before)

    def _json_call(self, text: str) -> bool | None:
        """Returns whether a reply begins with a call in JSON of a declared function; None if this is not certain yet."""
        assert self._calls is not None
        found = re.sub(r"\s", "", text[:1000])
        unclear = False
        for name in self._calls.functions:
            for key in ("arguments", "parameters"):
                wanted = re.sub(r"\s", "", f'{{"name":{json.dumps(name)},"{key}":')
                if found.startswith(wanted):
                    return True
                unclear = unclear or wanted.startswith(found)
        return None if unclear else False


def split_prefill(prefill: str) -> tuple[str | None, str]:
    """Returns the reasoning of a prefill (None if there is none) and the text that the reply begins with."""
    if not prefill.startswith(THINK):
        return None, prefill
    thought, _, text = prefill.removeprefix(THINK).partition(THINK_END)
    return thought, text.lstrip()


def markup_start(text: str) -> int:
    """Returns the position of the first tool call in a text, which may be cut; else the length of the text."""
    if text.lstrip().startswith("{"):
        return 0
    mark = _MARKUP.search(text)
    return _certain(text) if mark is None else mark.start()


def _certain(text: str) -> int:
    """Returns the number of first characters that further text cannot make a part of markup."""
    if name := _UNFINISHED_NAME.search(text):
        return name.start()
    return len(text) - max(_overlap(text, literal) for literal in (OPEN, CLOSE, FUNCTION))


def _overlap(text: str, literal: str) -> int:
    """Returns the length of the longest suffix of ``text`` that is a proper prefix of ``literal``."""
    for length in range(min(len(text), len(literal) - 1), 0, -1):
        if literal.startswith(text[-length:]):
            return length
    return 0
