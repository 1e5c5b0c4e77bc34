"""The mixers of the decoder with NumPy arrays and the CPU kernels, for one or many tokens.

Weights and caches stay in the memory of the modules of :mod:`flash_moe.nn`. MLX computes nothing here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, zip_longest

import mlx.core as mx
import numpy as np

from ..config import ModelConfig
from ..dtypes import NAMES
from ..ops.cpu.attention import Attention
from ..ops.cpu.experts import Swiglu
from ..ops.cpu.formats import Format
from ..ops.cpu.gated_delta import GatedDelta
from ..ops.cpu.memory import aligned, view
from ..ops.cpu.products import Matrix, Products
from ..ops.cpu.workers import Workers
from .attention import GatedAttention
from .cache import DeltaCache, KVCache
from .gated_delta_net import L2_EPS, GatedDeltaNet
from .linear import Linear
from .mlp import SwiGLU


@dataclass
class Pass:
    """The state of one forward pass over T tokens, and work memory that all layers share.

    Attributes:
        counts: number of tokens of each sequence. Their rows follow each other.
        turns: [T, 2, rotary / 2] float32, cosines and sines of the angles of the positions.
        tokens: the number of tokens T.
    """

    counts: Sequence[int]
    turns: np.ndarray
    _rooms: dict[tuple[str, int], np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.tokens = sum(self.counts)

    def room(self, name: str, columns: int) -> np.ndarray:
        """Returns work memory, [T, columns] float32, with arbitrary content."""
        if (room := self._rooms.get((name, columns))) is None:
            room = self._rooms[name, columns] = aligned(self.tokens, columns)
        return room


class Weights:
    """Describes stored weights for kernels, and keeps the memory behind their addresses alive."""

    def __init__(self, workers: Workers) -> None:
        self.workers = workers
        self._keep: list[np.ndarray] = []

    def matrix(self, layer: Linear) -> Matrix:
        """Returns the matrix of a linear layer, in place."""
        q = layer.quantization
        held = layer.weight, layer.scales, layer.biases, layer.global_scale
        parts = [part for part in held if part is not None]
        arrays = [view(part) for part in parts]
        self._keep += arrays
        places = [array.ctypes.data for array in arrays] + [0, 0]
        dtype = NAMES[(layer.weight if layer.scales is None else layer.scales).dtype]
        fmt = Format.of(dtype, q, layer.global_scale is not None)
        rows, words = layer.weight.shape
        columns = words * 32 // q.bits if q else words
        return Matrix(fmt, rows, columns, (places[0], places[1], places[2]))

    def products(self, layers: Sequence[Linear]) -> Products:
        """Returns the products of linear layers with the same input."""
        return Products([self.matrix(layer) for layer in layers], self.workers)

    def swiglu(self, mlp: SwiGLU) -> Swiglu:
        """Returns the three matrices of an MLP."""
        gate, up = (self.matrix(layer) for layer in mlp.gate_up_proj.groups)
        return Swiglu(gate, up, self.matrix(mlp.down_proj))


class DeltaMixer:
    """Computes y += GatedDeltaNet(h); see :class:`~.gated_delta_net.GatedDeltaNet`."""

    def __init__(self, config: ModelConfig, layer: GatedDeltaNet, weights: Weights) -> None:
        self._in, self._out = weights.products(layer.in_proj.groups), weights.products([layer.out_proj])
        constants = (view(a.astype(mx.float32)) for a in (layer.conv1d, layer.log_decay, layer.dt_bias, layer.norm))
        self._delta = GatedDelta(
            *constants, key_heads=config.linear_num_key_heads, key_dim=config.linear_key_head_dim, l2_eps=L2_EPS,
            eps=config.rms_norm_eps, workers=weights.workers,
        )  # fmt: skip

    def __call__(self, h: np.ndarray, y: np.ndarray, caches: Sequence[DeltaCache], run: Pass) -> None:
        proj = self._in(h, run.room("projections", self._in.rows))
        out = run.room("mixed", self._out.columns)
        spans = [cache.spans(count) for cache, count in zip(caches, run.counts, strict=True)]
        firsts = [end - count for end, count in zip(accumulate(run.counts), run.counts, strict=True)]
        for several in zip_longest(*spans):  # the next span of a sequence needs the states after the previous one
            parts = []
            for i, tokens in enumerate(several):
                if tokens:
                    parts.append((firsts[i], firsts[i] + tokens, *caches[i].in_place(tokens)))
                    firsts[i] += tokens
            self._delta(proj, out, parts)
            for cache, tokens in zip(caches, several, strict=True):
                if tokens:
                    cache.changed()
        self._out(out, y, add=True)


class AttentionMixer:
    """Computes y += attention(h); see :class:`~.attention.GatedAttention`."""

    def __init__(self, config: ModelConfig, layer: GatedAttention, weights: Weights) -> None:
        inputs = layer.qkv_proj.groups
        self._in, self._out = weights.products(inputs), weights.products([layer.o_proj])
        self._bias, self._out_bias = bias_of(inputs), bias_of([layer.o_proj])
        norms = (view(norm.astype(mx.float32)) for norm in (layer.q_norm, layer.k_norm))
        self._attention = Attention(
            *norms, heads=config.num_attention_heads, kv_heads=config.num_key_value_heads, rotary=config.rotary_dims,
            eps=config.rms_norm_eps, workers=weights.workers,
        )  # fmt: skip

    def __call__(self, h: np.ndarray, y: np.ndarray, caches: Sequence[KVCache], run: Pass) -> None:
        proj = self._in(h, run.room("projections", self._in.rows))
        out = run.room("mixed", self._out.columns)
        if self._bias is not None:
            proj += self._bias
        if self._out_bias is not None:
            y += self._out_bias
        parts, first = [], 0
        for cache, count in zip(caches, run.counts, strict=True):
            before = cache.length
            parts.append((first, first + count, *cache.extend(count), before))
            first += count
        self._attention(proj, run.turns, out, parts)
        self._out(out, y, add=True)


def bias_of(layers: Sequence[Linear]) -> np.ndarray | None:
    """Returns the joined biases of linear layers with the same input; None if they have none."""
    biases = [view(layer.bias.astype(mx.float32)) for layer in layers if layer.bias is not None]
    return np.concatenate(biases) if biases else None
