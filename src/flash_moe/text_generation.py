"""The methods that generate replies, complete or as a stream, with and without asyncio."""

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
    """The options of :meth:`flash_moe.Model.generate`; :meth:`flash_moe.Model.stream` describes them."""

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

    Several threads and tasks can share a model. Each stream has its own sequence. The forward passes of several streams
    take turns after each token or chunk of a prompt. Only one thread at a time may use a stream.
    """

    @abstractmethod
    def _start(self, prompt: Prompt, **options: Any) -> Run:
        """Checks all arguments of :meth:`stream` and prepares a generation, without running it.

        Args:
            prefixes: keeps the caches of this generation; None for those of the model.
        """

    @abstractmethod
    def _together(self, runs: Sequence[Run], progress: ProgressOption) -> list[Generation]:
        """Generates several replies together."""

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
        """Generates a reply and returns it when it is complete. The arguments are those of :meth:`stream`.

        A list of strings, or a list of lists of messages, is several prompts. Their replies are decoded together, and
        the result is a list.

        Raises:
            PromptError: the prompt is empty or too long, or contains a token id outside the vocabulary.
            ArgumentError: an option is out of range.
            TokenizerError: the messages do not fit the chat template.
            ExpertReadError: the bytes of an expert could not be read. No token is computed without them.
            ModelClosedError: the model was closed, before or during the generation.
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
        """Generates a reply token by token. The caller may leave the loop early.

        Args:
            prompt: a string, a list of chat messages ``{"role": ..., "content": ...}``, or a list of token ids. A
                string is a user's message if the model has a chat template, and otherwise text to continue.
            max_tokens: the maximum number of tokens to generate. The context length of the model limits it too.
            temperature, top_p, top_k, min_p, repetition_penalty: see :class:`~flash_moe.generation.sampling.Sampling`.
                None takes the value in the checkpoint's generation_config.json; if that recommends no sampling,
                decoding is greedy.
            presence_penalty, frequency_penalty, logit_bias: see there as well.
            seed: makes sampling reproducible.
            stop: strings that end the generation. They are not part of the text.
            tools: functions that the model may call, or their JSON schemas. :attr:`Generation.tool_calls` holds the
                calls; they are not run. :meth:`flash_moe.Model.chat` runs them.
            tool_choice: ``"auto"``, ``"none"`` (no call), ``"required"`` (at least one call) or the name of the
                function to call. The last two need llguidance (the extra ``structured``).
            strict_tools: whether to enforce the schemas of ``tools``. None enforces them if llguidance is installed and
                supports them; :attr:`Generation.enforced` tells whether it did.
            response_format: format of the text: a pydantic class, a JSON schema (bare or wrapped as in OpenAI's API),
                ``"json"``, a compiled regular expression or a list of strings. It needs llguidance. Reasoning is not
                constrained. :attr:`Generation.parsed` is the parsed text.
            logits_processors: functions ``f(tokens [T], logits [1, V]) -> logits [1, V]`` of MLX arrays, applied in
                order before everything else, as in mlx-lm; T is the number of tokens of the prompt and the reply so
                far.
            logprobs: number of most probable tokens whose log probabilities to report, in addition to that of the
                chosen token; None reports none.
            enable_thinking: whether the model thinks first; the value is passed to the chat template unless it is None.
            reasoning_budget: the maximum number of reasoning tokens; then the library ends the reasoning. None sets no
                limit.
            template_variables: more variables for the chat template, such as ``{"preserve_thinking": True}``.
            prefill: text that the reply begins with. If the prompt ends inside reasoning, the library closes the
                reasoning first, unless the text starts with ``<think>``.
            raw: treat a string as text to continue, even if the model has a chat template.
            cancel: a ``threading.Event``, or another object with ``is_set()``. When it is set, the generation ends
                before the next layer of the prompt or the next token. The reply so far is kept.
            progress: whether to report the progress of the prompt, by layer. True shows a bar in a terminal or a
                notebook if the prompt takes longer than a second, and elsewhere logs a line from time to time. A
                callable receives a :class:`~flash_moe.Progress`.

        Raises:
            The errors of :meth:`generate`. Arguments are checked when the stream is created, before the first token.
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
        """Generates a reply as :meth:`generate` does, in a separate thread."""
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
        """Generates a reply token by token as :meth:`stream` does, in a separate thread.

        If the task that waits for a chunk is cancelled, the generation stops before ``CancelledError`` is raised. If
        you leave the loop early, close the iterator: ``async with contextlib.aclosing(model.astream(...)) as chunks``.
        Otherwise the event loop closes it later.
        """
        arguments = _arguments(locals())
        leaving = Leaving(cancel)
        return in_thread(self._start(**{**arguments, "cancel": leaving}).chunks, leaving)


def _arguments(names: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments of a method from its ``locals()``."""
    return {name: value for name, value in names.items() if name != "self"}
