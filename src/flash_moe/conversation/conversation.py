"""A conversation: its messages, its tools, and the caches of its tokens."""

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
    """A conversation with a model. Create one with :meth:`flash_moe.Model.chat`.

    It keeps its own caches, so that each turn runs only new tokens. Only one thread at a time may use a conversation.
    Several conversations with one model take turns.

    Args:
        model: the model that answers.
        messages: earlier messages of the conversation.
        tools: functions or JSON schemas that the model may call. Functions are run. The caller must answer calls of
            schemas.
        max_rounds: the maximum number of rounds of calls in a turn.
        confirm: function that is called before each call of a tool. If it returns False, the tool does not run, and the
            model is told that the user declined.
        options: options of every reply, with the names of :meth:`flash_moe.Model.stream`.

    Attributes:
        messages: all messages, in OpenAI's form. The list may be changed; the next turn reuses the caches as far as
            they still match.
    """

    @classmethod
    def opened(
        cls,
        model: LanguageModel,
        path: str | os.PathLike[str],
        tools: Sequence[Tool] | None,
        confirm: Callable[[ToolCall], bool] | None,
    ) -> Conversation:
        """Opens a saved conversation; see :meth:`flash_moe.Model.open_chat`."""
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
        """Sends a message and returns the model's last reply. The arguments are those of :meth:`stream`.

        If the model calls functions, this method runs them and lets the model answer their results before it returns.

        Raises:
            The errors of :meth:`stream`."""
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
        """Sends a message and yields the chunks of the replies, with the results of calls between them.

        If the caller leaves the loop early or cancels, the reply so far is kept. After an error, the conversation is
        unchanged.

        Args:
            content: the text of a user's message, a message, or several messages, such as results of calls (role
                ``"tool"``).
            prefill, response_format, cancel, progress: as in :meth:`flash_moe.Model.stream`. A prefill applies to the
                first reply. ``cancel`` also ends the wait for a running function; the function itself then runs to its
                end in its thread.

        Raises:
            PromptError: there is nothing to answer, or calls of the last reply have no results yet.
            The errors of :meth:`flash_moe.Model.stream`. An error in a function of the user is not raised, but sent to
                the model as the result.
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
        """Sends a message as :meth:`send` does, in a separate thread."""
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
        """Sends a message as :meth:`stream` does, in a separate thread that also runs the functions.

        Cancelling the task and leaving the loop work as in :meth:`flash_moe.Model.astream`. The reply so far is kept.
        """
        leaving = Leaving(cancel)
        stream = self.stream(
            content, prefill=prefill, response_format=response_format, cancel=leaving, progress=progress
        )
        return in_thread(stream, leaving)

    def undo(self) -> list[dict[str, Any]]:
        """Removes the last user message and all messages after it.

        Returns:
            The removed messages.

        Raises:
            PromptError: there is no user message.
        """
        users = [i for i, message in enumerate(self.messages) if message.get("role") == "user"]
        if not users:
            raise PromptError("the conversation holds no user's message, so there is nothing to take back")
        taken = self.messages[users[-1] :]
        del self.messages[users[-1] :]
        return taken

    def fork(self) -> Conversation:
        """Returns an independent copy of the conversation, which continues from this point."""
        other = copy.copy(self)
        other.messages = copy.deepcopy(self.messages)
        other._prefixes = Prefixes(self._model._engine.new_cache, self._model.tokenizer.eos_token_ids)
        for cache in self._prefixes.sequences:
            other._prefixes.put(cache.fork(len(cache.tokens)))
        return other

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the conversation to a file that :meth:`flash_moe.Model.open_chat` reads.

        The file holds the messages, the schemas of tools, the options, the token ids, the KV cache and the recurrent
        states. It is written atomically.

        Raises:
            OSError: the file cannot be written.
        """
        state = {
            "messages": self.messages, "schemas": self._tools.schemas or [], "max_rounds": self._max_rounds,
            "options": self._options, "written": self._written,
        }  # fmt: skip
        save(path, self._model, state, self._prefixes.sequences)
