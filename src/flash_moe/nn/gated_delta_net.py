"""Gated DeltaNet: linear attention with a short convolution and a recurrent state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from ..config import ModelConfig
from ..ops.delta_net import delta_net, delta_net_of_each
from ..ops.delta_net_step import delta_net_step_kernel, pack_constants, supports
from ..ops.dispatch import use_kernel
from .cache import DeltaCache
from .module import Module
from .weights import Weights

L2_EPS = 1e-6  # added to the sum of squares of q and k, as in transformers' l2norm


class GatedDeltaNet(Module):
    """out_proj(norm(gated_delta(conv(qkv))) · silu(z)).

    Shape:
        x: [T, H] to [T, H].

    Source: transformers, ``Qwen3_5MoeGatedDeltaNet``.
    """

    def __init__(self, config: ModelConfig, weights: Weights) -> None:
        super().__init__()
        hidden, heads = config.hidden_size, config.linear_num_value_heads
        channels = 2 * config.key_dim + config.value_dim
        self.in_proj = weights.linears(
            {"in_proj_qkv": channels, "in_proj_z": config.value_dim, "in_proj_b": heads, "in_proj_a": heads}, hidden
        )
        self.out_proj = weights.linear("out_proj", hidden, config.value_dim)
        self.conv1d = weights.array("conv1d.weight", config.linear_conv_kernel_dim, channels)
        self.dt_bias = weights.array("dt_bias", heads)
        self.log_decay = -mx.exp(weights.array("A_log", heads))
        self.norm = weights.array("norm.weight", config.linear_value_head_dim)
        self.qk_scale = mx.array([config.linear_key_head_dim**-0.5, 1.0], dtype=self.conv1d.dtype)[:, None, None]
        epsilons = {"l2_eps": L2_EPS, "eps": config.rms_norm_eps}
        self.constants = pack_constants(self.log_decay, self.dt_bias, self.norm, **epsilons)
        self._config = config

    def __call__(self, x: mx.array, cache: DeltaCache) -> mx.array:
        if x.shape[0] > 1:
            return self.together(x, [cache], [x.shape[0]])
        y, conv, state = self.step(x, cache.conv, cache.state)
        cache.advance(1, conv, state)
        return y

    def together(self, x: mx.array, caches: Sequence[DeltaCache], counts: Sequence[int]) -> mx.array:
        """Runs tokens of several sequences as :meth:`__call__` does; the rows of the sequences follow each other.

        Args:
            counts: number of tokens of each sequence in x.
        """
        projected = self.in_proj(x)
        if len(caches) > 1 and max(counts) == 1:
            qkv, z, b, a = projected
            convs, states = [cache.conv for cache in caches], [cache.state for cache in caches]
            y, convs, states = delta_net_of_each(qkv, z, b, a, convs, states, **self._options)
            for cache, conv, state in zip(caches, convs, states, strict=True):
                cache.advance(1, conv, state)
            return self.out_proj(y)
        outputs, start = [], 0
        for cache, count in zip(caches, counts, strict=True):
            for span in cache.spans(count):
                qkv, z, b, a = (array[start : start + span] for array in projected)
                y, conv, state = delta_net(qkv, z, b, a, cache.conv, cache.state, **self._options)
                cache.advance(span, conv, state)
                outputs.append(y)
                start += span
        return self.out_proj(outputs[0] if len(outputs) == 1 else mx.concatenate(outputs))

    def step(self, x: mx.array, conv: mx.array, state: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """Computes the layer as a function of its states.

        Returns the output, the new conv state and the new recurrent state.
        """
        c, (heads, dv, dk) = self._config, state.shape
        sizes = c.linear_num_key_heads, heads, dk, dv, self.conv1d.shape[0], x.dtype
        if x.shape[0] == 1 and supports(dk) and use_kernel("delta_net", *sizes):
            y, conv, state = delta_net_step_kernel(
                self.in_proj.together(x), conv, state, conv_weight=self.conv1d, constants=self.constants,
                key_heads=c.linear_num_key_heads,
            )  # fmt: skip
            return self.out_proj(y), conv, state
        qkv, z, b, a = self.in_proj(x)
        y, conv, state = delta_net(qkv, z, b, a, conv, state, **self._options)
        return self.out_proj(y), conv, state

    @property
    def _options(self) -> dict[str, Any]:
        return {
            "conv_weight": self.conv1d, "qk_scale": self.qk_scale, "log_decay": self.log_decay, "dt_bias": self.dt_bias,
            "norm_weight": self.norm, "l2_eps": L2_EPS, "eps": self._config.rms_norm_eps,
        }  # fmt: skip
