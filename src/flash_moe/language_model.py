"""The methods of a loaded model: generation, logits, and encoding of prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

from .checks import integer
from .closing import UntilClosed, check_open
from .errors import ArgumentError, PromptError
from .experts.store import ExpertStore
from .generation.cancelling import Event, cancelled
from .generation.chunks import prefill_chunk
from .generation.engine import Engine
from .generation.options import forbid, resolve_options
from .generation.prefixes import Prefixes, kept
from .generation.result import Generation
from .generation.run import Request, Run, generate
from .generation.sampling import LogitsProcessor, Sampler
from .generation.stats import Recorder
from .generation.stopping import StopStrings
from .generation.together import generate_together
from .nn.network import Dimensions, Network
from .progress import ProgressOption
from .structured import Enforcer, Specification
from .text import Tokenizer
from .text.function_tools import Tool, tool_schemas
from .text.prompt import Prompt, check_tokens, encode_prompt
from .text.reply import REASONING_CLOSED, ReplyParser, split_prefill
from .text_generation import TextGeneration


class LanguageModel(TextGeneration):
    """Generates text with parts that are already open; the base class of :class:`flash_moe.Model`.

    Args:
        defaults: sampling options for generations that do not set them.
        prompt_cache: as in :meth:`flash_moe.Model.load`.
    """

    path: Path  # of the checkpoint
    _decoder, _store = UntilClosed[Network](), UntilClosed[ExpertStore]()
    _engine, _prefixes = UntilClosed[Engine](), UntilClosed[Prefixes]()

    def __init__(
        self,
        config: Dimensions,
        tokenizer: Tokenizer,
        decoder: Network,
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
        """The number of experts used per token and layer (K), set when the model was loaded."""
        return self._experts_per_token

    def _start(  # type: ignore[override]  # the abstract one leaves the names to the methods that call it
        self,
        prompt: Prompt,
        *,
        tools: Sequence[Tool] | None,
        tool_choice: str,
        strict_tools: bool | None,
        response_format: Specification | None,
        logits_processors: Sequence[LogitsProcessor],
        logprobs: int | None,
        enable_thinking: bool | None,
        template_variables: Mapping[str, Any] | None,
        prefill: str,
        raw: bool,
        cancel: Event | None,
        progress: ProgressOption,
        prefixes: Prefixes | None = None,
        prefilled: bool = False,
        **options: Any,
    ) -> Run:
        check_open(self, "_store")
        chosen = resolve_options(self._defaults, vocab_size=self.config.vocab_size, **options)
        if logprobs is not None:
            logprobs = integer("logprobs", logprobs, 0, self.config.vocab_size)
        schemas = tool_schemas(tools)
        enforced = self._enforcer.enforce(schemas, tool_choice, strict_tools, response_format)
        tokens = self.encode(
            prompt, tools=schemas, enable_thinking=enable_thinking, template_variables=template_variables,
            prefill="" if prefilled else prefill, raw=raw,
        )  # fmt: skip
        room = self.config.max_position_embeddings - len(tokens)
        if room < 1:
            raise PromptError(
                f"the prompt has {len(tokens)} tokens, but the model's context of {self.config.max_position_embeddings} "
                "must hold it and at least one more; shorten it"
            )
        thinking, begun = self._enforcer.thinks(tokens), split_prefill(prefill)[1]
        sampler = Sampler(
            forbid(chosen.sampling, enforced.forbidden), tokens, constraint=self._enforcer.constraint(enforced, tokens, begun),
            processors=logits_processors, logprobs=logprobs,
        )  # fmt: skip
        parser = ReplyParser(schemas if tool_choice != "none" else None, thinking=thinking)
        if not thinking:
            parser.begin(begun)
        request = Request(
            tokens, min(chosen.max_tokens, room), sampler, StopStrings(chosen.stop), parser, chosen.reasoning_budget,
            self.tokenizer.encode(REASONING_CLOSED), cancelled(cancel), progress,
        )  # fmt: skip
        k, own = self.experts_per_token, self.config.num_experts_per_tok
        chunks = generate(
            self._engine, prefixes or self._prefixes, self.tokenizer, request,
            lambda: Recorder(self._decoder, len(tokens), k, own),
        )  # fmt: skip
        parse = None if enforced.format is None else enforced.format.parse
        return Run(chunks, enforced.name, parse, logprobs is not None, prefill, request)

    def _together(self, runs: Sequence[Run], progress: ProgressOption) -> list[Generation]:
        k, own = self.experts_per_token, self.config.num_experts_per_tok
        found = generate_together(
            self._engine, self._prefixes, self.tokenizer, [run.request for run in runs],
            lambda request: Recorder(self._decoder, len(request.tokens), k, own), progress,
        )  # fmt: skip
        return [run.reply(chunks) for run, chunks in zip(runs, found, strict=True)]

    def logits(self, token_ids: Sequence[int], last: int | None = None) -> mx.array:
        """Runs a sequence of tokens and returns the logits of every position.

        Args:
            token_ids: T token ids.
            last: number of positions at the end for which to return logits; None for all. With a number, the tokens
                before them are treated as a prompt: they can reuse the cache of an earlier sequence, and later prompts
                with the same prefix can reuse theirs.

        Returns:
            [T, V] float32, or [last, V]; row t predicts token t + 1.

        Raises:
            PromptError: there are no ids or too many, or an id is outside the vocabulary.
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
        tools: Sequence[Tool] | None = None,
        enable_thinking: bool | None = None,
        template_variables: Mapping[str, Any] | None = None,
        prefill: str = "",
        raw: bool = False,
    ) -> list[int]:
        """Returns the token ids that :meth:`generate` would run for a prompt. The arguments are those of
        :meth:`stream`.

        Raises:
            PromptError: the prompt is empty, has an unknown type, or contains a token id outside the vocabulary.
            TokenizerError: the messages do not fit the chat template.
        """
        check_open(self, "_store")
        return encode_prompt(
            prompt, self.tokenizer, self.config.vocab_size, tools=tool_schemas(tools), enable_thinking=enable_thinking,
            variables=template_variables, prefill=prefill, raw=raw,
        )  # fmt: skip

    def forget(self) -> None:
        """Frees the caches of earlier sequences. Later prompts then run from their first token."""
        self._prefixes.clear()
