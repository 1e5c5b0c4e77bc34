"""Finds the kernels that a model could use, and weights that it lacks, from headers.

The layers describe a token and a prompt, without computing them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import mlx.core as mx

from ..config import ModelConfig
from ..experts.store import ExpertStore
from ..machines.sums import Sums
from ..ops.dispatch import Case, kernels, kernels_needed
from ..record import RecordLayout
from .cache import layer_cache
from .decoder_layer import DecoderLayer
from .expert_choice import ExpertChoice
from .linear import Linear
from .streaming_options import StreamingOptions
from .weights import Weights

_TOKENS = 64  # tokens of a prompt


class _NoStore(ExpertStore):
    """A store that has the layouts of records but no records."""

    def _arrive(self, layer: int, experts: Sequence[int]) -> Iterator[Any]:
        raise NotImplementedError("layers that are only described fetch nothing")

    def in_memory(self, layer: int, experts: Sequence[int]) -> list[bool]:
        return [False] * len(experts)

    def prefetch(self, layer: int, experts: Sequence[int]) -> None:
        """Does nothing: there is nothing to read."""

    def close(self) -> None:
        """Does nothing: no file is open."""


def needed_kernels(
    config: ModelConfig,
    weights: Weights,
    layouts: Mapping[int, RecordLayout],
    experts_per_token: int,
    dtype: mx.Dtype,
    streaming: StreamingOptions,
    sums: Sums | None = None,
) -> list[Case]:
    """Returns the cases of all kernels that could run in this network, each once.

    Args:
        weights: lazy arrays. None of them is evaluated on a GPU.
        layouts, experts_per_token, dtype, streaming, sums: the arguments of the decoder.
    """
    store = _NoStore(layouts, config.num_experts)
    choice = ExpertChoice(experts_per_token, config.norm_topk_prob, streaming) if streaming.changes_experts else None
    with kernels_needed() as found:
        for i in range(config.num_hidden_layers):
            layer = DecoderLayer(config, i, weights.at("layers").at(i), store, experts_per_token, choice, sums)
            for tokens in (1, _TOKENS):
                x, cache = mx.zeros((tokens, config.hidden_size), dtype=dtype), layer_cache(config, i, dtype)
                layer.describe(x, cache)
        _head(config, weights)(mx.zeros((1, config.hidden_size), dtype=dtype))
    return list(found)


def check_weights(config: ModelConfig, weights: Weights, layouts: Mapping[int, RecordLayout]) -> None:
    """Builds the layers of a network, without evaluating an array, and forgets them.

    Args:
        weights, layouts: as for :func:`needed_kernels`.

    Raises:
        CheckpointError: a weight is missing, or has another shape than the configuration.
    """
    store = _NoStore(layouts, config.num_experts)
    weights.embedding("embed_tokens", config.vocab_size, config.hidden_size)
    with kernels(False):
        for i in range(config.num_hidden_layers):
            DecoderLayer(config, i, weights.at("layers").at(i), store, config.num_experts_per_tok)
    weights.array("norm.weight", config.hidden_size)
    _head(config, weights)


def _head(config: ModelConfig, weights: Weights) -> Linear:
    sizes = config.vocab_size, config.hidden_size
    return (
        weights.embedding("embed_tokens", *sizes) if config.tie_word_embeddings else weights.linear("lm_head", *sizes)
    )
