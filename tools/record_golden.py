"""Records what transformers computes for small random models, as golden files for the tests.

    pip install torch transformers
    python tools/record_golden.py

Weights come from random_checkpoint.py with a seed, so a golden file holds only token ids and float32 logits.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from random_checkpoint import next_config, random_weights, text_config

GOLDEN = Path(__file__).parent.parent / "tests" / "golden"
TOKENS = 21  # not a multiple of anything

YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
OPTIONS = {"beta_fast": 8.0, "beta_slow": 2, "truncate": False, "mscale": 1.5, "mscale_all_dim": 0.5}
CASES: dict[str, dict[str, Any]] = {
    "default": text_config(),
    "one-layer": text_config(num_hidden_layers=1),
    "one-attention-layer": text_config(num_hidden_layers=1, full_attention_interval=1),
    "odd-layers-tied": text_config(num_hidden_layers=5, full_attention_interval=2, tie_word_embeddings=True),
    "one-expert": text_config(num_hidden_layers=2, num_experts=1, num_experts_per_tok=1),
    "two-experts-k1": text_config(num_hidden_layers=3, num_experts=2, num_experts_per_tok=1),
    "many-experts-k10": text_config(num_hidden_layers=3, num_experts=64, num_experts_per_tok=10),
    "odd-experts-k7": text_config(num_hidden_layers=3, num_experts=13, num_experts_per_tok=7),
    "gqa-8-to-1": text_config(num_attention_heads=8, num_key_value_heads=1, head_dim=16),
    "mha": text_config(num_attention_heads=4, num_key_value_heads=4, head_dim=16),
    "wide-rope": text_config(rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}),
    "delta-heads-1-to-3": text_config(linear_num_key_heads=1, linear_num_value_heads=3, linear_key_head_dim=16),
    "delta-uneven": text_config(linear_key_head_dim=32, linear_value_head_dim=16, linear_conv_kernel_dim=3),
    "shared-differs": text_config(shared_expert_intermediate_size=32, moe_intermediate_size=96),
    "attention-bias": text_config(attention_bias=True, full_attention_interval=2),
    "next": next_config(),
    "next-tied-dense-layer": next_config(tie_word_embeddings=True, mlp_only_layers=[1], num_experts_per_tok=3),
    "next-no-renormalise": next_config(norm_topk_prob=False, num_experts=8, linear_num_value_heads=6),
    "yarn": text_config(full_attention_interval=2, rope_parameters=YARN | {"partial_rotary_factor": 1.0}),
    "yarn-beside": text_config(full_attention_interval=2, partial_rotary_factor=0.5, rope_scaling=YARN | OPTIONS),
    "yarn-next": next_config(
        full_attention_interval=2, rope_theta=1e5, partial_rotary_factor=0.5,
        rope_scaling={"type": "yarn", "factor": 8.0, "original_max_position_embeddings": 48, "attention_factor": 0.9},
    ),
}  # fmt: skip
QWEN = {"rope_type": "yarn", "rope_theta": 1e7, "partial_rotary_factor": 0.25, "factor": 4.0}
FREQUENCIES: dict[str, dict[str, Any]] = {  # sections of models with heads of 256 and a context of 262,144
    "Qwen3.5": QWEN | {"original_max_position_embeddings": 262144},
    "no original context": QWEN,
    "no factor": QWEN | {"factor": None, "original_max_position_embeddings": 32768},
    "no truncation": QWEN | {"original_max_position_embeddings": 40960, "truncate": False},
    "betas": QWEN | {"original_max_position_embeddings": 32768, "beta_fast": 64, "beta_slow": 3},
    "ramp of no width": QWEN
    | {"original_max_position_embeddings": 512, "beta_fast": 1, "beta_slow": 1, "truncate": False},
    "ramp outside": QWEN | {"original_max_position_embeddings": 8, "factor": 40.0},
    "attention factor": QWEN | {"original_max_position_embeddings": 262144, "attention_factor": 1.3},
    "mscale": QWEN | {"original_max_position_embeddings": 262144, "mscale": 0.707, "mscale_all_dim": 1.0},
    "half of mscale": QWEN | {"original_max_position_embeddings": 262144, "mscale": 0.707, "mscale_all_dim": 0},
    "factor 1": QWEN | {"original_max_position_embeddings": 262144, "factor": 1.0},
    "whole heads": QWEN | {"original_max_position_embeddings": 4096, "partial_rotary_factor": 1.0, "rope_theta": 1e4},
}


def tokens_of(case: str) -> list[int]:
    """The token ids of a case."""
    random = np.random.RandomState(list(CASES).index(case))
    return random.randint(0, CASES[case]["vocab_size"], TOKENS).tolist()


def record(case: str) -> np.ndarray:
    """Logits [T, V] float32 of transformers' model."""
    import torch
    from transformers import Qwen3_5MoeForCausalLM, Qwen3_5MoeTextConfig, Qwen3NextConfig, Qwen3NextForCausalLM

    text = CASES[case]
    if text["model_type"] == "qwen3_next":
        config, model_class = Qwen3NextConfig(**text), Qwen3NextForCausalLM
    else:
        config, model_class = Qwen3_5MoeTextConfig(**text), Qwen3_5MoeForCausalLM
    config._attn_implementation = "eager"
    model = model_class(config).eval()
    weights = {
        (name if name.startswith("lm_head") else "model." + name): torch.from_numpy(value)
        for name, value in random_weights(text, seed=0).items()
    }
    if text["tie_word_embeddings"]:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    model.load_state_dict(weights, strict=True)
    with torch.no_grad():
        return model(torch.tensor([tokens_of(case)]), use_cache=False).logits[0].numpy()


def record_frequencies(rope: dict[str, Any]) -> dict[str, Any]:
    """Frequencies [dims / 2] and attention factor of transformers, for a section of config.json."""
    from transformers import Qwen3_5MoeTextConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = Qwen3_5MoeTextConfig(head_dim=256, max_position_embeddings=262144, rope_parameters=dict(rope))
    frequencies, factor = ROPE_INIT_FUNCTIONS["yarn"](config)
    return {"frequencies": frequencies.tolist(), "attention_factor": factor}


def main() -> None:
    GOLDEN.mkdir(exist_ok=True)
    recorded = {name: record_frequencies(rope) for name, rope in FREQUENCIES.items()}
    (GOLDEN / "frequencies.json").write_text(json.dumps(recorded, indent=1) + "\n")
    for case in CASES:
        logits = record(case)
        np.save(GOLDEN / f"{case}.npy", logits)
        print(f"{case}: {logits.shape}, largest {np.abs(logits).max():.3f}")


if __name__ == "__main__":
    main()
