"""Gives each module its weights, and checks their shapes against the configuration."""

from __future__ import annotations

from collections.abc import Mapping

import mlx.core as mx

from ..errors import CheckpointError
from ..formats import Quantization
from .linear import Embedding, Linear, Linears


class Weights:
    """The weights below one path of the network, e.g. ``layers.3.self_attn``.

    Args:
        arrays: all resident arrays by canonical name.
        quantization: quantisation of each quantised module, by canonical path.
        join: whether linear layers with the same input may be copied into one matrix.
    """

    def __init__(
        self,
        arrays: Mapping[str, mx.array],
        quantization: Mapping[str, Quantization],
        path: str = "",
        *,
        join: bool = True,
    ) -> None:
        self._arrays, self._quantization, self._path, self._join_linears = arrays, quantization, path, join

    def at(self, name: str | int) -> Weights:
        """Returns the weights below ``name``."""
        return Weights(self._arrays, self._quantization, self._join(name), join=self._join_linears)

    def array(self, name: str, *shape: int) -> mx.array:
        """Returns the array ``name``, which must have this shape.

        Raises:
            CheckpointError: the array is missing or has another shape.
        """
        path = self._join(name)
        if (array := self._arrays.get(path)) is None:
            raise CheckpointError(
                f"the checkpoint lacks {path}; it is incomplete or of another model: download it again"
            )
        if array.shape != shape:
            raise CheckpointError(
                f"{path} has shape {list(array.shape)}, but config.json asks for {list(shape)}; "
                "config.json and weights do not belong together"
            )
        return array

    def linear(self, name: str, out_features: int, in_features: int, *, bias: bool = False) -> Linear:
        """Returns the linear layer ``name`` in the format of the checkpoint."""
        parts = self._matrix(name, out_features, in_features)
        own = self.at(name)
        return Linear(
            *parts, own.array("bias", out_features) if bias else None, own._arrays.get(own._join("global_scale"))
        )

    def linears(self, out_features: Mapping[str, int], in_features: int, *, bias: bool = False) -> Linears:
        """Returns several linear layers with the same input; ``out_features`` maps names to output sizes."""
        layers = [self.linear(name, out, in_features, bias=bias) for name, out in out_features.items()]
        return Linears(layers, join=self._join_linears)

    def embedding(self, name: str, rows: int, width: int) -> Embedding:
        """Returns the embedding table ``name`` in the format of the checkpoint."""
        own = self.at(name)
        return Embedding(*self._matrix(name, rows, width), None, own._arrays.get(own._join("global_scale")))

    def _matrix(
        self, name: str, rows: int, columns: int
    ) -> tuple[mx.array, mx.array | None, mx.array | None, Quantization | None]:
        """Returns weight, scales, biases and quantisation of a matrix; missing ones are None."""
        own = self.at(name)
        q = self._quantization.get(own._path)
        if q is None:
            return own.array("weight", rows, columns), None, None, None
        groups = columns // q.group_size
        weight, scales = own.array("weight", rows, columns * q.bits // 32), own.array("scales", rows, groups)
        return weight, scales, own.array("biases", rows, groups) if q.is_affine else None, q

    def _join(self, name: str | int) -> str:
        return f"{self._path}.{name}" if self._path else str(name)
