"""The results of a generation: a reply, and the chunks of a stream."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from ..errors import FormatError, ToolCallError
from ..notebook import html
from ..text.call_reader import ToolCall
from ..text.reply import THINK_END, Where, markup_start, split_prefill
from .sampling import TokenLogprobs
from .stats import Stats

FinishReason = Literal["stop", "length", "tool_calls", "cancelled"]


@dataclass(frozen=True)
class ToolResult:
    """The result of a tool call in a conversation.

    Attributes:
        call: the call; None if it was malformed.
        content: the result, as it is sent to the model.
        failed: whether the result is an error.
    """

    call: ToolCall | None
    content: str
    failed: bool

    @property
    def name(self) -> str:
        """The name of the called function."""
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
        text: text of the answer that this token completes; may be empty.
        token: the token id; None in the last chunk of a generation that was cancelled, and with a ``tool_result``.
        stats: the statistics up to this token.
        finish_reason: the reason why the generation ended, in the last chunk (see :class:`Generation`); else None.
        logprobs: log probabilities of the token and of the most probable ones, if requested.
        reasoning: text of the reasoning that this token completes; may be empty.
        tool_calls: tool calls that this token completes.
        tool_call_error: the error, if this token ends a malformed call.
        raw_text: the text that this token completes, including reasoning and markup.
        where: the part of the reply at this token: text, reasoning or a tool call.
        tool_result: in a conversation, the result of a tool call. Such a chunk has no generated text.
        stop_string: the stop string that ended the generation, in the last chunk; else None.
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
    stop_string: str | None = None

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
    """A complete reply. ``str()`` returns its text.

    Attributes:
        text: the answer, without reasoning, markup of tool calls, stop strings and special tokens.
        tokens: all generated token ids, including a final end-of-sequence token.
        finish_reason: ``"stop"`` (end of sequence or a stop string), ``"tool_calls"`` (the same, after well-formed
            calls), ``"length"`` or ``"cancelled"``.
        stats: the statistics of the generation.
        logprobs: log probabilities of every token, if requested.
        enforced: the enforced format: ``"tools"`` (their schemas), ``"json"``, ``"regex"``, ``"choices"``, or a
            combination such as ``"tools or json"``; empty if there was none.
        reasoning: the model's reasoning; None if there is none.
        raw_text: all generated text, without stop strings and special tokens.
        ended_in: ``"reasoning"`` or ``"tool_call"`` if the reply ended inside an incomplete one; else ``"text"``.
        calls: the well-formed tool calls.
        tool_call_error: the error of the first malformed tool call.
        prefill: the text that the reply was made to begin with. Only :attr:`message` contains it.
        stop_string: the stop string that ended the reply; None if none did.
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
    stop_string: str | None = None
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
        """Returns the reply that the chunks of a complete stream form.

        Args:
            enforced, prefill: as in the attributes.
            parse: function that computes :attr:`parsed` from the text.
            logprobs: whether log probabilities were requested.
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
            stop_string=last.stop_string,
            _parse=parse,
        )

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]:
        """The functions that the model calls, in order.

        Raises:
            ToolCallError: a call is cut or malformed, or does not fit its schema. ``calls`` of the error holds the
                well-formed calls.
        """
        if self.tool_call_error is not None:
            raise ToolCallError(str(self.tool_call_error), self.calls)
        return self.calls

    @cached_property
    def parsed(self) -> Any:
        """The text, parsed by ``response_format``: an instance of the class, JSON data, a match, or the choice.

        None if there is no format, or if the model called tools instead.

        Raises:
            FormatError: the reply was cut, or the class rejects it. The text is in :attr:`text`.
        """
        if self._parse is None or self.calls:
            return None
        if self.finish_reason in ("length", "cancelled"):
            raise FormatError("the reply was cut before its format was complete; raise max_tokens")
        return self._parse(split_prefill(self.prefill)[1] + self.text)

    @property
    def message(self) -> dict[str, Any]:
        """The reply as a chat message in OpenAI's form, to append to the list of messages."""
        (thought, begun), reasoning, text = split_prefill(self.prefill), self.reasoning, self.text
        if self.tool_call_error is not None:  # the original text, so that the model can see its error
            text = self.raw_text if reasoning is None else self.raw_text.partition(THINK_END)[2].lstrip()
        elif self.calls:
            begun = begun[: markup_start(begun)].rstrip()
        if thought is not None:
            reasoning = (thought + (reasoning or "")).strip()
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
