"""The decoder: embeddings, layers, final norm and output head."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from itertools import accumulate, chain
from typing import Any

import mlx.core as mx

from ..config import ModelConfig
from ..experts.store import ExpertStore
from ..machines.sums import Sums
from ..mlx_cache import clear_cache
from ..ops.dispatch import kernels, on_gpu
from ..ops.norm import rms_norm
from ..share import WHOLE
from .cache import SequenceCache
from .decoder_layer import DecoderLayer
from .expert_choice import ExpertChoice
from .module import Module
from .network import Task
from .prefetch import Prefetcher, connect
from .run_ahead import RunAhead
from .sparse_moe import SparseMoE
from .streaming_options import PLAIN, StreamingOptions
from .weights import Weights


class Decoder(Module):
    """The whole network.

    Args:
        weights: resident weights. Those of a layer are evaluated before the next layer is built.
        store: the store of the routed experts.
        experts_per_token: K.
        dtype: dtype of activations.
        progress: function that is called after each layer with the number of layers built.
        use_kernels: whether ops may run as this library's kernels; None uses those that passed their trial.
        streaming: options for experts that are not in memory.
        sums: adds the expert outputs of several machines; None for a single machine.

    Attributes:
        streaming: the options. choice: changes the experts of single tokens; None if the router alone decides.
        prefetcher: predicts experts and counts predictions; None if prefetching is off.
        run_ahead: runs single tokens ahead, if a bank on a GPU keeps experts; else None.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        store: ExpertStore,
        experts_per_token: int,
        dtype: mx.Dtype,
        progress: Callable[[int], None] | None = None,
        use_kernels: bool | None = None,
        streaming: StreamingOptions = PLAIN,
        sums: Sums | None = None,
    ) -> None:
        super().__init__()
        self.streaming, self._store = streaming, store
        changed = streaming.changes_experts
        self.choice = ExpertChoice(experts_per_token, config.norm_topk_prob, streaming) if changed else None
        self._use_kernels, self.config, self.dtype = use_kernels, config, dtype
        self.embed_tokens = weights.embedding("embed_tokens", config.vocab_size, config.hidden_size)
        self.norm = weights.array("norm.weight", config.hidden_size)
        if not config.tie_word_embeddings:
            self.lm_head = weights.linear("lm_head", config.vocab_size, config.hidden_size)
        self.layers: list[DecoderLayer] = []
        for i in range(config.num_hidden_layers):
            with kernels(use_kernels):
                layer = DecoderLayer(config, i, weights.at("layers").at(i), store, experts_per_token, self.choice, sums)
            mx.async_eval(layer.parameters())  # read while the previous layer is evaluated
            if self.layers:
                mx.eval(self.layers[-1].parameters())
                clear_cache()  # frees temporary memory of loading the layer
            self.layers.append(layer)
            if progress is not None:
                progress(i + 1)
        mx.eval(self.parameters())
        self._cpu: Any = None
        self._passed: Callable[[int], None] | None = None
        self.prefetcher: Prefetcher | None = None
        if streaming.prefetch:
            self.prefetcher = Prefetcher(store, experts_per_token, share=WHOLE if sums is None else sums.share)
            connect(self.prefetcher, self.layers, SparseMoE)
        self.run_ahead: RunAhead | None = None
        waits = streaming.prefetch or streaming.changes_experts or sums is not None  # the host waits in every layer
        if store.keeps_experts and on_gpu() and not waits:
            self.run_ahead = RunAhead(self.layers, store)

    def run_on_cpu(self, threads: int | None = None) -> None:
        """Runs tokens through the CPU kernels from now on. This needs Numba.

        Args:
            threads: number of threads; None takes one per physical core.
        """
        from .cpu_decoder import CpuDecoder

        self._cpu = CpuDecoder(self, threads)

    @property
    def runs_on_cpu_kernels(self) -> bool:
        """Whether tokens run through the CPU kernels."""
        return self._cpu is not None

    @contextmanager
    def serving(self, task: Task) -> Iterator[None]:
        """Inside the block, every pass belongs to this task: it updates the task's counters and ends when the task is
        cancelled.
        """
        pairs = (self.prefetcher, task.prefetch), (self.choice, task.choice), (self.run_ahead, task.ahead)
        counted = [(shared, shared.counters, own) for shared, own in pairs if shared is not None]
        with self._store.counting(task.store):
            try:
                for shared, _, own in counted:
                    shared.counters = own
                self._store.stop_if(task.cancelled)
                self._passed = task.passed
                yield
            finally:
                self._passed = None
                self._store.stop_if(None)
                for shared, outer, _ in counted:
                    shared.counters = outer

    def new_cache(self) -> SequenceCache:
        """Returns an empty cache for a new sequence."""
        return SequenceCache(self.config, self.dtype)

    def __call__(self, tokens: mx.array, cache: SequenceCache) -> mx.array:
        """Runs T further tokens of a sequence.

        Args:
            tokens: [T] int32.
            cache: the cache of the earlier tokens, extended in place.

        Returns:
            The hidden states [T, H] after the final norm. They and the arrays of the cache may not be evaluated yet.
        """
        if tokens.size > 1 or self.run_ahead is None:
            with nullcontext() if tokens.size > 1 or self.prefetcher is None else self.prefetcher.token():
                return self.run_through(tokens, [cache], [tokens.size])
        with kernels(self._use_kernels):
            x = self.run_ahead(self.embed_tokens.rows(tokens, self.dtype), cache.layers)
        return rms_norm(x, self.norm, self.config.rms_norm_eps)

    def run_through(self, tokens: mx.array, caches: Sequence[SequenceCache], counts: Sequence[int]) -> mx.array:
        """Runs further tokens of several sequences through all layers. Experts are fetched once for all of them.

        Args:
            tokens: [T] int32, the tokens of the sequences one after the other.
            counts: number of tokens of each sequence.

        Returns: The hidden states, as :meth:`__call__` returns them.
        """
        if self._cpu is not None:
            return self._cpu(tokens, caches, counts, self._passed)
        with kernels(self._use_kernels):
            x = self.embed_tokens.rows(tokens, self.dtype)
            for number, layer in enumerate(self.layers):
                states = [cache.layers[number] for cache in caches]
                x = layer(x, states[0]) if len(states) == 1 else layer.together(x, states, counts)
                if self._passed is not None:
                    self._passed(number + 1)
        return rms_norm(x, self.norm, self.config.rms_norm_eps)

    def chunks(self, tokens: Sequence[int], cache: SequenceCache, last: int) -> list[int]:
        return [len(tokens)]  # see Network.chunks

    def run(self, tokens: Sequence[int], cache: SequenceCache, last: int) -> mx.array:
        """Runs further tokens of a sequence; see :class:`~.network.Network`.

        With several tokens, everything except the logits is evaluated.
        """
        if len(tokens) > 1:
            hidden = self._run_many([tokens], [cache])
        else:
            hidden = self(mx.array(list(tokens), dtype=mx.int32), cache)
            cache.tokens.extend(tokens)
            mx.async_eval(hidden, *cache.arrays)
        return self.logits(hidden[-last:]) if last else mx.zeros((0, self.config.vocab_size))

    def run_together(self, tokens: Sequence[Sequence[int]], caches: Sequence[SequenceCache]) -> mx.array:
        """Runs further tokens of several sequences, at least one of each. Experts are fetched once for all of them.

        Returns:
            Logits [N, V] float32 of the last token of each.
        """
        hidden = self._run_many(tokens, caches)
        ends = mx.array(list(accumulate(len(own) for own in tokens))) - 1
        return self.logits(hidden if len(hidden) == len(caches) else hidden[ends])

    def _run_many(self, tokens: Sequence[Sequence[int]], caches: Sequence[SequenceCache]) -> mx.array:
        counts = [len(own) for own in tokens]
        with ExitStack() as undoing:
            for cache in caches if max(counts) > 1 else ():  # for single tokens, keeping old states takes too long
                undoing.enter_context(cache.undone_on_error())
            hidden = self.run_through(mx.array(list(chain(*tokens)), dtype=mx.int32), caches, counts)
            for own, cache in zip(tokens, caches, strict=True):
                cache.tokens.extend(own)
            mx.eval(hidden, [[*cache.arrays, *cache.marked_arrays] for cache in caches])
        return hidden

    def logits(self, hidden: mx.array) -> mx.array:
        """Returns the logits [T, V] float32 of hidden states [T, H]."""
        if self._cpu is not None:
            return self._cpu.logits(hidden)
        head = self.embed_tokens if self.config.tie_word_embeddings else self.lm_head
        with kernels(self._use_kernels):
            return head(hidden).astype(mx.float32)
