"""The turns of a conversation: replies, their tool calls, and turns that end early."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..generation.prefixes import Prefixes
from ..generation.result import Chunk, Generation, ToolResult
from ..generation.run import Run
from ..language_model import LanguageModel
from ..text.call_reader import ToolCall
from ..text.function_tools import Tool, failure
from ..text.prompt import continued
from .calls import Tools
from .messages import ShownMessages


@dataclass(frozen=True)
class _Prompt:
    """A prepared generation, with the text and the tokens of its prompt."""

    run: Run
    text: str
    tokens: list[int]


class Turns(ShownMessages):
    """The base class of :class:`~.conversation.Conversation`, which describes the arguments and attributes."""

    def __init__(
        self,
        model: LanguageModel,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Tool],
        max_rounds: int,
        confirm: Callable[[ToolCall], bool] | None,
        options: Mapping[str, Any],
    ) -> None:
        self.messages: list[dict[str, Any]] = [dict(message) for message in messages]
        self._model, self._max_rounds = model, max_rounds
        self._tools = Tools(tools, max_rounds, confirm)
        self._options = dict(options)
        self._prefixes = Prefixes(model._engine.new_cache, model.tokenizer.eos_token_ids)
        self._last: Generation | None = None
        # the text of the last prompt with its reply, and their tokens
        self._written: tuple[str, list[int]] = ("", [])

    def _start(
        self, messages: Sequence[Mapping[str, Any]], prefill: str, format: Any, cancel: Any, progress: Any
    ) -> _Prompt:
        options, tokenizer = self._options, self._model.tokenizer
        text = tokenizer.apply_chat_template(
            messages, tools=self._tools.schemas, enable_thinking=options["enable_thinking"],
            **(options["template_variables"] or {}),
        )  # fmt: skip
        text = continued(text, prefill)
        known, tokens = self._written
        # Text that the model wrote keeps the tokens that it sampled; the tokenizer might split it differently.
        tokens = [*tokens, *tokenizer.encode(text[len(known) :])] if text.startswith(known) else tokenizer.encode(text)
        run = self._model._start(
            tokens, tools=self._tools.schemas, response_format=format, prefill=prefill, prefilled=True, cancel=cancel,
            progress=progress, prefixes=self._prefixes, logits_processors=(), logprobs=None, raw=False, **options,
        )  # fmt: skip
        return _Prompt(run, text, tokens)

    def _turn(self, prompt: _Prompt, said: Any, format: Any, cancel: Any, progress: Any) -> Iterator[Chunk]:
        before = len(self.messages)
        self.messages += said
        try:
            for number in range(self._max_rounds + 1):
                reply = yield from self._reply(prompt)
                if reply.finish_reason not in ("tool_calls", "stop") or not (reply.calls or reply.tool_call_error):
                    break
                goes_on = yield from self._results(reply, number == self._max_rounds, cancel)
                if cancel is not None and cancel.is_set():
                    self._last = replace(reply, finish_reason="cancelled")
                    break
                if not goes_on:
                    break
                prompt = self._start(self.messages, "", format, cancel, progress)
        except GeneratorExit:
            self._drop_unanswered(before)
            raise
        except BaseException:
            del self.messages[before:]
            raise
        self._drop_unanswered(before)

    def _drop_unanswered(self, before: int) -> None:
        """Removes the messages of a turn that has no reply."""
        if all(message.get("role") != "assistant" for message in self.messages[before:]):
            del self.messages[before:]

    def _reply(self, prompt: _Prompt) -> Generator[Chunk, None, Generation]:
        chunks: list[Chunk] = []
        try:
            for chunk in prompt.run.chunks:
                chunks.append(chunk)
                yield chunk
        except GeneratorExit:
            prompt.run.chunks.close()  # type: ignore[attr-defined]
            if chunks and chunks[-1].finish_reason is None:
                end = Chunk("", None, chunks[-1].stats, "cancelled", where=chunks[-1].where)
                self._keep(prompt, prompt.run.reply([*chunks, end]))
            elif chunks:
                self._keep(prompt, prompt.run.reply(chunks))
                self._without_results()
            raise
        self._keep(prompt, reply := prompt.run.reply(chunks))
        return reply

    def _keep(self, prompt: _Prompt, reply: Generation) -> None:
        """Stores a reply, its tokens and their text."""
        self._last = reply
        message = reply.message
        if reply.finish_reason == "cancelled":
            message.pop("tool_calls", None)  # these calls will not run
            if reply.tool_call_error is not None:
                message["content"] = reply.prefill + reply.text
            if not (message["content"] or message.get("reasoning_content")):
                return
        self.messages.append(message)
        tokenizer = self._model.tokenizer
        text = tokenizer.decode(reply.tokens)
        end = reply.tokens[-1:] if reply.tokens and reply.tokens[-1] in tokenizer.eos_token_ids else ()
        if text == reply.raw_text + tokenizer.decode(end):
            self._written = prompt.text + text, [*prompt.tokens, *reply.tokens]

    def _results(self, reply: Generation, last: bool, cancel: Any) -> Generator[Chunk, None, bool]:
        """Runs the calls of a reply in order. Returns whether the model can continue."""
        if reply.tool_call_error is not None:
            content = failure(str(reply.tool_call_error))
            self.messages.append({"role": "tool", "content": content})
            yield Chunk("", None, reply.stats, tool_result=ToolResult(None, content, failed=True))
            return not last
        pending = False
        for position, call in enumerate(reply.calls):
            if not self._tools.runs(call):
                pending = True
                continue
            try:
                result = self._tools.result(call, last, cancel)
            except BaseException:
                self._without_results()
                raise
            self.messages.append(result.message)
            try:
                yield Chunk("", None, reply.stats, tool_result=result)
            except GeneratorExit:
                for left in reply.calls[position + 1 :]:
                    self.messages.append(ToolResult(left, failure("the turn was cancelled"), failed=True).message)
                raise
        return not pending and not last

    def _without_results(self) -> None:
        """Removes the calls of the last message, because they will get no results."""
        if self.messages and self.messages[-1].pop("tool_calls", None) and not self.messages[-1]["content"]:
            del self.messages[-1]
