"""Linear layers and embeddings over stored weights, plain or quantised."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import accumulate

import mlx.core as mx

from ..formats import GLOBAL_SCALE, Quantization
from ..ops.dispatch import on_gpu
from ..ops.linear import dequantized, linear
from .module import Module

_JOIN_BYTES = 8 << 20  # on the CPU: above this, a product takes longer than its start, and a copy takes long too


class Linear(Module):
    """y = x · Wᵀ + b; with a global scale (nvfp4), W is the dequantised weight times that scale divided by the largest
    scale.

    Shape:
        x: [T, in] to y: [T, out].
    """

    def __init__(
        self,
        weight: mx.array,
        scales: mx.array | None = None,
        biases: mx.array | None = None,
        quantization: Quantization | None = None,
        bias: mx.array | None = None,
        global_scale: mx.array | None = None,
    ) -> None:
        super().__init__()
        self.weight, self.scales, self.biases, self.bias = weight, scales, biases, bias
        self.quantization = quantization
        self.global_scale = None if global_scale is None else global_scale.reshape(1)

    def __call__(self, x: mx.array) -> mx.array:
        y = linear(x, self.weight, self.scales, self.biases, self.quantization)
        if self.global_scale is not None:
            y = y * self._factor(y.dtype)
        return y if self.bias is None else y + self.bias

    def _factor(self, dtype: mx.Dtype) -> mx.array:
        assert self.global_scale is not None
        return (self.global_scale / GLOBAL_SCALE).astype(dtype)


class Linears(Module):
    """Several linear layers with the same input. Adjacent layers of the same format are multiplied as one matrix.

    Shape:
        x: [T, in] to one [T, out_i] per layer.

    Args:
        join: whether weights may be copied into one matrix.
    """

    def __init__(self, layers: Sequence[Linear], *, join: bool = True) -> None:
        super().__init__()
        self.groups: list[Linear] = []
        self._ends: list[list[int]] = []
        for members in _groups(layers) if join else [[layer] for layer in layers]:
            self.groups.append(members[0] if len(members) == 1 else _joined(members))
            self._ends.append(list(accumulate(layer.weight.shape[0] for layer in members)))

    def __call__(self, x: mx.array) -> list[mx.array]:
        outputs: list[mx.array] = []
        for layer, ends in zip(self.groups, self._ends, strict=True):
            y = layer(x)
            outputs += [y] if len(ends) == 1 else mx.split(y, ends[:-1], axis=-1)
        return outputs

    def together(self, x: mx.array) -> mx.array:
        """Returns all outputs joined along the last axis, [T, Σ out_i]."""
        outputs = [layer(x) for layer in self.groups]
        return mx.concatenate(outputs, axis=-1) if len(outputs) > 1 else outputs[0]


def _groups(layers: Sequence[Linear]) -> list[list[Linear]]:
    """Groups adjacent layers with the same format, unless copying them takes longer than it saves."""
    limit = sys.maxsize if on_gpu() else _JOIN_BYTES
    groups: list[list[Linear]] = []
    for layer in layers:
        last = groups[-1] if groups else []
        alike = last and layer.global_scale is None and _storage(last[0]) == _storage(layer)
        if alike and sum(member.weight.nbytes for member in [*last, layer]) <= limit:
            last.append(layer)
        else:
            groups.append([layer])
    return groups


def _storage(layer: Linear) -> tuple[Quantization | None, bool, bool, mx.Dtype]:
    return layer.quantization, layer.bias is None, layer.global_scale is None, layer.weight.dtype


def _joined(layers: Sequence[Linear]) -> Linear:
    """Returns one layer with the rows of all layers."""
    weight = mx.concatenate([layer.weight for layer in layers])
    scales, biases, bias = (
        None if getattr(layers[0], name) is None else mx.concatenate([getattr(layer, name) for layer in layers])
        for name in ("scales", "biases", "bias")
    )
    return Linear(weight, scales, biases, layers[0].quantization, bias)


class Embedding(Linear):
    """A table of token vectors. As a linear layer, it is the tied output head."""

    def rows(self, ids: mx.array, dtype: mx.Dtype) -> mx.array:
        """Returns the vectors of token ids: [T] int32 to [T, H] in ``dtype``."""
        if self.quantization is None or self.scales is None:
            return self.weight[ids].astype(dtype)
        scales, biases = self.scales[ids], None
        if self.biases is not None:  # affine: scales are floats too
            scales, biases = scales.astype(dtype), self.biases[ids].astype(dtype)
        rows = dequantized(self.weight[ids], scales, biases, self.quantization, dtype)
        return rows if self.global_scale is None else rows * self._factor(dtype)
