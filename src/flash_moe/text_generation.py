"""Replies whole and in pieces, for programs with and without an event loop."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, TypedDict, overload

from .generation.cancelling import Event, Leaving, in_thread
from .generation.result import Chunk, Generation
from .generation.run import Run
from .generation.sampling import LogitsProcessor
from .progress import ProgressOption
from .structured import Specification
from .text.function_tools import Tool
from .text.prompt import Prompt, Prompts, several

if TYPE_CHECKING:
    from typing_extensions import Unpack


class ReplyOptions(TypedDict, total=False):
    """The options of :meth:`flash_moe.Model.generate` beside the prompt; :meth:`flash_moe.Model.stream` describes them."""

    max_tokens: int
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    logit_bias: Mapping[int, float] | None
    seed: int | None
    stop: str | Sequence[str] | None
    tools: Sequence[Tool] | None
    tool_choice: str
    strict_tools: bool | None
    response_format: Specification | None
    logits_processors: Sequence[LogitsProcessor]
    logprobs: int | None
    enable_thinking: bool | None
    reasoning_budget: int | None
    template_variables: Mapping[str, Any] | None
    prefill: str
    raw: bool
    cancel: Event | None
    progress: ProgressOption


class TextGeneration(ABC):
    """The methods of a model that generate text.

    Threads and tasks may share a model. Every stream is a sequence of its own; forward passes of several streams take
    turns, a token or a chunk of a prompt at a time. One stream belongs to one thread at a time.
    """

    @abstractmethod
    def _start(self, prompt: Prompt, **options: Any) -> Run:
        """Checks all arguments of :meth:`stream`; nothing runs yet.

        Args:
            prefixes: keeps the caches instead of the model.
        """

    @abstractmethod
    def _together(self, runs: Sequence[Run], progress: ProgressOption) -> list[Generation]:
        """Runs several replies together."""

    @overload
    def generate(self, prompt: Prompt, **options: Unpack[ReplyOptions]) -> Generation: ...

    @overload
    def generate(self, prompt: Prompts, **options: Unpack[ReplyOptions]) -> list[Generation]: ...

    def generate(
        self,
        prompt: Prompt | Prompts,
        *,
        max_tokens: int = 512,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        presence_penalty: float | None = None,
        frequency_penalty: float | None = None,
        logit_bias: Mapping[int, float] | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        tools: Sequence[Tool] | None = None,
        tool_choice: str = "auto",
        strict_tools: bool | None = None,
        response_format: Specification | None = None,
        logits_processors: Sequence[LogitsProcessor] = (),
        logprobs: int | None = None,
        enable_thinking: bool | None = None,
        reasoning_budget: int | None = None,
        template_variables: Mapping[str, Any] | None = None,
        prefill: str = "",
        raw: bool = False,
        cancel: Event | None = None,
        progress: ProgressOption = True,
    ) -> Generation | list[Generation]:
        """Generates a reply and returns it whole; arguments are those of :meth:`stream`.

        A list of strings or of lists of messages is several prompts, whose replies decode together; the result is a list.

        Raises:
            PromptError: the prompt is empty, too long, or holds a token id outside the vocabulary.
            ArgumentError: an option is out of range.
            TokenizerError: the messages do not fit the chat template.
            ExpertReadError: the bytes of an expert could not be read; no token was made without them.
            ModelClosedError: the model was closed, perhaps by another thread meanwhile.
            ForkError: this process is a fork of the one that loaded the model.
        """
        arguments = _arguments(locals())
        if several(prompt):
            return self._together([self._start(**{**arguments, "prompt": one}) for one in prompt], progress)
        run = self._start(**arguments)
        return run.reply(list(run.chunks))

    def stream(
        self,
        prompt: Prompt,
        *,
        max_tokens: int = 512,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        presence_penalty: float | None = None,
        frequency_penalty: float | None = None,
        logit_bias: Mapping[int, float] | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        tools: Sequence[Tool] | None = None,
        tool_choice: str = "auto",
        strict_tools: bool | None = None,
        response_format: Specification | None = None,
        logits_processors: Sequence[LogitsProcessor] = (),
        logprobs: int | None = None,
        enable_thinking: bool | None = None,
        reasoning_budget: int | None = None,
        template_variables: Mapping[str, Any] | None = None,
        prefill: str = "",
        raw: bool = False,
        cancel: Event | None = None,
        progress: ProgressOption = True,
    ) -> Iterator[Chunk]:
        """Generates a reply token by token; leaving the loop early is fine.

        Args:
            prompt: a string (a user's message if the model has a chat template, else text to continue), a list of chat
                messages ``{"role": ..., "content": ...}``, or a list of token ids.
            max_tokens: the most tokens to generate; the model's context length also ends a generation.
            temperature, top_p, top_k, min_p, repetition_penalty: see :class:`~flash_moe.generation.sampling.Sampling`.
                None takes the checkpoint's generation_config.json, and greedy decoding where it says nothing.
            presence_penalty, frequency_penalty, logit_bias: see there as well.
            seed: makes sampling reproducible.
            stop: strings that end the generation; they are not part of the text.
            tools: functions that the model may call, or their JSON schemas; :attr:`Generation.tool_calls` are its calls.
                :meth:`flash_moe.Model.chat` makes the calls.
            tool_choice: ``"auto"``, ``"none"`` (no call), ``"required"`` (a call has to come) or the name of the function
                to call. The last two need llguidance (the extra ``structured``).
            strict_tools: whether calls are held to the schemas of ``tools``. None: where llguidance is installed and can
                enforce them; :attr:`Generation.enforced` says whether it did.
            response_format: what the text has to be: a pydantic class, a JSON schema (also in OpenAI's wrapping),
                ``"json"``, a compiled regular expression or a list of strings. Needs llguidance; reasoning stays free.
                :attr:`Generation.parsed` is what the format makes of the text.
            logits_processors: functions ``f(tokens [T], logits [1, V]) -> logits [1, V]`` of MLX arrays, applied in order
                before all else, as in mlx-lm; T tokens of prompt and reply so far.
            logprobs: report the log probability of every token, and of this many of the most probable ones.
            enable_thinking: passed to the chat template unless None.
            reasoning_budget: tokens after which the model's reasoning is closed; None leaves that to the model.
            template_variables: more variables for the chat template, such as ``{"preserve_thinking": True}``.
            prefill: text that the reply begins with. Where the prompt ends inside reasoning, it begins the answer, unless
                it starts with ``<think>``.
            raw: take a string as text to continue even if the model has a chat template.
            cancel: ends the generation, within a layer of a prompt or a token, once its ``is_set()`` is true, such as a
                ``threading.Event`` that another thread sets. The reply so far stays.
            progress: how far the prompt is, by layer: True shows a bar in a terminal or a notebook where it takes longer
                than a second, and elsewhere logs a line now and then; a callable gets a :class:`~flash_moe.Progress`.

        Raises:
            As :meth:`generate`; arguments are checked when the stream is made, before the first token.
        """
        return self._start(**_arguments(locals())).chunks

    async def agenerate(
        self,
        prompt: Prompt,
        *,
        max_tokens: int = 512,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        presence_penalty: float | None = None,
        frequency_penalty: float | None = None,
        logit_bias: Mapping[int, float] | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        tools: Sequence[Tool] | None = None,
        tool_choice: str = "auto",
        strict_tools: bool | None = None,
        response_format: Specification | None = None,
        logits_processors: Sequence[LogitsProcessor] = (),
        logprobs: int | None = None,
        enable_thinking: bool | None = None,
        reasoning_budget: int | None = None,
        template_variables: Mapping[str, Any] | None = None,
        prefill: str = "",
        raw: bool = False,
        cancel: Event | None = None,
        progress: ProgressOption = True,
    ) -> Generation:
        """As :meth:`generate`, in a thread of its own. Cancelling the task stops the work before this raises."""
        arguments = _arguments(locals())
        run = self._start(**{**arguments, "cancel": (leaving := Leaving(cancel))})
        async with aclosing(in_thread(run.chunks, leaving)) as chunks:
            return run.reply([chunk async for chunk in chunks])

    def astream(
        self,
        prompt: Prompt,
        *,
        max_tokens: int = 512,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        presence_penalty: float | None = None,
        frequency_penalty: float | None = None,
        logit_bias: Mapping[int, float] | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        tools: Sequence[Tool] | None = None,
        tool_choice: str = "auto",
        strict_tools: bool | None = None,
        response_format: Specification | None = None,
        logits_processors: Sequence[LogitsProcessor] = (),
        logprobs: int | None = None,
        enable_thinking: bool | None = None,
        reasoning_budget: int | None = None,
        template_variables: Mapping[str, Any] | None = None,
        prefill: str = "",
        raw: bool = False,
        cancel: Event | None = None,
        progress: ProgressOption = True,
    ) -> AsyncGenerator[Chunk, None]:
        """As :meth:`stream`, in a thread of its own.

        Cancelling the task that waits for a chunk stops the work before this raises. A loop that is left
        early should close the iterator: ``async with contextlib.aclosing(model.astream(...)) as chunks``. Otherwise the
        event loop closes it later.
        """
        arguments = _arguments(locals())
        leaving = Leaving(cancel)
        return in_thread(self._start(**{**arguments, "cancel": leaving}).chunks, leaving)


def _arguments(names: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments of a method, of all its local names."""
    return {name: value for name, value in names.items() if name != "self"}
