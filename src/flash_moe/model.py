"""The public model class: opens a checkpoint and connects tokenizer, network and expert store."""

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
    """A language model that reads its routed experts from files when a token needs them.

    Create one with :meth:`load`. The constructor takes parts that are already open.
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
        """Loads a model: reads the resident weights into memory, and locates every expert in its file.

        Args:
            path: a folder, a repository on the Hugging Face hub ("org/name"), or ``"demo"``, a small model that comes
                with the library. A repository is downloaded first.
            experts_per_token: experts used per token and layer (K), at most the model's own K. None means the model's
                own K. The default is 4, or the model's own K if that is smaller.
            expert_io: how experts are read: ``"mapped"`` (pages used in place), ``"slots"`` (read into a bank),
                ``"resident"`` (everything in memory) or ``"auto"``.
            expert_cache: bytes of memory for experts beyond those of the current token. 0 leaves caching to the
                operating system, which is usually best.
            prefetch: whether to read the experts that the next layer will probably choose, after those of the current
                layer. Prefetching changes no token. The library times decoding with and without it, and keeps it on
                only if it is faster; the statistics report this.
            drop_cold_below: in decoding, a chosen expert that is not in memory is left out if its share of the routing
                weights is below this value (0 to 1). At least one expert stays. This is faster and less exact; 0 turns
                it off.
            prefer_cached: in decoding, a chosen expert that is not in memory is replaced by one that is, if the router
                probability of the replacement is at least 1 - prefer_cached times that of the chosen expert (0 to 1).
                This is faster and less exact; 0 turns it off.
            prompt_cache: bytes for the KV caches and recurrent states of earlier sequences. If a prompt shares a prefix
                with one of them, only the rest runs. The most recently used sequences are kept. None allows a sixteenth
                of the machine's memory, and always keeps the last sequence; 0 keeps none.
            dtype: dtype of activations: ``"float32"``, ``"bfloat16"`` or ``"float16"``. None takes the checkpoint's
                dtype on a GPU, and float32 on the CPU, where it is fastest.
            kernels: whether to use the kernels of this library. On a GPU, None uses those kernels that are correct and
                faster than MLX's ops on this machine at the sizes of this model. The first load tests them for some
                seconds in a separate process and stores the results. If ``kernels`` is None, the environment variable
                ``FLASH_MOE_KERNELS`` can be on, off or auto; off overrides any value of ``kernels``. On the CPU,
                kernels need Numba, and None uses them for all but the smallest models.
            threads: number of threads for the CPU kernels; None takes one per physical core.
            group: a group of machines that run the model together, each with its share of the experts (see
                docs/machines.md). Pass the result of ``mx.distributed.init()``, or ``"auto"`` to join a group only if
                ``mlx.launch`` started this process. All ranks must load with the same arguments. Rank 0 generates; the
                others call :meth:`follow`. A group does not support drop_cold_below and prefer_cached, because they
                depend on the experts in the memory of one machine.
            group_timeout: seconds without a message or progress from a rank, after which the group ends.
            revision: branch, tag or commit on the hub.
            token: access token for the hub; None takes the token that ``hf auth login`` stored.
            progress: whether to report the progress of downloading, testing kernels, loading, and filling the resident
                store. True shows bars in a terminal or a notebook for steps longer than a second, and elsewhere logs a
                line from time to time. A callable receives a :class:`~flash_moe.Progress`. In a terminal, True also
                asks before a download of more than 50 GB.

        A model of another family runs on mlx-lm's network, by default with its own K. It does not support the options
        prefetch, drop_cold_below, prefer_cached, kernels and threads.

        Raises:
            ConfigError: config.json is missing or describes a model that cannot be run.
            CheckpointError: a file is missing, truncated or malformed, or does not match the other files.
            TokenizerError: there is no usable tokenizer.
            HubError, DiskSpaceError: the download failed, or the disk has too little space for it.
            MemoryLimitError: the machine, or the control group of the process (Linux), has less memory than the model
                needs.
            ArgumentError: an argument is out of range.
            ForkError: this process is a fork of one that loaded a model.
            PeerError: another rank of the group has different settings, could not load the model, or cannot be reached.
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
        """Starts a conversation.

        Args:
            system: the system message.
            tools: functions or JSON schemas that the model may call. The conversation runs functions itself. The caller
                must answer calls of schemas.
            messages: earlier messages of the conversation.
            max_rounds: the maximum number of rounds of calls in a turn.
            confirm: function that is called before each call of a tool. If it returns False, the tool does not run, and
                the model is told that the user declined.
            max_tokens: the maximum number of tokens of each reply. This and all other options are those of
                :meth:`stream`.

        Raises:
            ArgumentError: an argument is out of range, or a function cannot be used as a tool.
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
        """Opens a conversation saved by :meth:`~flash_moe.Conversation.save`, without running its tokens again.

        Args:
            tools: as in :meth:`chat`. A file holds only schemas, not functions: with None, the caller must answer calls
                of its tools.
            confirm: as in :meth:`chat`.

        Raises:
            ConversationError: the file is damaged, or was saved with another checkpoint or other settings.
            OSError: the file cannot be read.
        """
        check_open(self, "_store")
        return Conversation.opened(self, path, tools, confirm)

    @property
    def streaming(self) -> StreamingOptions:
        """The options for experts that are not in memory: prefetching, dropping, preferring cached experts."""
        return self._decoder.streaming

    @property
    def expert_store(self) -> ExpertStore:
        """The store that the experts come from; it has counters of reads."""
        return self._store

    def close(self) -> None:
        """Frees the weights, and closes the expert files after running reads have ended.

        Running generations and all later calls raise :class:`~flash_moe.ModelClosedError`.
        """
        store, engine, network = (take(self, name) for name in ("_store", "_engine", "_decoder"))
        del self._prefixes
        if store is not None and engine is not None:  # neither closed before nor in a fork
            store.close()
            engine.close()
            if isinstance(network, (LeadingNetwork, FollowingNetwork)):
                network.stop()
            del network  # frees their memory now
            clear_cache()

    def __enter__(self) -> Model:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @contextmanager
    def expert_uses(self) -> Iterator[ExpertUses]:
        """Counts how often all generations use each expert, until the ``with`` block ends."""
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
