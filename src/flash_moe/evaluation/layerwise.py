"""Hidden states of many sequences, one layer at a time, so that memory for one layer is enough for any checkpoint.

All sequences go through a layer before the next one is read: every weight and every expert is read once, however many
tokens there are. In memory are one layer, the experts of two fetches, and four vectors of H numbers per token.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ..checkpoint.files import Checkpoint
from ..checkpoint.hub import resolve
from ..checkpoint.records import RecordTable
from ..checkpoint.resident import load_resident
from ..config import ModelConfig
from ..errors import PromptError
from ..experts.opening import ExpertIO, open_store
from ..experts.store import ExpertStore
from ..generation.chunks import prefill_chunk
from ..loading import DEFAULT_EXPERTS_PER_TOKEN, resolve_dtype, resolve_experts_per_token
from ..nn.cache import layer_cache
from ..nn.decoder import DecoderLayer
from ..nn.linear import Linear
from ..nn.sparse_moe import SparseMoE, chosen_experts
from ..nn.weights import Weights
from ..ops.dispatch import kernels
from ..ops.norm import rms_norm
from ..text import Tokenizer
from ..text.prompt import check_tokens
from .expert_sum import expert_sum

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class LayerwiseModel:
    """A checkpoint to be run layer by layer; opening one reads headers and the tokenizer.

    Attributes:
        experts_per_token: K.
        dtype: of activations.
        expert_io: how experts are read.
        unit: what progress counts.
    """

    checkpoint: Checkpoint
    tokenizer: Tokenizer
    experts_per_token: int
    dtype: mx.Dtype
    expert_io: ExpertIO
    unit = "layers"

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        experts_per_token: int | None = DEFAULT_EXPERTS_PER_TOKEN,
        expert_io: ExpertIO = "auto",
        dtype: str | None = None,
        revision: str | None = None,
    ) -> LayerwiseModel:
        """Opens a folder or a repository on the hub; arguments and errors are those of :meth:`flash_moe.Model.load`."""
        checkpoint = Checkpoint.open(resolve(path, revision=revision))
        k = resolve_experts_per_token(experts_per_token, checkpoint.config)
        return cls(checkpoint, Tokenizer.load(checkpoint.folder), k, resolve_dtype(dtype, checkpoint), expert_io)

    @property
    def config(self) -> ModelConfig:
        """The model's dimensions."""
        return self.checkpoint.config

    def final_states(self, sequences: Sequence[Sequence[int]], progress: Progress | None = None) -> list[mx.array]:
        """Teacher-forced passes, each from an empty cache.

        Args:
            sequences: token ids.
            progress: called as ``progress(done, total)`` with layers.

        Returns:
            The hidden states of each sequence after the final norm, [T, H].

        Raises:
            CheckpointError, ExpertReadError: the weights are not what they should be.
            NumericalError: a router produced NaN.
            PromptError: a sequence is empty, or a token id is outside the vocabulary.
        """
        config = self.config
        weights = _Weights(self.checkpoint, self.dtype)
        embedding = weights.take("embed_tokens").embedding("embed_tokens", config.vocab_size, config.hidden_size)
        states = [embedding.rows(mx.array(tokens)) for tokens in self.checked(sequences)]
        mx.eval(states)
        del embedding
        report = progress or (lambda done, total: None)
        report(0, config.num_hidden_layers)
        store = open_store(RecordTable.of(self.checkpoint), self.expert_io, self.experts_per_token)
        with closing(store), kernels(False):  # kernels are for single tokens
            for i in range(config.num_hidden_layers):
                part = weights.take(f"layers.{i}").at("layers").at(i)
                layer = DecoderLayer(config, i, part, store, self.experts_per_token)
                self._run_layer(i, layer, states, store)
                del part
                for module in layer.modules():
                    module.clear()  # modules and their traced functions refer to each other, so nothing else frees them
                mx.clear_cache()
                report(i + 1, config.num_hidden_layers)
        norm = weights.take("norm").array("norm.weight", config.hidden_size)
        return [rms_norm(x, norm, config.rms_norm_eps) for x in states]

    def checked(self, sequences: Sequence[Sequence[int]]) -> list[list[int]]:
        """The sequences as token ids. PromptError where one is empty, too long, or has an id that does not exist."""
        context = self.config.max_position_embeddings
        for number, sequence in enumerate(sequences, start=1):
            if len(sequence) > context:
                raise PromptError(
                    f"sequence {number} has {len(sequence)} tokens, the model's context is {context}; shorten it"
                )
        return [check_tokens(sequence, self.config.vocab_size) for sequence in sequences]

    def head(self) -> Linear:
        """The output head: [T, H] to [T, V]."""
        name = "embed_tokens" if self.config.tie_word_embeddings else "lm_head"
        weights = _Weights(self.checkpoint, self.dtype).take(name)
        make = weights.embedding if self.config.tie_word_embeddings else weights.linear
        return make(name, self.config.vocab_size, self.config.hidden_size)

    def _run_layer(self, index: int, layer: DecoderLayer, states: list[mx.array], store: ExpertStore) -> None:
        """All sequences through one layer, in place."""
        sparse = isinstance(layer.mlp, SparseMoE)
        step = prefill_chunk(self.config, self.experts_per_token)
        normed, routed = [], []
        for number, x in enumerate(states):
            cache = layer_cache(self.config, index, self.dtype)
            parts: list[tuple[mx.array, ...]] = []
            for start in range(0, x.shape[0], step):
                chunk = x[start : start + step]
                parts.append(layer.front(chunk, cache) if sparse else (layer(chunk, cache),))
                mx.eval(*parts[-1], *cache.arrays)
            *routing, states[number] = (mx.concatenate(list(column)) for column in zip(*parts, strict=True))
            mx.eval(states[number], *routing)
            if sparse:
                h, ids, weights = routing
                normed.append(h)
                routed.append((chosen_experts(ids, weights, index), np.array(weights)))
        if sparse:
            chosen, factors = (np.concatenate(column) for column in zip(*routed, strict=True))
            h = mx.concatenate(normed)
            mx.eval(h)
            normed.clear()
            total = expert_sum(h, chosen, factors, index, store)
            ends = np.cumsum([len(x) for x in states])
            for number, rows in enumerate(np.split(total, ends[:-1])):
                states[number] = states[number] + mx.array(rows).astype(self.dtype)
                mx.eval(states[number])


class _Weights:
    """Resident weights of which each part is read when it is used, and gone when its user is."""

    def __init__(self, checkpoint: Checkpoint, dtype: mx.Dtype) -> None:
        resident = load_resident(checkpoint, dtype)
        self._arrays, self._quantization = dict(resident.arrays), resident.quantization

    def take(self, path: str) -> Weights:
        """The weights below ``path``, under their full names; they can be taken once."""
        names = [name for name in self._arrays if name.startswith(f"{path}.")]
        return Weights({name: self._arrays.pop(name) for name in names}, self._quantization)
