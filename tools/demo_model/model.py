"""The demo model: a Qwen3.5-MoE language model of 18 million parameters.

Of the family it keeps everything but the size: three Gated DeltaNet layers, then one of full attention, top-10 routing
with renormalised weights, one shared expert. Rows of all large matrices are multiples of 64 long, so that each can be
quantised in groups of 64.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers import Qwen3_5MoeForCausalLM, Qwen3_5MoeTextConfig

SLOWEST, FASTEST = 1e-3, 1e-1  # initial time steps of the delta rule's heads, as Mamba-2 draws them


def config(**changes: Any) -> Qwen3_5MoeTextConfig:
    """The demo model's architecture; ``changes`` override single keys."""
    values: dict[str, Any] = {
        "vocab_size": 4096,
        "hidden_size": 256,
        "num_hidden_layers": 8,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "linear_num_key_heads": 4,
        "linear_num_value_heads": 8,
        "linear_key_head_dim": 64,
        "linear_value_head_dim": 64,
        "linear_conv_kernel_dim": 4,
        "num_experts": 32,
        "num_experts_per_tok": 10,
        "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 64,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "max_position_embeddings": 4096,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        "partial_rotary_factor": 0.5,  # transformers before 5.20 writes it a second time, with a default of its own
    } | changes
    layers = values["num_hidden_layers"]
    kinds = ["full_attention" if (i + 1) % 4 == 0 else "linear_attention" for i in range(layers)]
    return Qwen3_5MoeTextConfig(**{"layer_types": kinds} | values)


def create(config: Qwen3_5MoeTextConfig, seed: int) -> Qwen3_5MoeForCausalLM:
    """A model with random float32 weights on the CPU, the same for the same seed.

    The delta rule's heads start with time constants from a token to a thousand tokens. transformers' own start forgets
    within a token: short training would spend itself on learning to remember.
    """
    torch.manual_seed(seed)
    model = Qwen3_5MoeForCausalLM(config).float()
    for layer in model.model.layers:
        if hasattr(layer, "linear_attn"):
            mixer = layer.linear_attn
            heads = mixer.dt_bias.shape[0]
            step = torch.exp(torch.empty(heads).uniform_(math.log(SLOWEST), math.log(FASTEST)))
            with torch.no_grad():
                mixer.dt_bias.copy_(torch.log(torch.expm1(step)))  # softplus of it is the time step
                mixer.A_log.copy_(torch.empty(heads).uniform_(1, 16).log())
    return model
