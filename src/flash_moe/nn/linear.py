"""Linear layers and embeddings over stored weights, plain or quantised."""

from __future__ import annotations

import mlx.core as mx
from mlx import nn

from ..ops.linear import linear
from ..record import Quantization


class Linear(nn.Module):
    """y = x · Wᵀ + b.

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
    ) -> None:
        super().__init__()
        self.weight, self.scales, self.biases, self.bias = weight, scales, biases, bias
        self.quantization = quantization

    def __call__(self, x: mx.array) -> mx.array:
        y = linear(x, self.weight, self.scales, self.biases, self.quantization)
        return y if self.bias is None else y + self.bias


class Embedding(Linear):
    """A table of token vectors; as a linear layer it is the tied output head."""

    def rows(self, ids: mx.array) -> mx.array:
        """The vectors of token ids: [T] int32 to [T, H]."""
        if (q := self.quantization) is None or self.scales is None or self.biases is None:
            return self.weight[ids]
        return mx.dequantize(self.weight[ids], self.scales[ids], self.biases[ids], group_size=q.group_size, bits=q.bits)
