"""Hidden states of many sequences, one layer at a time, so that memory for one layer is enough for any checkpoint.

All sequences go through a layer before the next one is read: every weight and every expert is read once, however many
tokens there are. In memory are one layer, the experts of two fetches, and four vectors of H numbers per token.
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
    """A checkpoint to be run layer by layer; opening one reads headers and the tokenizer.

    Attributes:
        experts_per_token: K.
        dtype: of activations.
        expert_io: how experts are read.
        unit: what progress counts.
    """

    checkpoint: ModelFiles
    tokenizer: Tokenizer
    experts_per_token: int
    dtype: mx.Dtype
    expert_io: ExpertIO
    unit = "layers"
    chunk_bytes = 64 << 20  # of logits at a time

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
        """Opens a folder or a repository on the hub; arguments and errors are those of :meth:`flash_moe.Model.load`.

        Args:
            own: the attributes that a subclass adds.
        """
        checkpoint = open_model(resolve(path, revision=revision))
        k = resolve_experts_per_token(experts_per_token, checkpoint.shape.experts_per_token)
        tokenizer, activations = Tokenizer.load(checkpoint.folder), resolve_dtype(dtype, checkpoint)
        return cls(checkpoint, tokenizer, k, activations, expert_io, **own)

    @property
    def config(self) -> Dimensions:
        """The model's dimensions."""
        return self.checkpoint.dimensions

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
        """Returns the sequences as token ids. PromptError where one is empty, too long, or has an id that does not
        exist.
        """
        return check_sequences(sequences, self.config.vocab_size, self.config.max_position_embeddings)

    def head(self) -> Linear:
        """Returns the output head: [T, H] to [T, V]."""
        return self._network().head()

    def shares_head(self, other: LayerwiseModel) -> bool:
        """Returns whether another model's head is the same."""
        return self.checkpoint.folder.resolve() == other.checkpoint.folder.resolve() and self.dtype == other.dtype

    def _network(self) -> Layerwise:
        return self.checkpoint.layerwise(self.dtype)
