"""Gated DeltaNet: linear attention with a short convolution and a recurrent state."""

from __future__ import annotations

import mlx.core as mx
from mlx import nn

from ..config import ModelConfig
from ..ops.causal_conv import causal_conv
from ..ops.gated_delta import gated_delta
from .cache import DeltaCache
from .weights import Weights

_L2_EPS = 1e-6  # added to the sum of squares of q and k, as transformers' l2norm does


class GatedDeltaNet(nn.Module):
    """out_proj(norm(gated_delta(conv(qkv))) · silu(z)).

    Shape:
        x: [T, H] to [T, H].

    Source: transformers, ``Qwen3_5MoeGatedDeltaNet``.
    """

    def __init__(self, config: ModelConfig, weights: Weights) -> None:
        super().__init__()
        hidden, heads = config.hidden_size, config.linear_num_value_heads
        channels = 2 * config.key_dim + config.value_dim
        self.in_proj_qkv = weights.linear("in_proj_qkv", channels, hidden)
        self.in_proj_z = weights.linear("in_proj_z", config.value_dim, hidden)
        self.in_proj_b = weights.linear("in_proj_b", heads, hidden)
        self.in_proj_a = weights.linear("in_proj_a", heads, hidden)
        self.out_proj = weights.linear("out_proj", hidden, config.value_dim)
        self.conv1d = weights.array("conv1d.weight", config.linear_conv_kernel_dim, channels)
        self.dt_bias = weights.array("dt_bias", heads)
        self.decay_rate = mx.exp(weights.array("A_log", heads))
        self.norm = weights.array("norm.weight", config.linear_value_head_dim)
        self._config = config

    def __call__(self, x: mx.array, cache: DeltaCache) -> mx.array:
        c, tokens = self._config, x.shape[0]
        qkv, cache.conv = causal_conv(self.in_proj_qkv(x), self.conv1d, cache.conv)
        q, k, v = mx.split(qkv, [c.key_dim, 2 * c.key_dim], axis=-1)
        q = q.reshape(tokens, c.linear_num_key_heads, c.linear_key_head_dim)
        k = k.reshape(tokens, c.linear_num_key_heads, c.linear_key_head_dim)
        v = v.reshape(tokens, c.linear_num_value_heads, c.linear_value_head_dim)
        scale = c.linear_key_head_dim**-0.5
        q = scale**2 * mx.fast.rms_norm(q, None, _L2_EPS * scale**2)  # L2 norm, and the 1/sqrt(Dk) of attention
        k = scale * mx.fast.rms_norm(k, None, _L2_EPS * scale**2)
        dt = nn.softplus(self.in_proj_a(x).astype(mx.float32) + self.dt_bias)
        beta = mx.sigmoid(self.in_proj_b(x))
        y, cache.state = gated_delta(q, k, v, mx.exp(-self.decay_rate * dt), beta, cache.state)
        y = mx.fast.rms_norm(y, self.norm, c.rms_norm_eps).reshape(tokens, c.value_dim)
        z = self.in_proj_z(x).astype(mx.float32)
        return self.out_proj((y * (z * mx.sigmoid(z))).astype(x.dtype))
