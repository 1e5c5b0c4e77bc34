"""Tokens in, text out: what a model does once its parts are open."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import mlx.core as mx

from .checks import integer
from .closing import UntilClosed, check_open
from .config import ModelConfig
from .errors import ArgumentError, PromptError
from .experts.store import ExpertStore
from .generation.chunks import prefill_chunk
from .generation.engine import Engine
from .generation.options import forbid, resolve_options
from .generation.prefixes import Prefixes, kept
from .generation.result import Chunk, Generation
from .generation.run import generate
from .generation.sampling import LogitsProcessor, Sampler
from .generation.stats import Recorder
from .generation.stopping import StopStrings
from .nn.decoder import Decoder
from .structured import Enforced, Enforcer, Specification
from .text import Tokenizer
from .text.prompt import Prompt, check_tokens, encode_prompt


class LanguageModel:
    """Generates text; base of :class:`flash_moe.Model`, which opens the parts.

    Args:
        defaults: sampling options of generations that name none.
        prompt_cache: as :meth:`flash_moe.Model.load` takes it.
    """

    _decoder, _store = UntilClosed[Decoder](), UntilClosed[ExpertStore]()
    _engine, _prefixes = UntilClosed[Engine](), UntilClosed[Prefixes]()

    def __init__(
        self,
        config: ModelConfig,
        tokenizer: Tokenizer,
        decoder: Decoder,
        store: ExpertStore,
        experts_per_token: int,
        defaults: Mapping[str, Any],
        prompt_cache: int | None = None,
    ) -> None:
        self.config, self.tokenizer = config, tokenizer
        self._experts_per_token = experts_per_token
        self._decoder, self._store = decoder, store
        self._engine = Engine(decoder, prefill_chunk(config, experts_per_token))
        self._prefixes = Prefixes(self._engine.new_cache, tokenizer.eos_token_ids, *kept(prompt_cache))
        self._enforcer = Enforcer(tokenizer, config.vocab_size)
        self._defaults = defaults

    @property
    def experts_per_token(self) -> int:
        """Experts used per token and layer (K), chosen when the model was loaded."""
        return self._experts_per_token

    def generate(
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
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: str = "auto",
        strict_tools: bool | None = None,
        response_format: Specification | None = None,
        logits_processors: Sequence[LogitsProcessor] = (),
        logprobs: int | None = None,
        enable_thinking: bool | None = None,
        raw: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> Generation:
        """Generates a reply and returns it whole; arguments are those of :meth:`stream`.

        Raises:
            PromptError: the prompt is empty, too long, or holds a token id outside the vocabulary.
            ArgumentError: an option is out of range.
            TokenizerError: the messages do not fit the chat template.
            ExpertReadError: the bytes of an expert could not be read; no token was made without them.
            ModelClosedError: the model was closed, perhaps by another thread meanwhile.
            ForkError: this process is a fork of the one that loaded the model.
        """
        enforced, parse, stream = self._start(
            prompt, tools, tool_choice, strict_tools, response_format, logits_processors, logprobs, enable_thinking, raw,
            progress, max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p,
            repetition_penalty=repetition_penalty, presence_penalty=presence_penalty,
            frequency_penalty=frequency_penalty, logit_bias=logit_bias, seed=seed, stop=stop,
        )  # fmt: skip
        chunks = list(stream)
        last = chunks[-1]
        assert last.finish_reason is not None
        text, tokens = "".join(c.text for c in chunks), tuple(c.token for c in chunks)
        reported = tuple(c.logprobs for c in chunks if c.logprobs is not None)
        return Generation(
            text, tokens, last.finish_reason, last.stats, None if logprobs is None else reported, enforced.name, parse
        )

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
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: str = "auto",
        strict_tools: bool | None = None,
        response_format: Specification | None = None,
        logits_processors: Sequence[LogitsProcessor] = (),
        logprobs: int | None = None,
        enable_thinking: bool | None = None,
        raw: bool = False,
        progress: Callable[[int, int], None] | None = None,
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
            tools: JSON schemas of functions, for the chat template.
            tool_choice: ``"auto"``, ``"none"`` (no call), ``"required"`` (a call has to come) or the name of the function
                to call. The last two need llguidance (the extra ``structured``).
            strict_tools: whether calls are held to the schemas of ``tools``. None: where llguidance is installed and can
                enforce them; :attr:`Generation.enforced` says whether it did.
            response_format: what the text has to be: a pydantic class, a JSON schema (also in OpenAI's wrapping),
                ``"json"``, a compiled regular expression or a list of strings. Needs llguidance; reasoning stays free.
                :attr:`Generation.parsed` is what the format makes of the text.
            logits_processors: functions ``f(tokens [T], logits [1, V]) -> logits [1, V]`` of MLX arrays, applied in order
                before all else, as in mlx-lm; T tokens of prompt and reply so far.
            logprobs: report the log probability of every token, and of so many of the most probable ones.
            enable_thinking: passed to the chat template unless None.
            raw: take a string as text to continue even if the model has a chat template.
            progress: called as ``progress(done, total)`` with tokens of the prompt.

        Raises:
            As :meth:`generate`; arguments are checked when the stream is made, before the first token.
        """
        return self._start(
            prompt, tools, tool_choice, strict_tools, response_format, logits_processors, logprobs, enable_thinking, raw,
            progress, max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p,
            repetition_penalty=repetition_penalty, presence_penalty=presence_penalty,
            frequency_penalty=frequency_penalty, logit_bias=logit_bias, seed=seed, stop=stop,
        )[2]  # fmt: skip

    def _start(
        self,
        prompt: Prompt,
        tools: Sequence[Mapping[str, Any]] | None,
        tool_choice: str,
        strict_tools: bool | None,
        response_format: Specification | None,
        logits_processors: Sequence[LogitsProcessor],
        logprobs: int | None,
        enable_thinking: bool | None,
        raw: bool,
        progress: Callable[[int, int], None] | None,
        **options: Any,
    ) -> tuple[Enforced, Callable[[str], Any] | None, Iterator[Chunk]]:
        """Checks all arguments; returns what is enforced, what reads the reply's format, and the stream."""
        check_open(self, "_store")
        chosen = resolve_options(self._defaults, vocab_size=self.config.vocab_size, **options)
        if logprobs is not None:
            logprobs = integer("logprobs", logprobs, 0, self.config.vocab_size)
        enforced = self._enforcer.enforce(tools, tool_choice, strict_tools, response_format)
        tokens = self.encode(prompt, tools=tools, enable_thinking=enable_thinking, raw=raw)
        room = self.config.max_position_embeddings - len(tokens)
        if room < 1:
            raise PromptError(
                f"the prompt has {len(tokens)} tokens, but the model's context of {self.config.max_position_embeddings} "
                "must hold it and at least one more; shorten it"
            )
        sampler = Sampler(
            forbid(chosen.sampling, enforced.forbidden), tokens, constraint=self._enforcer.constraint(enforced, tokens),
            processors=logits_processors, logprobs=logprobs,
        )  # fmt: skip
        thinking = self._enforcer.thinks(tokens)
        parse = None if enforced.format is None else lambda text: enforced.parse(text, thinking)
        report = None if progress is None else lambda done: progress(done, len(tokens))
        k, own = self.experts_per_token, self.config.num_experts_per_tok
        stream = generate(
            self._engine, self._prefixes, self.tokenizer, tokens, min(chosen.max_tokens, room), sampler,
            StopStrings(chosen.stop), lambda: Recorder(self._decoder, len(tokens), k, own), report,
        )  # fmt: skip
        return enforced, parse, stream

    def logits(self, token_ids: Sequence[int], last: int | None = None) -> mx.array:
        """Logits of every position of a teacher-forced pass.

        Args:
            token_ids: T token ids.
            last: only those of the last positions are wanted. What lies before them is then treated as a prompt: it
                may continue the conversation before, and a prompt that begins alike will continue from it.

        Returns:
            [T, V] float32, or [last, V]; row t predicts token t + 1.

        Raises:
            PromptError: there are no ids, too many, or one outside the vocabulary.
            ArgumentError: ``last`` is not from 1 to T.
        """
        tokens = check_tokens(token_ids, self.config.vocab_size)
        if len(tokens) > self.config.max_position_embeddings:
            raise PromptError(f"{len(tokens)} tokens, the model's context is {self.config.max_position_embeddings}")
        if last is None:
            return self._engine.all_logits(tokens)
        if not 1 <= last <= len(tokens):
            raise ArgumentError(f"last is {last}, expected 1 to {len(tokens)}, the number of tokens")
        cache = self._prefixes.take(tokens[: len(tokens) - last + 1])
        try:
            return self._engine.last_logits(tokens, last, cache)
        finally:
            self._prefixes.put(cache)

    def encode(
        self,
        prompt: Prompt,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        enable_thinking: bool | None = None,
        raw: bool = False,
    ) -> list[int]:
        """The token ids that :meth:`generate` would run for a prompt.

        Raises:
            PromptError: the prompt is empty or of no known kind, or holds a token id outside the vocabulary.
            TokenizerError: the messages do not fit the chat template.
        """
        check_open(self, "_store")
        return encode_prompt(
            prompt, self.tokenizer, self.config.vocab_size, tools=tools, enable_thinking=enable_thinking, raw=raw
        )

    def forget(self) -> None:
        """Frees the memory of earlier sequences, which prompts with the same beginning would have continued."""
        self._prefixes.clear()
