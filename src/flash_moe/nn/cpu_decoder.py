"""Runs the whole network with NumPy arrays and the CPU kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from ..ops.cpu.memory import aligned, view
from ..ops.cpu.norm import rms_norm
from ..ops.cpu.workers import workers
from .attention import GatedAttention
from .cache import DeltaCache, KVCache, SequenceCache
from .cpu_layers import AttentionMixer, DeltaMixer, Pass, Weights
from .cpu_moe import CpuMoE, DenseMlp
from .prefetch import connect
from .sparse_moe import SparseMoE


class CpuLayer:
    """A layer of the decoder. It updates y [T, H], the residual stream of one or more sequences, in place."""

    def __init__(self, config: Any, layer: Any, weights: Weights) -> None:
        norms = layer.input_layernorm, layer.post_attention_layernorm
        self._input_norm, self._post_norm = (view(norm.astype(mx.float32)) for norm in norms)
        self._eps = np.float32(config.rms_norm_eps)
        kind = AttentionMixer if isinstance(layer.mixer, GatedAttention) else DeltaMixer
        self._mixer: Any = kind(config, layer.mixer, weights)
        self.mlp: Any = CpuMoE(layer.mlp, weights) if isinstance(layer.mlp, SparseMoE) else DenseMlp(layer.mlp, weights)

    def __call__(self, y: np.ndarray, caches: Sequence[KVCache | DeltaCache], run: Pass) -> None:
        self.mlp(self._mixed(y, caches, run), y, run)

    def front(self, y: np.ndarray, caches: Sequence[KVCache | DeltaCache], run: Pass) -> None:
        """Runs a sparse layer without its routed experts, for separate timing."""
        self.mlp.front(self._mixed(y, caches, run), y, run)

    def _mixed(self, y: np.ndarray, caches: Sequence[KVCache | DeltaCache], run: Pass) -> np.ndarray:
        """Adds the mixer's output to y, and returns y after the next norm."""
        h = run.room("normed", y.shape[1])
        rms_norm(y, self._input_norm, self._eps, h)
        self._mixer(h, y, caches, run)
        rms_norm(y, self._post_norm, self._eps, h)
        return h

    def router_logits(self, residual: np.ndarray) -> np.ndarray:
        """Returns the router logits, as :meth:`~.decoder.DecoderLayer.router_logits` does."""
        h = aligned(*residual.shape)
        rms_norm(residual, self._post_norm, self._eps, h)
        return self.mlp.router_logits(h)


class CpuDecoder:
    """Runs a :class:`~.decoder.Decoder` with its weights and caches, without copying them.

    Args:
        threads: number of threads; None takes one per physical core.
    """

    def __init__(self, decoder: Any, threads: int | None) -> None:
        self._config, self._embedding = decoder.config, decoder.embed_tokens
        weights = Weights(workers(threads))
        self._layers = [CpuLayer(self._config, layer, weights) for layer in decoder.layers]
        self._norm = view(decoder.norm.astype(mx.float32))
        self._head = weights.products([decoder.embed_tokens if self._config.tie_word_embeddings else decoder.lm_head])
        self._frequencies = np.array(self._config.rope_frequencies)
        self._weights = weights
        if decoder.prefetcher is not None:
            connect(decoder.prefetcher, self._layers, CpuMoE)

    def __call__(
        self,
        tokens: mx.array,
        caches: Sequence[SequenceCache],
        counts: Sequence[int],
        passed: Callable[[int], None] | None = None,
    ) -> mx.array:
        """Runs tokens as :meth:`~.decoder.Decoder.run_through` does. The results are evaluated when it returns.

        Args:
            passed: function that is called after each layer with the number of completed layers.
        """
        y = aligned(tokens.size, self._config.hidden_size)
        y[:] = view(self._embedding.rows(tokens, mx.float32))
        run = Pass(counts, turns(self._frequencies, [cache.length for cache in caches], counts))
        for number, layer in enumerate(self._layers):
            layer(y, [cache.layers[number] for cache in caches], run)
            if passed is not None:
                passed(number + 1)
        rms_norm(y, self._norm, np.float32(self._config.rms_norm_eps), y)
        return mx.array(y)

    def logits(self, hidden: mx.array) -> mx.array:
        """Returns logits, as :meth:`~.decoder.Decoder.logits` does."""
        return mx.array(self._head(view(hidden), aligned(hidden.shape[0], self._head.rows)))


def turns(frequencies: np.ndarray, firsts: Sequence[int], counts: Sequence[int]) -> np.ndarray:
    """Returns cosines and sines [T, 2, rotary / 2] float32 of the angles of positions.

    Each sequence has ``counts`` positions from ``firsts`` on.
    """
    positions = np.concatenate([first + np.arange(count) for first, count in zip(firsts, counts, strict=True)])
    angles = positions[:, None] * frequencies
    return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
