"""Full attention with per-head norms, partial rotary embedding and an output gate."""

from __future__ import annotations

import mlx.core as mx
from mlx import nn

from ..config import ModelConfig
from ..ops.attention import attention
from .cache import KVCache
from .weights import Weights


class GatedAttention(nn.Module):
    """o_proj(attention(rope(norm(q)), rope(norm(k)), v) · sigmoid(gate)); q_proj yields [query, gate] per head.

    Shape:
        x: [T, H] to [T, H].

    Source: transformers, ``Qwen3_5MoeAttention``.
    """

    def __init__(self, config: ModelConfig, weights: Weights) -> None:
        super().__init__()
        heads, kv_heads, dim, hidden = (
            config.num_attention_heads, config.num_key_value_heads, config.head_dim, config.hidden_size
        )  # fmt: skip
        bias = config.attention_bias
        self.q_proj = weights.linear("q_proj", 2 * heads * dim, hidden, bias=bias)
        self.k_proj = weights.linear("k_proj", kv_heads * dim, hidden, bias=bias)
        self.v_proj = weights.linear("v_proj", kv_heads * dim, hidden, bias=bias)
        self.o_proj = weights.linear("o_proj", hidden, heads * dim, bias=bias)
        self.q_norm = weights.array("q_norm.weight", dim)
        self.k_norm = weights.array("k_norm.weight", dim)
        self._heads, self._kv_heads, self._dim = heads, kv_heads, dim
        self._config = config

    def __call__(self, x: mx.array, cache: KVCache) -> mx.array:
        tokens = x.shape[0]
        q, gate = self.q_proj(x).reshape(1, tokens, self._heads, 2 * self._dim).split(2, axis=-1)
        k = self.k_proj(x).reshape(1, tokens, self._kv_heads, self._dim)
        v = self.v_proj(x).reshape(1, tokens, self._kv_heads, self._dim).swapaxes(1, 2)
        start = cache.length
        q = self._rotated(q, self.q_norm, start)
        keys, values = cache.append(self._rotated(k, self.k_norm, start), v)
        y = attention(q[0], keys[0], values[0], self._dim**-0.5)  # [Hq, T, D]
        y = y.swapaxes(0, 1) * mx.sigmoid(gate[0])
        return self.o_proj(y.reshape(tokens, self._heads * self._dim))

    def _rotated(self, heads: mx.array, norm: mx.array, start: int) -> mx.array:
        """Normalises each head of [1, T, heads, D], then turns its leading dimensions: [1, heads, T, D]."""
        config = self._config
        heads = mx.fast.rms_norm(heads, norm, config.rms_norm_eps).swapaxes(1, 2)
        return mx.fast.rope(
            heads, config.rotary_dims, traditional=False, base=config.rope_theta, scale=1.0, offset=start
        )
