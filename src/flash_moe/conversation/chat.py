"""A conversation: messages, the tools that the model may call, and the caches of what was said."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..errors import PromptError
from ..generation.prefixes import Prefixes
from ..generation.result import Chunk, Generation, ToolResult
from ..progress import ProgressOption
from ..reply_options import Event
from ..structured import Specification
from ..text.call_reader import ToolCall
from ..text.function_tools import Tool, failure
from ..text.prompt import continued
from ..text_generation import Run
from .calls import Tools
from .messages import Content, ShownMessages, to_send
from .model import ChatModel
from .saved import load, save


@dataclass(frozen=True)
class _Prompt:
    """A reply that is about to be generated, and the text and the tokens of its prompt."""

    run: Run
    text: str
    tokens: list[int]


class Conversation(ShownMessages):
    """A conversation with a model; made by :meth:`flash_moe.Model.chat`.

    It keeps its own caches, so that a turn runs only its own new tokens. One conversation belongs to one thread at a
    time; several conversations with one model take turns.

    Args:
        model: what answers.
        messages: what was said before.
        tools: functions that the model may call, which are run, or JSON schemas, whose calls the caller answers.
        max_rounds: the most rounds of calls in a turn.
        confirm: asked before each call; where it returns false the model is told that the call was declined.
        options: of every reply, by the names that :meth:`flash_moe.Model.stream` has.

    Attributes:
        messages: all messages, in OpenAI's form. The list may be changed; what still fits the caches is used.
    """

    def __init__(
        self,
        model: ChatModel,
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
        # the text of the last prompt with its reply, and the tokens it was made of
        self._written: tuple[str, list[int]] = ("", [])

    @classmethod
    def opened(
        cls,
        model: ChatModel,
        path: str | os.PathLike[str],
        tools: Sequence[Tool] | None,
        confirm: Callable[[ToolCall], bool] | None,
    ) -> Conversation:
        """Returns a saved conversation; see :meth:`flash_moe.Model.open_chat`."""
        state, cache = load(path, model)
        options = dict(state["options"])
        if options["logit_bias"] is not None:
            options["logit_bias"] = {int(token): value for token, value in options["logit_bias"].items()}
        chat = cls(
            model,
            state["messages"],
            state["schemas"] if tools is None else tools,
            state["max_rounds"],
            confirm,
            options,
        )
        text, tokens = state["written"]
        chat._written = text, tokens
        if cache is not None:
            chat._prefixes.put(cache)
        return chat

    def send(
        self,
        content: Content,
        *,
        prefill: str = "",
        response_format: Specification | None = None,
        cancel: Event | None = None,
        progress: ProgressOption = True,
    ) -> Generation:
        """Says something and returns the model's last reply; arguments are those of :meth:`stream`.

        Functions that the model calls are run, and their results answered, before this returns.

        Raises:
            As :meth:`stream`.
        """
        stream = self.stream(
            content, prefill=prefill, response_format=response_format, cancel=cancel, progress=progress
        )
        for _ in stream:
            pass
        assert self._last is not None
        return self._last

    def stream(
        self,
        content: Content,
        *,
        prefill: str = "",
        response_format: Specification | None = None,
        cancel: Event | None = None,
        progress: ProgressOption = True,
    ) -> Iterator[Chunk]:
        """Says something and yields the replies as they come, with the results of calls between them.

        Leaving the loop early keeps the reply so far, as cancelling does. An error leaves the conversation as it was.

        Args:
            content: a user's text, a message, or several messages, such as results of calls (role ``"tool"``).
            prefill, response_format, cancel, progress: as :meth:`flash_moe.Model.stream` takes them; a prefill is of the
                first reply. ``cancel`` also ends waiting for a function, which then runs to its end in its thread.

        Raises:
            PromptError: there is nothing to answer, or calls of the last reply have no results yet.
            As :meth:`flash_moe.Model.stream`. What a function raises is no error: the model is told.
        """
        said = to_send(content, self.messages)
        prompt = self._start([*self.messages, *said], prefill, response_format, cancel, progress)
        return self._turn(prompt, said, response_format, cancel, progress)

    def undo(self) -> list[dict[str, Any]]:
        """Takes back the last user's message and all that followed it.

        Returns:
            The messages that were taken back.

        Raises:
            PromptError: there is no user's message.
        """
        users = [i for i, message in enumerate(self.messages) if message.get("role") == "user"]
        if not users:
            raise PromptError("the conversation holds no user's message, so there is nothing to take back")
        taken = self.messages[users[-1] :]
        del self.messages[users[-1] :]
        return taken

    def fork(self) -> Conversation:
        """Returns an independent conversation that goes on from here."""
        other = copy.copy(self)
        other.messages = copy.deepcopy(self.messages)
        other._prefixes = Prefixes(self._model._engine.new_cache, self._model.tokenizer.eos_token_ids)
        for cache in self._prefixes.sequences:
            other._prefixes.put(cache.fork(len(cache.tokens)))
        return other

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the conversation to a file that :meth:`flash_moe.Model.open_chat` reads.

        The file holds messages, schemas of tools, options, token ids, keys, values and recurrent states. It appears
        complete or not at all.

        Raises:
            OSError: the file cannot be written.
        """
        state = {
            "messages": self.messages, "schemas": self._tools.schemas or [], "max_rounds": self._max_rounds,
            "options": self._options, "written": self._written,
        }  # fmt: skip
        save(path, self._model, state, self._prefixes.sequences)

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
        # Behind what the model wrote itself, as it wrote it: its tokens need not be those of the text.
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
        """Takes a turn back in which nothing was said."""
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
        """Notes a reply, and what its tokens read as."""
        self._last = reply
        message = reply.message
        if reply.finish_reason == "cancelled":
            message.pop("tool_calls", None)  # nobody will run them
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
        """Runs the calls of a reply, in order; returns whether the model can go on."""
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
        """Leaves the calls of the last message out, since nobody will answer them."""
        if self.messages and self.messages[-1].pop("tool_calls", None) and not self.messages[-1]["content"]:
            del self.messages[-1]
