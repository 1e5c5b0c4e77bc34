"""The facade: opens a checkpoint and wires tokenizer, network and expert store together."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from .amounts import format_bytes
from .checkpoint.hub import resolve
from .checks import DEFAULT_EXPERTS_PER_TOKEN, integer
from .closing import check_open, enter_process, is_open, take
from .conversation import Conversation
from .errors import ArgumentError
from .experts.opening import ExpertIO
from .experts.store import ExpertStore
from .experts.uses import ExpertUses
from .generation.defaults import sampling_defaults
from .generation.options import resolve_options, sampling_options
from .generation.prefixes import kept
from .language_model import LanguageModel
from .loading import Opened, open_adapted, open_own
from .machines.following import FollowingNetwork, NoTokenizer
from .machines.joining import GroupOption, joined
from .machines.leading import LeadingNetwork
from .machines.ranked import Ranked
from .mlx_cache import clear_cache
from .models import is_adapted
from .nn.streaming_options import StreamingOptions
from .notebook import html
from .progress import ProgressOption
from .text import Tokenizer
from .text.call_reader import ToolCall
from .text.function_tools import Tool

_OF_CONVERSATIONS = ("self", "system", "tools", "messages", "max_rounds", "confirm")


class Model(LanguageModel, Ranked):
    """A language model whose routed experts stay in files until a token needs them.

    Use :meth:`load`; the constructor takes parts that are already open.
    """

    def __init__(
        self,
        opened: Opened,
        tokenizer: Tokenizer,
        prompt_cache: int | None = None,
    ) -> None:
        self.path, defaults = opened.folder, sampling_defaults(opened.folder)
        k = opened.experts_per_token
        super().__init__(opened.config, tokenizer, opened.network, opened.store, k, defaults, prompt_cache)

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
        prompt_cache: int | None = None,
        dtype: str | None = None,
        kernels: bool | None = None,
        threads: int | None = None,
        group: GroupOption = None,
        group_timeout: float = 10.0,
        revision: str | None = None,
        token: str | bool | None = None,
        progress: ProgressOption = True,
    ) -> Model:
        """Opens a checkpoint: reads the always-needed weights, and finds where every expert lies.

        Args:
            path: a folder; the name of a repository on the Hugging Face hub ("org/name"), which is downloaded; or
                ``"demo"``, a small model that comes with the library.
            experts_per_token: experts used per token and layer (K), at most the model's own. None means the model's
                own; the default is 4, or the model's own where that is less.
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
            prompt_cache: bytes for the keys, values and states of earlier sequences: a prompt that begins like one of
                them runs only what is new. Those used last are kept. None keeps a sixteenth of the memory's size, and
                the last one however large it is; 0 keeps none.
            dtype: of activations: ``"float32"``, ``"bfloat16"`` or ``"float16"``. By default the checkpoint's own on a
                GPU, and float32 on the CPU, where it is fastest.
            kernels: whether this library's own GPU kernels are used. None uses those that proved right, and faster than
                MLX's ops, on this machine at this model's sizes: the first load tries them for some seconds, in a
                process of its own, and remembers the verdicts. ``FLASH_MOE_KERNELS`` in the environment says on, off or
                auto where this is None; off goes before whatever this says. On the CPU they take Numba, and None uses them
                for all but the smallest models.
            threads: threads that compute on the CPU, where its kernels are used; None takes one per physical core.
            group: machines that run the model together, each with its share of the experts, see docs/machines.md: what
                ``mx.distributed.init()`` returns, or ``"auto"`` for that if ``mlx.launch`` started this process. All ranks
                load alike; rank 0 generates, the others call :meth:`follow`. It has none of the options drop_cold_below and
                prefer_cached, which depend on what is in the memory of one machine.
            group_timeout: seconds after which a rank that is silent, or makes no progress, ends the group.
            revision: branch, tag or commit on the hub.
            token: access token for the hub; by default the one of ``hf auth login``.
            progress: how far downloading, proving kernels, loading and filling the resident store are: True shows bars in
                a terminal or a notebook where that takes longer than a second, and elsewhere logs a line now and then; a
                callable gets a :class:`~flash_moe.Progress`. At a terminal True also asks before a download of more than
                50 GB.

        A family of mlx-lm's runs on its network, by default with the model's own K. It has none of the options prefetch,
        drop_cold_below, prefer_cached, kernels and threads.

        Raises:
            ConfigError: config.json is missing or describes a model that cannot be run.
            CheckpointError: a file is missing, truncated, malformed or does not belong to the others.
            TokenizerError: there is no usable tokenizer.
            HubError, DiskSpaceError: the download failed, or there is no room for it.
            MemoryLimitError: the control group of the process (Linux) allows less memory than the model needs.
            ArgumentError: an argument is out of range.
            ForkError: this process is a fork of one that loaded a model.
            PeerError: another rank of the group differs, could not load or cannot be reached.
        """
        enter_process()
        with joined(group, group_timeout) as member:
            folder = resolve(path, revision=revision, token=token, progress=progress)
            kept(prompt_cache)
            streaming = StreamingOptions(prefetch, drop_cold_below, prefer_cached)
            if member is not None and streaming.changes_experts:
                raise ArgumentError(
                    "drop_cold_below and prefer_cached depend on what is in the memory of one machine, but a group must "
                    "choose the same experts on all; leave them out"
                )
            adapted, leads = is_adapted(folder), member is None or member.rank == 0
            tokenizer: Any = Tokenizer.load(folder) if leads else NoTokenizer()
            common = folder, experts_per_token, expert_io, expert_cache, dtype, progress, member
            if adapted:
                opened = open_adapted(
                    *common, prefetch=prefetch, threads=threads, drop_cold_below=drop_cold_below,
                    prefer_cached=prefer_cached, kernels=kernels,
                )  # fmt: skip
            else:
                opened = open_own(*common, streaming, kernels, threads)
        return cls(opened, tokenizer, prompt_cache)

    def chat(
        self,
        system: str | None = None,
        tools: Sequence[Tool] = (),
        *,
        messages: Sequence[Mapping[str, Any]] = (),
        max_rounds: int = 8,
        confirm: Callable[[ToolCall], bool] | None = None,
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
        tool_choice: str = "auto",
        strict_tools: bool | None = None,
        enable_thinking: bool | None = None,
        reasoning_budget: int | None = None,
        template_variables: Mapping[str, Any] | None = None,
    ) -> Conversation:
        """Begins a conversation.

        Args:
            system: the system message.
            tools: functions that the model may call, which the conversation runs, or JSON schemas, whose calls the caller
                answers.
            messages: what was said before.
            max_rounds: the most rounds of calls in a turn.
            confirm: asked before each call; where it returns false the model is told that the call was declined.
            max_tokens: of every reply, as all the other options of :meth:`stream`.

        Raises:
            ArgumentError: an argument is out of range, or a function cannot be made a tool.
        """
        options = {name: value for name, value in locals().items() if name not in _OF_CONVERSATIONS}
        check_open(self, "_store")
        resolve_options(self._defaults, vocab_size=self.config.vocab_size, **sampling_options(options))
        begun = [] if system is None else [{"role": "system", "content": system}]
        rounds = integer("max_rounds", max_rounds, 0)
        return Conversation(self, [*begun, *messages], tools, rounds, confirm, options)

    def open_chat(
        self,
        path: str | os.PathLike[str],
        tools: Sequence[Tool] | None = None,
        *,
        confirm: Callable[[ToolCall], bool] | None = None,
    ) -> Conversation:
        """Opens a conversation that :meth:`~flash_moe.Conversation.save` wrote; it goes on without running its tokens.

        Args:
            tools: as in :meth:`chat`. A file holds no functions: without this, calls of its tools are left to the caller.
            confirm: as in :meth:`chat`.

        Raises:
            ConversationError: the file is damaged, or belongs to another checkpoint or to other settings.
            OSError: the file cannot be read.
        """
        check_open(self, "_store")
        return Conversation.opened(self, path, tools, confirm)

    @property
    def streaming(self) -> StreamingOptions:
        """What decoding does about experts that are not in memory."""
        return self._decoder.streaming

    @property
    def expert_store(self) -> ExpertStore:
        """Where the experts come from: its counters, and what measurements need of it."""
        return self._store

    def close(self) -> None:
        """Frees the weights, and closes the files of the experts as soon as no read is under way.

        Generations that run in other threads end with :class:`~flash_moe.ModelClosedError`, as does every later call.
        """
        store, engine, network = (take(self, name) for name in ("_store", "_engine", "_decoder"))
        del self._prefixes
        if store is not None and engine is not None:  # not closed before, nor in a fork
            store.close()
            engine.close()
            if isinstance(network, (LeadingNetwork, FollowingNetwork)):
                network.stop()
            del network  # whose memory is freed now
            clear_cache()

    def __enter__(self) -> Model:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @contextmanager
    def expert_uses(self) -> Iterator[ExpertUses]:
        """Counts how often each expert is used, by all generations, until the block ends."""
        uses = ExpertUses(dict.fromkeys(self._store.layouts, self.config.num_experts))
        with self._store.watch(uses):
            yield uses

    def _repr_html_(self) -> str:
        if not is_open(self, "_store"):
            return html.footnote(repr(self))
        config, k = self.config, self.experts_per_token
        experts = sum(layout.stride for layout in self._store.layouts.values()) * config.num_experts
        return html.text(self.path.name, "font-weight:600") + html.table(
            [
                ("layers", f"{config.num_hidden_layers}, {len(self._store.layouts)} with experts"),
                ("experts", f"{config.num_experts} per layer, {format_bytes(experts)} in all"),
                (
                    "experts per token",
                    f"{k}" if k == config.num_experts_per_tok else f"{k} of {config.num_experts_per_tok}",
                ),
                ("bytes of experts per token", format_bytes(experts / config.num_experts * k)),
                ("expert store", type(self._store).__name__),
                ("context", f"{config.max_position_embeddings:,} tokens"),
            ]
        )

    def __repr__(self) -> str:
        if not is_open(self, "_store"):
            return f"Model({str(self.path)!r}, closed)"
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
