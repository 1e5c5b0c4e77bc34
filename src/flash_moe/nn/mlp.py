"""SwiGLU: down(silu(gate · x) · up · x)."""

from __future__ import annotations

import mlx.core as mx

from .module import Module
from .weights import Weights


class SwiGLU(Module):
    """The shared expert, or the MLP of a layer without routed experts.

    Shape:
        x: [T, H] to [T, H].
    """

    def __init__(self, hidden_size: int, intermediate_size: int, weights: Weights) -> None:
        super().__init__()
        self.gate_up_proj = weights.linears({"gate_proj": intermediate_size, "up_proj": intermediate_size}, hidden_size)
        self.down_proj = weights.linear("down_proj", hidden_size, intermediate_size)

    def __call__(self, x: mx.array) -> mx.array:
        gate, up = self.gate_up_proj(x)
        return self.down_proj(gate * mx.sigmoid(gate) * up)
