"""A conversation: messages, the tools that the model may call, and the caches of what was said."""

from __future__ import annotations

import copy
import os
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing
from typing import Any

from ..errors import PromptError
from ..generation.cancelling import Event, Leaving, in_thread
from ..generation.prefixes import Prefixes
from ..generation.result import Chunk, Generation
from ..language_model import LanguageModel
from ..progress import ProgressOption
from ..structured import Specification
from ..text.call_reader import ToolCall
from ..text.function_tools import Tool
from .messages import Content, to_send
from .saved import load, save
from .turns import Turns


class Conversation(Turns):
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

    @classmethod
    def opened(
        cls,
        model: LanguageModel,
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

    async def asend(
        self,
        content: Content,
        *,
        prefill: str = "",
        response_format: Specification | None = None,
        cancel: Event | None = None,
        progress: ProgressOption = True,
    ) -> Generation:
        """As :meth:`send`, in a thread of its own. Cancelling the task stops the turn before this raises."""
        stream = self.astream(
            content, prefill=prefill, response_format=response_format, cancel=cancel, progress=progress
        )
        async with aclosing(stream) as chunks:
            async for _ in chunks:
                pass
        assert self._last is not None
        return self._last

    def astream(
        self,
        content: Content,
        *,
        prefill: str = "",
        response_format: Specification | None = None,
        cancel: Event | None = None,
        progress: ProgressOption = True,
    ) -> AsyncGenerator[Chunk, None]:
        """As :meth:`stream`, in a thread of its own, in which functions run as well.

        Cancelling the task that waits for a chunk, or leaving the loop, is as :meth:`flash_moe.Model.astream` says; the
        reply so far is kept.
        """
        leaving = Leaving(cancel)
        stream = self.stream(
            content, prefill=prefill, response_format=response_format, cancel=leaving, progress=progress
        )
        return in_thread(stream, leaving)

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
