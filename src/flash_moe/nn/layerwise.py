"""Runs many sequences through one layer before the next is built, so that memory holds only one layer.

Mixers run each sequence separately with a new cache. A layer returns the work of its routed experts for the rows of all
sequences together, so each expert is needed only once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ..config import ModelConfig
from ..experts.store import ExpertStore
from ..formats import Quantization
from ..mlx_cache import clear_cache
from ..ops.dispatch import kernels
from ..ops.norm import rms_norm
from .cache import layer_cache
from .decoder_layer import DecoderLayer
from .linear import Embedding, Linear
from .sparse_moe import SparseMoE, chosen_experts
from .weights import Weights

_CHUNK = 1024  # tokens of a sequence that pass through a layer together


@dataclass(frozen=True)
class Routed:
    """The work of a layer's routed experts: Σ_k weights[:, k] · expert_k(h).

    Attributes:
        h: [N, H], the rows of all sequences.
        chosen: [N, K] ids of the experts.
        weights: [N, K] float32.
    """

    h: mx.array
    chosen: np.ndarray
    weights: np.ndarray


class Layerwise:
    """A network whose parts are read on use and freed afterwards. Each part can be read only once.

    Args:
        arrays, quantization: as for :class:`Weights`. The arrays are lazy.
    """

    def __init__(
        self, config: ModelConfig, arrays: Mapping[str, mx.array], quantization: Mapping[str, Quantization]
    ) -> None:
        self._config, self._arrays, self._quantization = config, dict(arrays), quantization

    def embedded(self, sequences: Sequence[Sequence[int]], dtype: mx.Dtype) -> list[mx.array]:
        """Returns the embedded tokens of each sequence, [T, H] in ``dtype``."""
        table = self._table("embed_tokens")
        states = [table.rows(mx.array(list(tokens)), dtype) for tokens in sequences]
        mx.eval(states)
        return states

    def run_layer(
        self, layer: int, store: ExpertStore, experts_per_token: int, states: list[mx.array]
    ) -> Routed | None:
        """Runs all sequences through one layer, in place.

        Args:
            store: provides the record layouts; no record is fetched.
            states: the hidden states of each sequence, [T, H].

        Returns:
            The work of the layer's routed experts, whose result :func:`add_rows` adds; None for a dense layer.

        Raises:
            NumericalError: the router produced NaN.
        """
        part = self._take(f"layers.{layer}").at("layers").at(layer)
        normed, chosen, factors = [], [], []
        with kernels(False):  # kernels are for single tokens
            module = DecoderLayer(self._config, layer, part, store, experts_per_token)
            del part
            sparse = isinstance(module.mlp, SparseMoE)
            for number, x in enumerate(states):
                cache = layer_cache(self._config, layer, x.dtype)
                parts: list[tuple[mx.array, ...]] = []
                for start in range(0, x.shape[0], _CHUNK):
                    chunk = x[start : start + _CHUNK]
                    parts.append(module.front(chunk, cache) if sparse else (module(chunk, cache),))
                    mx.eval(*parts[-1], *cache.arrays)
                *routing, states[number] = (mx.concatenate(list(column)) for column in zip(*parts, strict=True))
                mx.eval(states[number], *routing)
                if sparse:
                    h, ids, routing_weights = routing
                    normed.append(h)
                    chosen.append(chosen_experts(ids, routing_weights, layer))
                    factors.append(np.array(routing_weights))
        for child in module.modules():
            child.clear()  # modules and their traced functions form reference cycles, so this frees them
        clear_cache()
        if not sparse:
            return None
        h = mx.concatenate(normed)
        mx.eval(h)
        return Routed(h, np.concatenate(chosen), np.concatenate(factors))

    def normed(self, states: Sequence[mx.array]) -> list[mx.array]:
        """Returns the hidden states of each sequence after the final norm."""
        norm = self._take("norm").array("norm.weight", self._config.hidden_size)
        return [rms_norm(x, norm, self._config.rms_norm_eps) for x in states]

    def head(self) -> Linear:
        """Returns the output head: [T, H] to [T, V]."""
        config = self._config
        if config.tie_word_embeddings:
            return self._table("embed_tokens")
        return self._take("lm_head").linear("lm_head", config.vocab_size, config.hidden_size)

    def _table(self, name: str) -> Embedding:
        return self._take(name).embedding(name, self._config.vocab_size, self._config.hidden_size)

    def _take(self, path: str) -> Weights:
        """Removes and returns the weights below ``path``, under their full names."""
        names = [name for name in self._arrays if name.startswith(f"{path}.")]
        return Weights({name: self._arrays.pop(name) for name in names}, self._quantization)


def add_rows(states: list[mx.array], rows: np.ndarray) -> None:
    """Adds rows [N, H], in the order of the sequences, to the hidden states in place."""
    ends = np.cumsum([len(x) for x in states])
    for number, mine in enumerate(np.split(rows, ends[:-1])):
        states[number] = states[number] + mx.array(mine).astype(states[number].dtype)
        mx.eval(states[number])
