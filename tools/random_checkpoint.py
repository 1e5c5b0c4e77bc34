"""Writes small checkpoints with random weights in the real formats: for tests, benchmarks and `make demo`.

    python tools/random_checkpoint.py FOLDER [--layers 8] [--experts 32] [--top-k 4] [--hidden 64] [--intermediate 64]

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


def tensor_shapes(text: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors under Hugging Face's names, without prefix; experts of a layer are fused."""
    hidden, vocabulary = text["hidden_size"], text["vocab_size"]
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (vocabulary, hidden), "norm.weight": (hidden,)}
    if not text["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocabulary, hidden)
    for i in range(text["num_hidden_layers"]):
        linear = (i + 1) % text["full_attention_interval"]
        parts = {"input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,)}
        parts |= _prefixed("linear_attn.", _delta_net(text)) if linear else _prefixed("self_attn.", _attention(text))
        parts |= _prefixed("mlp.", _mlp(text, i))
        shapes |= _prefixed(f"layers.{i}.", parts)
    return shapes


def _prefixed(prefix: str, shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return {prefix + name: shape for name, shape in shapes.items()}


def _attention(text: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    dim, hidden = text["head_dim"], text["hidden_size"]
    heads, kv_heads = text["num_attention_heads"], text["num_key_value_heads"]
    outputs = {"q_proj": 2 * heads * dim, "k_proj": kv_heads * dim, "v_proj": kv_heads * dim, "o_proj": hidden}
    shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": (out, hidden) for name, out in outputs.items()}
    shapes["o_proj.weight"] = (hidden, heads * dim)
    if text["attention_bias"]:
        shapes |= {f"{name}.bias": (out,) for name, out in outputs.items()}
    return shapes | {"q_norm.weight": (dim,), "k_norm.weight": (dim,)}


def _delta_net(text: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, heads = text["hidden_size"], text["linear_num_value_heads"]
    key_dim = text["linear_num_key_heads"] * text["linear_key_head_dim"]
    value_dim = heads * text["linear_value_head_dim"]
    if text["model_type"] == "qwen3_next":
        inputs = {"in_proj_qkvz": 2 * key_dim + 2 * value_dim, "in_proj_ba": 2 * heads}
    else:
        inputs = {
            "in_proj_qkv": 2 * key_dim + value_dim,
            "in_proj_z": value_dim,
            "in_proj_b": heads,
            "in_proj_a": heads,
        }
    return {f"{name}.weight": (out, hidden) for name, out in inputs.items()} | {
        "conv1d.weight": (2 * key_dim + value_dim, 1, text["linear_conv_kernel_dim"]),
        "dt_bias": (heads,),
        "A_log": (heads,),
        "norm.weight": (text["linear_value_head_dim"],),
        "out_proj.weight": (hidden, value_dim),
    }


def _mlp(text: dict[str, Any], layer: int) -> dict[str, tuple[int, ...]]:
    hidden, experts, size = text["hidden_size"], text["num_experts"], text["moe_intermediate_size"]

    def swiglu(width: int) -> dict[str, tuple[int, ...]]:
        rows = (width, hidden)
        return {"gate_proj.weight": rows, "up_proj.weight": rows, "down_proj.weight": rows[::-1]}

    if layer in text.get("mlp_only_layers", ()):
        return swiglu(text["intermediate_size"])
    shared = _prefixed("shared_expert.", swiglu(text["shared_expert_intermediate_size"]))
    return {"gate.weight": (experts, hidden), **shared, "shared_expert_gate.weight": (1, hidden)} | {
        "experts.gate_up_proj": (experts, 2 * size, hidden),
        "experts.down_proj": (experts, hidden, size),
    }


def random_weights(text: dict[str, Any], seed: int, *, fused_experts: bool = True) -> dict[str, np.ndarray]:
    """float32 weights under Hugging Face's names, without prefix.

    Args:
        fused_experts: one tensor for all experts of a layer (gate rows first), else one tensor per expert.
    """
    rng = np.random.RandomState(seed)  # its streams never change between NumPy versions
    weights = {}
    for name, shape in tensor_shapes(text).items():
        if name.endswith("A_log"):
            value = np.log(rng.uniform(0.1, 4.0, shape))
        elif len(shape) == 1:
            centre = 1.0 if name.endswith(("dt_bias", "linear_attn.norm.weight")) else 0.0
            value = centre + 0.2 * rng.standard_normal(shape)
        elif name == "embed_tokens.weight" and not text["tie_word_embeddings"]:
            value = rng.standard_normal(shape)
        else:
            value = rng.standard_normal(shape) * shape[-1] ** -0.5
        weights[name] = value.astype(np.float32)
    return weights if fused_experts else split_experts(weights)


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
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--intermediate", type=int, default=64, help="of the routed experts and of the shared one")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    text = text_config(
        num_hidden_layers=arguments.layers, num_experts=arguments.experts, num_experts_per_tok=arguments.top_k,
        hidden_size=arguments.hidden, moe_intermediate_size=arguments.intermediate,
        shared_expert_intermediate_size=arguments.intermediate,
    )  # fmt: skip
    print(write_checkpoint(arguments.folder, text, seed=arguments.seed))


if __name__ == "__main__":
    main()
