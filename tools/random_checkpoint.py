"""Writes small checkpoints with random weights in the real formats: for tests, benchmarks and `make demo`.

    python tools/random_checkpoint.py FOLDER [--layers 8] [--experts 32] [--top-k 4]

The folder holds what a Hugging Face repository of Qwen3.5-MoE holds: config.json, sharded safetensors with an index,
and a byte-level tokenizer with a chat template. The weights are noise: the model talks nonsense at the right speed.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

END, START, STOP = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
BYTE_VOCABULARY = 256 + 3


def text_config(**changes: Any) -> dict[str, Any]:
    """The text part of a tiny model's config.json; ``changes`` override single keys."""
    config = {
        "model_type": "qwen3_5_moe_text",
        "vocab_size": 288,
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 32,
        "linear_conv_kernel_dim": 4,
        "full_attention_interval": 4,
        "num_experts": 16,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 64,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000000.0, "partial_rotary_factor": 0.25},
    }
    return config | changes


def next_config(**changes: Any) -> dict[str, Any]:
    """config.json of a tiny Qwen3-Next model."""
    config = text_config(model_type="qwen3_next", norm_topk_prob=True, intermediate_size=96, decoder_sparse_step=1)
    rope = config.pop("rope_parameters")
    return config | {"rope_theta": rope["rope_theta"], "partial_rotary_factor": 0.25, "mlp_only_layers": []} | changes


def random_weights(text: dict[str, Any], seed: int, *, fused_experts: bool = True) -> dict[str, np.ndarray]:
    """float32 weights under Hugging Face's names, without prefix.

    Args:
        fused_experts: one tensor for all experts of a layer (gate rows first), else one tensor per expert.
    """
    rng = np.random.RandomState(seed)  # its streams never change between NumPy versions
    hidden, vocabulary = text["hidden_size"], text["vocab_size"]
    weights: dict[str, np.ndarray] = {}

    def matrix(name: str, *shape: int) -> None:
        weights[name] = (rng.standard_normal(shape) * shape[-1] ** -0.5).astype(np.float32)

    def vector(name: str, size: int, centre: float = 0.0) -> None:
        weights[name] = (centre + 0.2 * rng.standard_normal(size)).astype(np.float32)

    matrix("embed_tokens.weight", vocabulary, hidden)
    vector("norm.weight", hidden)
    if not text["tie_word_embeddings"]:
        weights["embed_tokens.weight"] *= hidden**0.5
        matrix("lm_head.weight", vocabulary, hidden)
    for i in range(text["num_hidden_layers"]):
        layer = f"layers.{i}."
        vector(layer + "input_layernorm.weight", hidden)
        vector(layer + "post_attention_layernorm.weight", hidden)
        if (i + 1) % text["full_attention_interval"]:
            _delta_net(text, layer + "linear_attn.", matrix, vector, weights, rng)
        else:
            _attention(text, layer + "self_attn.", matrix, vector)
        _mlp(text, i, layer + "mlp.", matrix)
    return weights if fused_experts else split_experts(weights)


def _attention(text: dict[str, Any], name: str, matrix: Any, vector: Any) -> None:
    heads, kv_heads, dim, hidden = (
        text[k] for k in ("num_attention_heads", "num_key_value_heads", "head_dim", "hidden_size")
    )
    matrix(name + "q_proj.weight", 2 * heads * dim, hidden)
    matrix(name + "k_proj.weight", kv_heads * dim, hidden)
    matrix(name + "v_proj.weight", kv_heads * dim, hidden)
    matrix(name + "o_proj.weight", hidden, heads * dim)
    if text["attention_bias"]:
        for projection, size in (("q", 2 * heads * dim), ("k", kv_heads * dim), ("v", kv_heads * dim), ("o", hidden)):
            vector(f"{name}{projection}_proj.bias", size)
    vector(name + "q_norm.weight", dim)
    vector(name + "k_norm.weight", dim)


def _delta_net(text: dict[str, Any], name: str, matrix: Any, vector: Any, weights: dict, rng: Any) -> None:
    hidden, heads = text["hidden_size"], text["linear_num_value_heads"]
    key_dim = text["linear_num_key_heads"] * text["linear_key_head_dim"]
    value_dim = heads * text["linear_value_head_dim"]
    if text["model_type"] == "qwen3_next":
        matrix(name + "in_proj_qkvz.weight", 2 * key_dim + 2 * value_dim, hidden)
        matrix(name + "in_proj_ba.weight", 2 * heads, hidden)
    else:
        matrix(name + "in_proj_qkv.weight", 2 * key_dim + value_dim, hidden)
        matrix(name + "in_proj_z.weight", value_dim, hidden)
        matrix(name + "in_proj_b.weight", heads, hidden)
        matrix(name + "in_proj_a.weight", heads, hidden)
    matrix(name + "conv1d.weight", 2 * key_dim + value_dim, 1, text["linear_conv_kernel_dim"])
    vector(name + "dt_bias", heads, 1.0)
    weights[name + "A_log"] = np.log(rng.uniform(0.1, 4.0, heads)).astype(np.float32)
    vector(name + "norm.weight", text["linear_value_head_dim"], 1.0)
    matrix(name + "out_proj.weight", hidden, value_dim)


def _mlp(text: dict[str, Any], layer: int, name: str, matrix: Any) -> None:
    hidden, experts = text["hidden_size"], text["num_experts"]

    def swiglu(prefix: str, size: int) -> None:
        matrix(prefix + "gate_proj.weight", size, hidden)
        matrix(prefix + "up_proj.weight", size, hidden)
        matrix(prefix + "down_proj.weight", hidden, size)

    if layer in text.get("mlp_only_layers", ()):
        swiglu(name, text["intermediate_size"])
        return
    size = text["moe_intermediate_size"]
    matrix(name + "gate.weight", experts, hidden)
    swiglu(name + "shared_expert.", text["shared_expert_intermediate_size"])
    matrix(name + "shared_expert_gate.weight", 1, hidden)
    matrix(name + "experts.gate_up_proj", experts, 2 * size, hidden)
    matrix(name + "experts.down_proj", experts, hidden, size)


def split_experts(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same weights with one tensor per expert and projection."""
    split: dict[str, np.ndarray] = {}
    for name, value in weights.items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            split[name] = value
            continue
        prefix, projection = name.rsplit(".", 1)
        for expert, matrix in enumerate(value):
            if projection == "down_proj":
                split[f"{prefix}.{expert}.down_proj.weight"] = matrix
            else:
                gate, up = np.split(matrix, 2)
                split[f"{prefix}.{expert}.gate_proj.weight"] = gate
                split[f"{prefix}.{expert}.up_proj.weight"] = up
    return split


def write_checkpoint(
    folder: Path,
    text: dict[str, Any],
    *,
    seed: int = 0,
    prefix: str = "model.language_model.",
    fused_experts: bool = True,
    nested_config: bool = True,
    shards: int = 2,
    extra: dict[str, np.ndarray] | None = None,
) -> Path:
    """Writes a Hugging Face checkpoint with random weights and returns its folder.

    Args:
        prefix: of all names but ``lm_head``.
        nested_config: put the text config under ``text_config``, as the multimodal releases do.
        extra: tensors added under their own names (vision, MTP).
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        (name if name.startswith("lm_head") else prefix + name): value
        for name, value in random_weights(text, seed, fused_experts=fused_experts).items()
    } | (extra or {})
    names = list(weights)
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        mine = {name: weights[name] for name in names[shard::shards]}
        save_file(mine, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(mine, file)
    index = {"metadata": {"total_size": sum(w.nbytes for w in weights.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    nested = {"model_type": "qwen3_5_moe", "text_config": text, "tie_word_embeddings": text["tie_word_embeddings"]}
    (folder / "config.json").write_text(json.dumps(nested if nested_config else text, indent=1))
    write_tokenizer(folder)
    return folder


def write_tokenizer(folder: Path) -> None:
    """Writes a byte-level tokenizer (259 tokens), a chat template, and generation_config.json with the EOS ids."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in (END, START, STOP)])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": STOP, "pad_token": END}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    eos = [tokenizer.token_to_id(STOP), tokenizer.token_to_id(END)]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--top-k", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    text = text_config(
        num_hidden_layers=arguments.layers, num_experts=arguments.experts, num_experts_per_tok=arguments.top_k
    )
    print(write_checkpoint(arguments.folder, text, seed=arguments.seed))


if __name__ == "__main__":
    main()
