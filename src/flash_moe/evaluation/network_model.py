"""Scores texts with passes through a whole network, for families that run on mlx-lm's network."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from ..checkpoint.hub import resolve
from ..checks import DEFAULT_EXPERTS_PER_TOKEN
from ..experts.opening import ExpertIO
from ..loading import given_dtype, resolve_dtype
from ..models import AdaptedFiles, is_adapted
from ..text import Tokenizer
from .layerwise_model import LayerwiseModel, Progress


@dataclass(frozen=True)
class Rows:
    """Rows of a text whose logits a pass computes. A slice with step 1 is a range of rows of the same text."""

    tokens: Sequence[int]
    start: int = 0

    def __getitem__(self, rows: slice) -> Rows:
        return Rows(self.tokens[: self.start + rows.stop], self.start + rows.start)


@dataclass(frozen=True)
class NetworkModel(LayerwiseModel):
    """A checkpoint of one of mlx-lm's families. All its resident weights are in memory while texts are scored.

    Hidden states are not accessible. So rows of text take the place of hidden states, and the network takes the place
    of the head.
    """

    checkpoint: AdaptedFiles  # type: ignore[assignment]
    chunk_bytes = 4 * LayerwiseModel.chunk_bytes  # each chunk reads the experts of its tokens

    @classmethod
    def open(  # type: ignore[override]
        cls,
        path: str | os.PathLike[str],
        *,
        experts_per_token: int | None = DEFAULT_EXPERTS_PER_TOKEN,
        expert_io: ExpertIO = "auto",
        dtype: str | None = None,
        revision: str | None = None,
    ) -> NetworkModel:
        """Opens a folder or a repository on the hub. Arguments and errors are those of :meth:`flash_moe.Model.load`."""
        folder = resolve(path, revision=revision)
        activations = given_dtype(dtype) or resolve_dtype(None, AdaptedFiles.open(folder))
        files = AdaptedFiles.open(folder, experts_per_token, activations)
        return cls(files, Tokenizer.load(folder), files.experts_per_token, activations, expert_io)

    def final_states(self, sequences: Sequence[Sequence[int]], progress: Progress | None = None) -> list[Any]:
        """Checks the sequences and returns them as rows for :meth:`head`."""
        return [Rows(tokens) for tokens in self.checked(sequences)]

    def head(self) -> Callable[[Rows], mx.array]:  # type: ignore[override]
        """Loads the network, and returns a function that computes logits [T, V] of rows in the order of each text. Call
        it only once.
        """
        network = self.checkpoint.load(self.expert_io, 0)
        caches: dict[str, Any] = {}

        def logits(rows: Rows) -> mx.array:
            if rows.start == 0:
                caches.clear()
                caches["now"] = network.new_cache()
            return network.run(rows.tokens[rows.start :], caches["now"], len(rows.tokens) - rows.start)

        return logits

    def shares_head(self, other: LayerwiseModel) -> bool:
        """Returns False: each model uses its own network with its own K."""
        return False


def open_scored(path: str | os.PathLike[str], *, revision: str | None = None, **options: Any) -> LayerwiseModel:
    """Opens a checkpoint of any family for scoring. The arguments are those of :meth:`LayerwiseModel.open`."""
    folder = resolve(path, revision=revision)
    return (NetworkModel if is_adapted(folder) else LayerwiseModel).open(folder, **options)
