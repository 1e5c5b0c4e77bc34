"""Computes hidden states of many sequences one layer at a time, so that memory holds only one layer.

All sequences pass through a layer before the next one is read. So every weight and every expert is read once, for any
number of tokens. Memory holds one layer, the experts of two fetches, and four vectors of H numbers per token.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, TypeVar

import mlx.core as mx

from ..checkpoint.hub import resolve
from ..checks import DEFAULT_EXPERTS_PER_TOKEN, resolve_experts_per_token
from ..experts.opening import ExpertIO, open_store
from ..loading import resolve_dtype
from ..models import ModelFiles, open_model
from ..nn.layerwise import Layerwise, add_rows
from ..nn.linear import Linear
from ..nn.network import Dimensions
from ..ops.dispatch import kernels
from ..text import Tokenizer
from ..text.prompt import check_sequences
from .expert_sum import expert_sum

Progress = Callable[[int, int], None]
Opened = TypeVar("Opened", bound="LayerwiseModel")


@dataclass(frozen=True)
class LayerwiseModel:
    """A checkpoint that runs layer by layer. Opening it reads only headers and the tokenizer.

    Attributes:
        experts_per_token: K.
        dtype: dtype of activations.
        expert_io: how experts are read.
        unit: unit of the progress.
    """

    checkpoint: ModelFiles
    tokenizer: Tokenizer
    experts_per_token: int
    dtype: mx.Dtype
    expert_io: ExpertIO
    unit = "layers"
    chunk_bytes = 64 << 20  # bytes of logits that are computed together

    @classmethod
    def open(
        cls: type[Opened],
        path: str | os.PathLike[str],
        *,
        experts_per_token: int | None = DEFAULT_EXPERTS_PER_TOKEN,
        expert_io: ExpertIO = "auto",
        dtype: str | None = None,
        revision: str | None = None,
        **own: Any,
    ) -> Opened:
        """Opens a folder or a repository on the hub. Arguments and errors are those of :meth:`flash_moe.Model.load`.

        Args:
            own: additional attributes of a subclass.
        """
        checkpoint = open_model(resolve(path, revision=revision))
        k = resolve_experts_per_token(experts_per_token, checkpoint.shape.experts_per_token)
        tokenizer, activations = Tokenizer.load(checkpoint.folder), resolve_dtype(dtype, checkpoint)
        return cls(checkpoint, tokenizer, k, activations, expert_io, **own)

    @property
    def config(self) -> Dimensions:
        """The dimensions of the model."""
        return self.checkpoint.dimensions

    def final_states(self, sequences: Sequence[Sequence[int]], progress: Progress | None = None) -> list[mx.array]:
        """Runs the sequences, each from an empty cache, and returns their final hidden states.

        Args:
            sequences: token ids of each sequence.
            progress: function that is called as ``progress(done, total)`` after each layer.

        Returns:
            The hidden states of each sequence after the final norm, [T, H].

        Raises:
            CheckpointError, ExpertReadError: the weights are damaged or cannot be read.
            NumericalError: a router produced NaN.
            PromptError: a sequence is empty, or a token id is outside the vocabulary.
        """
        layers, network = self.config.num_hidden_layers, self._network()
        states = network.embedded(self.checked(sequences), self.dtype)
        report = progress or (lambda done, total: None)
        report(0, layers)
        store = open_store(self.checkpoint.records(), self.expert_io, self.experts_per_token)
        with closing(store):
            for i in range(layers):
                routed = network.run_layer(i, store, self.experts_per_token, states)
                if routed is not None:
                    with kernels(False):
                        add_rows(states, expert_sum(routed.h, routed.chosen, routed.weights, i, store))
                report(i + 1, layers)
        return network.normed(states)

    def checked(self, sequences: Sequence[Sequence[int]]) -> list[list[int]]:
        """Checks sequences and returns them as token ids. Raises PromptError for an empty or too long one, or an
        invalid id.
        """
        return check_sequences(sequences, self.config.vocab_size, self.config.max_position_embeddings)

    def head(self) -> Linear:
        """Returns the output head: [T, H] to [T, V]."""
        return self._network().head()

    def shares_head(self, other: LayerwiseModel) -> bool:
        """Returns whether another model has the same head."""
        return self.checkpoint.folder.resolve() == other.checkpoint.folder.resolve() and self.dtype == other.dtype

    def _network(self) -> Layerwise:
        return self.checkpoint.layerwise(self.dtype)
