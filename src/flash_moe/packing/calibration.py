"""Runs calibration texts through the network layer by layer, and quantises each expert for its inputs there.

The inputs of a layer come from the quantised experts of the layers before it. Memory holds the resident weights of one
layer, the hidden states of all tokens, and the second moments of one expert.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ..checkpoint.records import RecordTable
from ..errors import ArgumentError, CheckpointError
from ..experts.opening import open_store
from ..models import ModelFiles
from ..nn.layerwise import add_rows
from ..record import PROJECTIONS, RecordLayout
from ..text.prompt import check_sequences
from .calibrated import Expert, quantize_expert, second_moments
from .requantize import affine_parts, as_floats, assembled, changed_projections


@dataclass
class _Layer:
    """The inputs of the current layer's experts, and the sum of their outputs."""

    index: int
    h: np.ndarray
    chosen: np.ndarray
    weights: np.ndarray
    moments: np.ndarray
    total: np.ndarray


class Calibration:
    """Quantises the records of a checkpoint, layer by layer.

    Args:
        target: the target layouts, by layer.
        sequences: token ids of the calibration texts.

    Raises:
        ArgumentError: there are no sequences.
        PromptError: a sequence is empty or too long, or contains an invalid token id.
    """

    def __init__(
        self,
        checkpoint: ModelFiles,
        table: RecordTable,
        target: Mapping[int, RecordLayout],
        sequences: Sequence[Sequence[int]],
    ) -> None:
        if not sequences:
            raise ArgumentError("calibration holds no sequences; pass token ids of some text, or None")
        self._checkpoint, self._table, self._target = checkpoint, table, target
        known = checkpoint.dimensions
        self._tokens = check_sequences(sequences, known.vocab_size, known.max_position_embeddings)
        self._network = checkpoint.layerwise(mx.float32)
        self._states: list[mx.array] = []
        self._next = 0
        self._layer: _Layer | None = None

    @property
    def nbytes(self) -> int:
        """The number of bytes of :meth:`states`."""
        return 4 * self._checkpoint.shape.hidden_size * sum(map(len, self._tokens))

    def begin(self) -> None:
        """Starts the calibration before the first layer."""
        self._states = self._network.embedded(self._tokens, mx.float32)
        self._next = 0

    def resume(self, layer: int, states: np.ndarray) -> None:
        """Continues with the result that :meth:`states` returned after the last layer with experts before ``layer``.

        Raises:
            CheckpointError: the states do not belong to these texts.
        """
        expected = (sum(map(len, self._tokens)), self._checkpoint.shape.hidden_size)
        if (states.shape, states.dtype) != (expected, np.float32):
            raise CheckpointError(
                f"the saved calibration is {states.dtype} {states.shape}, expected float32 {expected}; "
                "delete the .partial folder and start again"
            )
        self._next = max((i for i in self._target if i < layer), default=-1) + 1
        ends = np.cumsum([len(sequence) for sequence in self._tokens])
        self._states = [mx.array(rows) for rows in np.split(states, ends[:-1])]

    def states(self) -> np.ndarray:
        """Returns all hidden states, [N, H] float32, for :meth:`resume`."""
        return np.concatenate([np.array(x) for x in self._states])

    def enter(self, layer: int) -> None:
        """Runs the network up to the routed experts of a layer.

        Raises:
            NumericalError: a router produced NaN.
        """
        k = self._checkpoint.shape.experts_per_token
        with closing(open_store(self._table, "mapped", k)) as store:
            for i in range(self._next, layer + 1):
                routed = self._network.run_layer(i, store, k, self._states)
        assert routed is not None
        h = np.array(routed.h)
        moments = second_moments(h, routed.weights.sum(axis=1))
        self._layer = _Layer(layer, h, routed.chosen, routed.weights, moments, np.zeros_like(h))
        self._next = layer + 1

    def rewrite(self, experts: Sequence[int], records: mx.array) -> np.ndarray:
        """Quantises experts of the current layer.

        Args:
            records: [N, words] uint32 records of the source.

        Returns:
            [N, stride] uint8 records in the target layout.
        """
        assert self._layer is not None
        seen = self._layer
        source, target = self._table.layouts[seen.index], self._target[seen.index]
        formats = {name: target.formats[name] for name in changed_projections(source, target)}
        parts = []
        for expert, record in zip(experts, records, strict=True):
            original = Expert(*(as_floats(record[None], source, name) for name in PROJECTIONS))
            tokens, slots = np.nonzero(seen.chosen == expert)
            x, weights = seen.h[tokens], seen.weights[tokens, slots]
            found, now = quantize_expert(original, formats, x, weights, seen.moments)
            seen.total[tokens] += weights[:, None] * (now.hidden(x) @ now.down_proj.T)
            parts.append({k: v for name, a in found.items() for k, v in affine_parts(name, a, formats[name]).items()})
        return assembled(records, source, target, parts)

    def leave(self) -> None:
        """Adds the outputs of the layer's quantised experts to the hidden states."""
        assert self._layer is not None
        add_rows(self._states, self._layer.total)
        self._layer = None
