"""The dimensions of our own network; nothing but the network and the families that run on it knows them."""

from __future__ import annotations

from dataclasses import dataclass

from .record import ExpertShape
from .rope import Yarn, frequencies

FULL_ATTENTION, LINEAR_ATTENTION = "full_attention", "linear_attention"


@dataclass(frozen=True)
class ModelConfig:
    """Dimensions and switches of the network, named as in Qwen3.5's config.json.

    Attributes:
        layer_types: per layer, ``"linear_attention"`` (Gated DeltaNet) or ``"full_attention"``.
        sparse_layers: per layer, whether its MLP is a Mixture of Experts (else dense SwiGLU).
        rotary_dims: leading dimensions of each head that RoPE turns.
        yarn: how RoPE is stretched for long contexts; None if it is not.
        num_experts_per_tok: the model's own top-k.
        norm_topk_prob: whether the K routing weights are renormalised to sum to one.
        max_position_embeddings: the longest context in tokens, that of YaRN included.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    layer_types: tuple[str, ...]
    sparse_layers: tuple[bool, ...]
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rotary_dims: int
    rope_theta: float
    yarn: Yarn | None
    attention_bias: bool
    linear_num_key_heads: int
    linear_num_value_heads: int
    linear_key_head_dim: int
    linear_value_head_dim: int
    linear_conv_kernel_dim: int
    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    shared_expert_intermediate_size: int
    intermediate_size: int
    norm_topk_prob: bool
    rms_norm_eps: float
    tie_word_embeddings: bool
    max_position_embeddings: int

    @property
    def experts(self) -> ExpertShape:
        """What the routed experts are like."""
        layers = tuple(i for i, sparse in enumerate(self.sparse_layers) if sparse)
        return ExpertShape(
            self.num_experts, self.num_experts_per_tok, self.hidden_size, self.moe_intermediate_size, layers
        )

    @property
    def key_dim(self) -> int:
        """Width of all DeltaNet keys of one token."""
        return self.linear_num_key_heads * self.linear_key_head_dim

    @property
    def value_dim(self) -> int:
        """Width of all DeltaNet values of one token."""
        return self.linear_num_value_heads * self.linear_value_head_dim

    @property
    def rope_frequencies(self) -> tuple[float, ...]:
        """[rotary_dims / 2] radians per position of RoPE."""
        return frequencies(self.rotary_dims, self.rope_theta, self.yarn)
