"""The dimensions of our own network. Only the network and the model families that run on it use them."""

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
        rotary_dims: number of leading dimensions of each head that RoPE rotates.
        yarn: parameters of YaRN, which extends RoPE to long contexts; None for plain RoPE.
        num_experts_per_tok: the model's own K.
        norm_topk_prob: whether the K routing weights are renormalised to sum to one.
        max_position_embeddings: the longest context in tokens, including the extension by YaRN.
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
        """The number and sizes of the routed experts, and the layers that have them."""
        layers = tuple(i for i, sparse in enumerate(self.sparse_layers) if sparse)
        return ExpertShape(
            self.num_experts, self.num_experts_per_tok, self.hidden_size, self.moe_intermediate_size, layers
        )

    def used(self, canonical: str | None) -> str | None:
        """Returns a weight's name; None for further layers, for a separate head if the embeddings are the head, and for
        parts that the network does not have.
        """
        first, _, rest = (canonical or "").partition(".")
        number = rest.partition(".")[0]
        further = first == "layers" and number.isdecimal() and int(number) >= self.num_hidden_layers
        own = {"embed_tokens", "layers", "norm"} | ({"lm_head"} if not self.tie_word_embeddings else set())
        return canonical if first in own and not further else None

    @property
    def key_dim(self) -> int:
        """The total width of the DeltaNet keys of one token."""
        return self.linear_num_key_heads * self.linear_key_head_dim

    @property
    def value_dim(self) -> int:
        """The total width of the DeltaNet values of one token."""
        return self.linear_num_value_heads * self.linear_value_head_dim

    @property
    def rope_frequencies(self) -> tuple[float, ...]:
        """The [rotary_dims / 2] angles of RoPE, in radians per position."""
        return frequencies(self.rotary_dims, self.rope_theta, self.yarn)
