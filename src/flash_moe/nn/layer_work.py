"""The work of a layer in addition to its weights: bytes of its cache, and operations."""

from __future__ import annotations

from dataclasses import dataclass

from ..config import FULL_ATTENTION, ModelConfig


@dataclass(frozen=True)
class LayerWork:
    """The work of a layer. It depends only on the mixer and on whether the layer has routed experts.

    Attributes:
        mixer: name of the mixer.
        sparse: whether the layer has routed experts, which are not counted here.
        kv_per_token: bytes of keys and values per token.
        state: bytes of the cache that do not grow with the context.
        flops: operations per token in products.
        pair_flops: operations per pair of token and key; 0 if the mixer is not attention.
    """

    mixer: str
    sparse: bool
    kv_per_token: int
    state: int
    flops: float
    pair_flops: float


def layer_work(config: ModelConfig, layer: int, float_bytes: int) -> LayerWork:
    """Computes the work of a layer.

    Args:
        float_bytes: bytes of a float in activations.
    """
    c, mixer, sparse = config, config.layer_types[layer], config.sparse_layers[layer]
    rows = 3 * c.shared_expert_intermediate_size + c.num_experts + 1 if sparse else 3 * c.intermediate_size
    if mixer == FULL_ATTENTION:
        rows += (3 * c.num_attention_heads + 2 * c.num_key_value_heads) * c.head_dim
        kv, pair = 2 * c.num_key_value_heads * c.head_dim * float_bytes, 4.0 * c.num_attention_heads * c.head_dim
        return LayerWork(mixer, sparse, kv, 0, 2.0 * c.hidden_size * rows, pair)
    rows += 2 * c.key_dim + 3 * c.value_dim + 2 * c.linear_num_value_heads
    state = 4 * c.value_dim * c.linear_key_head_dim
    state += (c.linear_conv_kernel_dim - 1) * (2 * c.key_dim + c.value_dim) * float_bytes
    return LayerWork(mixer, sparse, 0, state, 2.0 * c.hidden_size * rows, 0.0)
