"""The results of a generation: a reply, and the chunks of a stream."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from ..errors import FormatError, ToolCallError
from ..notebook import html
from ..text.call_reader import ToolCall
from ..text.reply import THINK, THINK_END, Where
from .sampling import TokenLogprobs
from .stats import Stats

FinishReason = Literal["stop", "length", "tool_calls", "cancelled"]


@dataclass(frozen=True)
class ToolResult:
    """The result of a call in a conversation.

    Attributes:
        call: None where the model's call was malformed.
        content: the result, as the model gets it.
        failed: whether it is an error.
    """

    call: ToolCall | None
    content: str
    failed: bool

    @property
    def name(self) -> str:
        """The function that was called."""
        return "malformed call" if self.call is None else self.call.name

    @property
    def message(self) -> dict[str, Any]:
        """The result as a chat message."""
        if self.call is None:
            return {"role": "tool", "content": self.content}
        return {"role": "tool", "tool_call_id": self.call.id, "name": self.call.name, "content": self.content}


@dataclass(frozen=True, repr=False)
class Chunk:
    """One step of a stream.

    Attributes:
        text: text of the answer that became certain with this token; may be empty.
        token: the token id; None in the last chunk of a generation that was cancelled, and with a ``tool_result``.
        stats: statistics up to this token.
        finish_reason: in the last chunk why the generation ended, see :class:`Generation`; else None.
        logprobs: of the token and of the most probable ones, if asked for.
        reasoning: the same as ``text``, of the model's reasoning.
        tool_calls: calls that ended with this token.
        tool_call_error: a malformed call ended with this token.
        raw_text: all of the reply's text that became certain, markup included.
        where: what the reply is in the middle of.
        tool_result: in the stream of a conversation, what came of a call; nothing was generated then.
    """

    text: str
    token: int | None
    stats: Stats
    finish_reason: FinishReason | None = None
    logprobs: TokenLogprobs | None = None
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_error: ToolCallError | None = None
    raw_text: str = ""
    where: Where = "text"
    tool_result: ToolResult | None = None

    def __repr__(self) -> str:
        parts = [f"{name}={value!r}" for name, value in (("reasoning", self.reasoning),) if value]
        parts += [f"calls {call.name}" for call in self.tool_calls]
        parts += [f"{name}={value!r}" for name, value in (("finish_reason", self.finish_reason),) if value]
        return f"Chunk({', '.join([repr(self.text), f'token={self.token}', *parts])})"

    def _repr_html_(self) -> str:
        calls = "".join(html.call(call.name, call.arguments) for call in self.tool_calls)
        return html.reasoning(self.reasoning, opened=True) + html.text(self.text) + calls + html.footnote(repr(self))


@dataclass(frozen=True, repr=False)
class Generation:
    """A reply; ``str()`` of it is the text.

    Attributes:
        text: what a person reads: the answer without reasoning, markup of tool calls, stop strings and special tokens.
        tokens: all generated token ids, a final end-of-sequence token included.
        finish_reason: ``"stop"`` (end of sequence or a stop string), ``"tool_calls"`` (the same, after well-formed
            calls), ``"length"`` or ``"cancelled"``.
        stats: what it cost.
        logprobs: of every token, if asked for.
        enforced: what the reply was held to: ``"tools"`` (their schemas), ``"json"``, ``"regex"``, ``"choices"``, or
            ``"tools or json"`` and the like; empty where it was free.
        reasoning: the model's reasoning; None where there was none.
        raw_text: all generated text, without stop strings and special tokens.
        ended_in: ``"reasoning"`` or ``"tool_call"`` where the reply ended inside one, which is then not complete; else
            ``"text"``.
        calls: the well-formed tool calls.
        tool_call_error: what is wrong with the first malformed one.
        prefill: what the reply was made to begin with; it is part of :attr:`message` alone.
    """

    text: str
    tokens: tuple[int, ...]
    finish_reason: FinishReason
    stats: Stats
    logprobs: tuple[TokenLogprobs, ...] | None = None
    enforced: str = ""
    reasoning: str | None = None
    raw_text: str = ""
    ended_in: Where = "text"
    calls: tuple[ToolCall, ...] = ()
    tool_call_error: ToolCallError | None = None
    prefill: str = ""
    _parse: Callable[[str], Any] | None = field(default=None, compare=False)

    @classmethod
    def of(
        cls,
        chunks: Sequence[Chunk],
        *,
        enforced: str = "",
        parse: Callable[[str], Any] | None = None,
        logprobs: bool = False,
        prefill: str = "",
    ) -> Generation:
        """Returns the reply of a stream that has ended.

        Args:
            enforced, prefill: the attributes.
            parse: makes :attr:`parsed` of the text.
            logprobs: whether they were asked for.
        """
        last = chunks[-1]
        assert last.finish_reason is not None, "the stream has not ended"
        reasoning = "".join(chunk.reasoning for chunk in chunks)
        return cls(
            text="".join(chunk.text for chunk in chunks),
            tokens=tuple(chunk.token for chunk in chunks if chunk.token is not None),
            finish_reason=last.finish_reason,
            stats=last.stats,
            logprobs=tuple(c.logprobs for c in chunks if c.logprobs is not None) if logprobs else None,
            enforced=enforced,
            reasoning=reasoning or None,
            raw_text="".join(chunk.raw_text for chunk in chunks),
            ended_in=last.where,
            calls=tuple(call for chunk in chunks for call in chunk.tool_calls),
            tool_call_error=next((c.tool_call_error for c in chunks if c.tool_call_error is not None), None),
            prefill=prefill,
            _parse=parse,
        )

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]:
        """The functions that the model calls, in order.

        Raises:
            ToolCallError: a call is cut, malformed or not as the schemas say. Its ``calls`` are the well-formed ones.
        """
        if self.tool_call_error is not None:
            raise ToolCallError(str(self.tool_call_error), self.calls)
        return self.calls

    @cached_property
    def parsed(self) -> Any:
        """What ``response_format`` makes of the text: an instance of the class, JSON data, a match, or the choice.

        None without a format, and where tools are called instead.

        Raises:
            FormatError: the reply was cut, or the class refuses it. The text is in :attr:`text`.
        """
        if self._parse is None or self.calls:
            return None
        if self.finish_reason in ("length", "cancelled"):
            raise FormatError("the reply was cut before its format was complete; raise max_tokens")
        return self._parse(self.prefill + self.text)

    @property
    def message(self) -> dict[str, Any]:
        """The reply as a chat message in OpenAI's form, for the end of the list of messages."""
        reasoning, begun, text = self.reasoning, self.prefill, self.text
        if self.tool_call_error is not None:  # as it was written, so that the model can see what went wrong
            text = self.raw_text if reasoning is None else self.raw_text.partition(THINK_END)[2].lstrip()
        if begun.startswith(THINK):
            thought, _, begun = begun.removeprefix(THINK).partition(THINK_END)
            reasoning, begun = (thought + (reasoning or "")).strip(), begun.lstrip()
        message: dict[str, Any] = {"role": "assistant", "content": begun + text}
        if reasoning is not None:
            message["reasoning_content"] = reasoning
        if self.tool_call_error is None and self.calls:
            message["tool_calls"] = [call.to_message() for call in self.calls]
        return message

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        shown = self.text if len(self.text) <= 60 else self.text[:59] + "…"
        calls = "".join(f", calls {call.name}" for call in self.calls)
        cut = "" if self.ended_in == "text" else f" inside {self.ended_in.replace('_', ' ')}"
        enforced = f", enforced={self.enforced!r}" if self.enforced else ""
        return f"Generation({shown!r}{calls}, {len(self.tokens)} tokens, {self.finish_reason!r}{cut}{enforced})"

    def _repr_html_(self) -> str:
        calls = "".join(html.call(call.name, call.arguments) for call in self.calls)
        if self.tool_call_error is not None:
            calls += html.problem(str(self.tool_call_error))
        notes = [str(self.stats), *([self.finish_reason] if self.finish_reason in ("length", "cancelled") else [])]
        if self.enforced:
            notes.append(f"held to {self.enforced}")
        return html.reasoning(self.reasoning) + html.text(self.text) + calls + html.footnote(" · ".join(notes))
