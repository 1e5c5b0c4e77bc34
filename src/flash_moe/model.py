"""The facade: wires tokenizer, network and expert store together."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

import mlx.core as mx

from .checkpoint.files import Checkpoint
from .checkpoint.hub import resolve
from .checkpoint.records import RecordTable
from .config import ModelConfig
from .errors import ArgumentError, PromptError
from .experts.opening import ExpertIO, open_store
from .experts.store import ExpertStore
from .generation.chunks import prefill_chunk
from .generation.defaults import sampling_defaults
from .generation.engine import Engine
from .generation.prefixes import Prefixes
from .generation.result import Chunk, Generation
from .generation.run import generate
from .generation.sampling import Sampler, Sampling
from .generation.stats import Recorder
from .generation.stopping import StopStrings
from .loading import DEFAULT_EXPERTS_PER_TOKEN, load_decoder, resolve_dtype, resolve_experts_per_token
from .nn.decoder import Decoder
from .nn.streaming import StreamingOptions
from .text import Tokenizer
from .text.prompt import Prompt, check_tokens, encode_prompt

Progress = Callable[[str, int, int], None]


class Model:
    """A language model whose routed experts stay in files until a token needs them.

    Use :meth:`load`; the constructor takes parts that are already open.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        tokenizer: Tokenizer,
        decoder: Decoder,
        store: ExpertStore,
        experts_per_token: int,
    ) -> None:
        self.path = checkpoint.folder
        self.config: ModelConfig = checkpoint.config
        self.tokenizer = tokenizer
        self.experts_per_token = experts_per_token
        self._decoder, self._store = decoder, store
        self._engine = Engine(decoder, prefill_chunk(self.config, experts_per_token))
        self._prefixes = Prefixes(decoder.new_cache, tokenizer.eos_token_ids)
        self._defaults = sampling_defaults(checkpoint.folder)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        experts_per_token: int | None = DEFAULT_EXPERTS_PER_TOKEN,
        expert_io: ExpertIO = "auto",
        expert_cache: int = 0,
        prefetch: bool = False,
        drop_cold_below: float = 0.0,
        prefer_cached: float = 0.0,
        dtype: str | None = None,
        kernels: bool | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        progress: Progress | None = None,
    ) -> Model:
        """Opens a checkpoint: reads the always-needed weights, and finds where every expert lies.

        Args:
            path: a folder; the name of a repository on the Hugging Face hub ("org/name"), which is downloaded; or
                ``"demo"``, a small model that comes with the library.
            experts_per_token: experts used per token and layer (K). The default of 4 is capped at the model's own
                top-k; None means the model's own.
            expert_io: how experts are read: ``"mapped"`` (pages used in place), ``"slots"`` (read into a bank),
                ``"resident"`` (everything in memory) or ``"auto"``.
            expert_cache: bytes of experts kept in memory beyond those of the current token; 0 leaves caching to the
                operating system, which is usually best.
            prefetch: behind a layer's experts, read those that the next one will probably choose. Changes no
                token. It measures itself while decoding and stays on only where that is faster; the statistics say so.
            drop_cold_below: while decoding, leave out a chosen expert that is not in memory if its share of the routing
                weights is below this (0 to 1; at least one expert stays). Faster and less exact; 0 is off.
            prefer_cached: while decoding, use an expert that is in memory instead of a chosen one that is not, if its
                router probability is at least 1 - prefer_cached times the other's (0 to 1). As above; 0 is off.
            dtype: of activations: ``"float32"``, ``"bfloat16"`` or ``"float16"``. By default the checkpoint's own on a
                GPU, and float32 on the CPU, where it is fastest.
            kernels: whether this library's own GPU kernels are used; None uses them where they have been measured to
                beat MLX's. ``FLASH_MOE_KERNELS=off`` in the environment switches them off whatever this says.
            revision: branch, tag or commit on the hub.
            token: access token for the hub; by default the one of ``hf auth login``.
            progress: called as ``progress(stage, done, total)`` while loading, with the stages ``"layers"`` and, for
                the resident store, ``"expert bytes"``.

        Raises:
            ConfigError: config.json is missing or describes a model that cannot be run.
            CheckpointError: a file is missing, truncated, malformed or does not belong to the others.
            TokenizerError: there is no usable tokenizer.
            HubError, DiskSpaceError: the download failed, or there is no room for it.
            ArgumentError: an argument is out of range.
        """
        checkpoint = Checkpoint.open(resolve(path, revision=revision, token=token))
        config = checkpoint.config
        k = resolve_experts_per_token(experts_per_token, config)
        streaming = StreamingOptions(prefetch, drop_cold_below, prefer_cached)
        compute = resolve_dtype(dtype, checkpoint)
        tokenizer = Tokenizer.load(checkpoint.folder)
        table = RecordTable.of(checkpoint)

        def report(stage: str, total: int) -> Callable[[int], None] | None:
            return None if progress is None else lambda done: progress(stage, done, total)

        store = open_store(table, expert_io, k, expert_cache, report("expert bytes", table.nbytes))
        try:
            layers = report("layers", config.num_hidden_layers)
            decoder = load_decoder(checkpoint, store, k, compute, layers, kernels, streaming)
        except BaseException:
            store.close()
            raise
        return cls(checkpoint, tokenizer, decoder, store, k)

    def generate(self, prompt: Prompt, **options: Any) -> Generation:
        """Generates a reply and returns it whole; takes the same options as :meth:`stream`.

        Raises:
            PromptError: the prompt is empty, too long, or holds a token id outside the vocabulary.
            ArgumentError: an option is out of range.
            TokenizerError: the messages do not fit the chat template.
            ExpertReadError: the bytes of an expert could not be read; no token was made without them.
        """
        chunks = list(self.stream(prompt, **options))
        last = chunks[-1]
        assert last.finish_reason is not None
        return Generation(
            "".join(c.text for c in chunks), tuple(c.token for c in chunks), last.finish_reason, last.stats
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
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        tools: Sequence[Mapping[str, Any]] | None = None,
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
            seed: makes sampling reproducible.
            stop: strings that end the generation; they are not part of the text.
            tools: JSON schemas of functions, for the chat template.
            enable_thinking: passed to the chat template unless None.
            raw: take a string as text to continue even if the model has a chat template.
            progress: called as ``progress(done, total)`` with tokens of the prompt.

        Raises:
            As :meth:`generate`; arguments are checked when the stream is made, before the first token.
        """
        given = {
            "temperature": temperature, "top_p": top_p, "top_k": top_k, "min_p": min_p,
            "repetition_penalty": repetition_penalty,
        }  # fmt: skip
        chosen = self._defaults | {name: value for name, value in given.items() if value is not None}
        sampling = Sampling(**chosen, seed=seed)
        stops = StopStrings(stop)
        if not isinstance(max_tokens, int) or max_tokens < 1:
            raise ArgumentError(f"max_tokens is {max_tokens!r}, expected an integer of at least 1")
        tokens = self.encode(prompt, tools=tools, enable_thinking=enable_thinking, raw=raw)
        room = self.config.max_position_embeddings - len(tokens)
        if room < 1:
            raise PromptError(
                f"the prompt has {len(tokens)} tokens, but the model's context of {self.config.max_position_embeddings} "
                "must hold it and at least one more; shorten it"
            )
        report = None if progress is None else lambda done: progress(done, len(tokens))
        k, own = self.experts_per_token, self.config.num_experts_per_tok
        recorder = Recorder(self._decoder, self._store.stats, len(tokens), k, own)
        return generate(
            self._engine, self._prefixes, self.tokenizer, tokens, min(max_tokens, room), Sampler(sampling, tokens), stops,
            recorder, report,
        )  # fmt: skip

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
        logits = self._engine.last_logits(tokens, last, cache)
        self._prefixes.put(cache)
        return logits

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
        return encode_prompt(
            prompt, self.tokenizer, self.config.vocab_size, tools=tools, enable_thinking=enable_thinking, raw=raw
        )

    def forget(self) -> None:
        """Frees the memory of the last conversation, which a prompt with the same beginning would have continued."""
        self._prefixes.clear()

    @property
    def streaming(self) -> StreamingOptions:
        """What decoding does about experts that are not in memory."""
        return self._decoder.streaming

    @property
    def expert_store(self) -> ExpertStore:
        """Where the experts come from: its counters, and what measurements need of it."""
        return self._store

    def close(self) -> None:
        """Closes the files of the experts; the model cannot be used afterwards."""
        self._store.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        own, k = self.config.num_experts_per_tok, self.experts_per_token
        shown = k if k == own else f"{k} of the model's {own}"
        streaming = self._decoder.streaming
        changed = "".join(
            f"{name}={getattr(streaming, name)}, "
            for name in ("drop_cold_below", "prefer_cached")
            if getattr(streaming, name)
        )
        return (
            f"Model({str(self.path)!r}, {self.config.num_hidden_layers} layers, {self.config.num_experts} experts, "
            f"experts_per_token={shown}, {changed}{type(self._store).__name__})"
        )
