"""Full attention with per-head norms, partial rotary embedding and an output gate."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import mlx.core as mx

from ..config import ModelConfig
from ..ops.attention import attention
from ..ops.decode_attention import cache_sizes, decode_attention_kernel, supports
from ..ops.dispatch import use_kernel
from ..ops.norm import rms_norm
from ..ops.qk_norm_rope import place, qk_norm_rope_kernel
from .cache import KVCache
from .module import Module
from .weights import Weights


class GatedAttention(Module):
    """o_proj(attention(rope(norm(q)), rope(norm(k)), v) · sigmoid(gate)); q_proj returns [query, gate] per head.

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
        widths = {"q_proj": 2 * heads * dim, "k_proj": kv_heads * dim, "v_proj": kv_heads * dim}
        self.qkv_proj = weights.linears(widths, hidden, bias=bias)
        self.o_proj = weights.linear("o_proj", hidden, heads * dim, bias=bias)
        self.q_norm = weights.array("q_norm.weight", dim)
        self.k_norm = weights.array("k_norm.weight", dim)
        self._heads, self._kv_heads, self._dim = heads, kv_heads, dim
        self._config, self._frequencies = config, config.rope_frequencies
        self._periods: mx.array | None = None  # [rotary_dims / 2] positions per radian; None for plain RoPE
        if config.yarn is not None:
            self._periods = 1.0 / mx.array(self._frequencies)
            # A rotation commutes with a scalar factor, so the norm can apply that factor to the rotated elements.
            turned = mx.arange(dim) < config.rotary_dims
            factors = mx.where(turned, mx.array(config.yarn.attention_factor), mx.array(1.0))
            self.q_norm, self.k_norm = (
                (norm.astype(mx.float32) * factors).astype(norm.dtype) for norm in (self.q_norm, self.k_norm)
            )

    def __call__(self, x: mx.array, cache: KVCache) -> mx.array:
        tokens = x.shape[0]
        if tokens == 1 and self.uses_kernels():
            q, keys, values, gate = self.heads(x, place(cache.length, 1))
            cache.append(keys, values)
            return self.attend(q, gate, cache.keys, cache.values, cache_sizes(cache.length, cache.keys))
        q, keys, values, gate = self.project(x, cache.length)
        return self.output(self.look(q, *cache.append(keys, values)), gate)

    def together(self, x: mx.array, caches: Sequence[KVCache], counts: Sequence[int]) -> mx.array:
        """Runs tokens of several sequences as :meth:`__call__` does; the rows of the sequences follow each other.

        Args:
            counts: number of tokens of each sequence in x.
        """
        qk, v, gate = self._normed(x)
        ends, outputs = list(accumulate(counts))[:-1], []
        for cache, own, values in zip(caches, mx.split(qk, ends, axis=2), mx.split(v, ends, axis=2), strict=True):
            own = self._turned(own, cache.length)
            keys, values = cache.append(own[:, self._heads :], values)
            outputs.append(self.look(own.squeeze(0)[: self._heads], keys, values))
        return self.output(mx.concatenate(outputs, axis=1), gate)

    def project(self, x: mx.array, start: int | mx.array) -> tuple[mx.array, mx.array, mx.array, mx.array]:
        """Returns query [Hq, T, D], key and value [1, Hkv, T, D], and gate [T, Hq, D] of tokens, by MLX's ops."""
        qk, v, gate = self._normed(x)
        qk = self._turned(qk, start)
        return qk.squeeze(0)[: self._heads], qk[:, self._heads :], v, gate

    def _normed(self, x: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """Returns query and key heads before the rotation, [1, Hq + Hkv, T, D]; values [1, Hkv, T, D]; and gate [T, Hq,
        D].
        """
        tokens, eps = x.shape[0], self._config.rms_norm_eps
        q, k, v = self.qkv_proj(x)
        q, gate = q.reshape(1, tokens, self._heads, 2 * self._dim).split(2, axis=-1)
        k = k.reshape(1, tokens, self._kv_heads, self._dim)
        v = v.reshape(1, tokens, self._kv_heads, self._dim).swapaxes(1, 2)
        qk = mx.concatenate([rms_norm(q, self.q_norm, eps), rms_norm(k, self.k_norm, eps)], axis=2).swapaxes(1, 2)
        return qk, v, gate.squeeze(0)

    def _turned(self, qk: mx.array, start: int | mx.array) -> mx.array:
        base = self._config.rope_theta if self._periods is None else None
        return mx.fast.rope(
            qk, self._config.rotary_dims, traditional=False, base=base, scale=1.0, offset=start, freqs=self._periods
        )

    def look(self, q: mx.array, keys: mx.array, values: mx.array) -> mx.array:
        """Returns the attention [Hq, T, D] of queries from :meth:`project` over all keys and values [1, Hkv, S, D]."""
        return attention(q, keys.squeeze(0), values.squeeze(0), self._dim**-0.5)  # an index would copy

    def output(self, y: mx.array, gate: mx.array) -> mx.array:
        """Returns the output of the layer, from the result of :meth:`look`."""
        y = y.swapaxes(0, 1) * mx.sigmoid(gate)
        return self.o_proj(y.reshape(y.shape[0], self._heads * self._dim))

    def uses_kernels(self) -> bool:
        """Returns whether a single token runs through the kernels :meth:`heads` and :meth:`attend`."""
        sizes = self._heads, self._kv_heads, self._dim, self._config.rotary_dims, self.q_norm.dtype
        return supports(*sizes[:3]) and use_kernel("attention", *sizes)

    def heads(self, x: mx.array, place: mx.array) -> tuple[mx.array, mx.array, mx.array, mx.array]:
        """Returns query [Hq, 1, D], key and value [1, Hkv, 1, D], and gate [1, Hq · D] of one token, by kernels."""
        q, k, v = self.qkv_proj(x)
        q, k, gate = qk_norm_rope_kernel(
            q, k, self.q_norm, self.k_norm, place=place, frequencies=self._frequencies, eps=self._config.rms_norm_eps
        )
        return q, k[None], v.reshape(1, self._kv_heads, 1, self._dim), gate

    def attend(self, q: mx.array, gate: mx.array, keys: mx.array, values: mx.array, sizes: mx.array) -> mx.array:
        """Returns the output of the layer, after key and value are in the cache."""
        return self.o_proj(decode_attention_kernel(q, keys, values, sizes, gate, self._dim**-0.5))
