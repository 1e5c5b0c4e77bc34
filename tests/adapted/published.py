"""Weights under the names and in the shapes in which families are published, from those of mlx-lm's networks."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import TypeAlias

import mlx.core as mx

Weights: TypeAlias = dict[str, mx.array]
_W = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}


def _each(pattern: str, to: Callable[[re.Match[str], int], str]) -> Callable[[Weights], Weights]:
    """A tensor for each expert."""

    def change(weights: Weights) -> Weights:
        found = {}
        for name, array in weights.items():
            if match := re.fullmatch(pattern, name):
                found |= {to(match, e): array[e] for e in range(array.shape[0])}
            else:
                found[name] = array
        return found

    return change


def _in(owner: str, experts: str, names: Mapping[str, str] | None = None) -> Callable[[Weights], Weights]:
    pattern = rf"(.*){re.escape(owner)}\.(\w+)\.(weight|bias)"
    return _each(pattern, lambda m, e: f"{m[1]}{experts}.{e}.{(names or {}).get(m[2], m[2])}.{m[3]}")


def _fused(
    owner: str, gate_up: str, down: str, *, transposed: bool = False, rename: tuple[str, str] = ("", "")
) -> Callable[[Weights], Weights]:
    """Gate and up projections of all experts in one tensor, or both kinds as [E, in, out]."""

    def change(weights: Weights) -> Weights:
        found = {}
        for name, array in weights.items():
            head, _, linear = name.removesuffix(".weight").rpartition(".")
            if not head.endswith(owner) or linear == "up_proj":
                if not head.endswith(owner):
                    found[name.replace(*rename) if name.startswith(rename[0]) else name] = array
                continue
            if linear == "gate_proj":
                array, linear = mx.concatenate([array, weights[f"{head}.up_proj.weight"]], axis=1), "gate_up_proj"
            array = array.swapaxes(1, 2) if transposed else array
            prefix = head.removesuffix(owner).replace(*rename)
            found[prefix + (gate_up if linear == "gate_up_proj" else down)] = mx.contiguous(array)
        return found

    return change


def _gpt_oss(weights: Weights) -> Weights:
    """OpenAI's: MXFP4 blocks of 16 bytes, rows of gate and up in turn."""
    found = {}
    for name, array in weights.items():
        head, _, part = name.rpartition(".")
        owner, _, linear = head.rpartition(".")
        if not owner.endswith("mlp.experts"):
            found[name] = array
        elif linear != "up_proj":
            label = "down_proj"
            if linear == "gate_proj":
                label = "gate_up_proj"
                array = mx.stack([array, weights[f"{owner}.up_proj.{part}"]], axis=2 if part != "bias" else -1)
                array = mx.flatten(array, 1, 2)
            if part == "weight":
                array = array.view(mx.uint8).reshape(*array.shape[:2], -1, 16)
            kind = {"weight": "_blocks", "scales": "_scales", "bias": "_bias"}[part]
            found[f"{owner}.{label}{kind}"] = mx.contiguous(array)
    return found


def _renamed(*pairs: tuple[str, str]) -> Callable[[Weights], Weights]:
    def change(weights: Weights) -> Weights:
        found = {}
        for name, array in weights.items():
            for old, new in pairs:
                name = name.replace(old, new)
            found[name] = array
        return found

    return change


_USUAL = _in("mlp.switch_mlp", "mlp.experts")
PUBLISHED: Mapping[str, Callable[[Weights], Weights]] = {
    **dict.fromkeys(
        (
            "qwen2_moe", "qwen3_moe", "qwen3_next", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa", "solar_open", "deepseek",
            "deepseek_v2", "deepseek_v3", "deepseek_v32", "kimi_k2", "kimi_k25", "kimi_vl", "joyai_llm_flash", "olmoe",
            "hunyuan", "mimo_v2_flash", "longcat_flash", "ernie4_5_moe", "exaone_moe", "mellum", "laguna", "bailing_moe",
            "bailing_moe_linear", "bailing_hybrid", "bailing_moe_v3",
        ),
        _USUAL,
    ),
    **dict.fromkeys(("dots1", "afmoe", "Klear"), _in("mlp.experts", "mlp.experts")),
    **dict.fromkeys(
        ("mixtral", "phimoe", "minimax", "minimax_m2", "minimax_m3_vl"),
        _in("block_sparse_moe.switch_mlp", "block_sparse_moe.experts", _W),
    ),
    "kimi_k3": _in("mlp.switch_mlp", "block_sparse_moe.experts", _W),
    "kimi_linear": _in("mlp.switch_mlp", "block_sparse_moe.experts", _W),
    "lfm2_moe": _in("feed_forward.switch_mlp", "feed_forward.experts", _W),
    "jamba": _in("feed_forward.switch_mlp", "feed_forward.experts"),
    "nemotron_h": _in("mixer.switch_mlp", "mixer.experts", {"fc1": "up_proj", "fc2": "down_proj"}),
    "phixtral": _in("moe.switch_mlp", "moe.mlp"),
    "step3p5": _renamed((".mlp.switch_mlp.", ".moe."), (".mlp.gate.gate.", ".moe.gate.")),
    "qwen3_5_moe": _fused(
        "mlp.switch_mlp", "mlp.experts.gate_up_proj", "mlp.experts.down_proj",
        rename=("language_model.model", "model.language_model"),
    ),
    "mistral4": _fused("mlp.switch_mlp", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"),
    "gemma4_text": _fused("experts.switch_glu", "experts.gate_up_proj", "experts.down_proj"),
    "granitemoe": _fused("block_sparse_moe.switch_mlp", "block_sparse_moe.input_linear.weight",
                         "block_sparse_moe.output_linear.weight"),
    "granitemoehybrid": _fused("block_sparse_moe.switch_mlp", "block_sparse_moe.input_linear.weight",
                               "block_sparse_moe.output_linear.weight"),
    "llama4": _fused("feed_forward.experts", "feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj",
                     transposed=True),
    "qwen3_vl_moe": _fused("mlp.switch_mlp", "mlp.experts.gate_up_proj", "mlp.experts.down_proj", transposed=True),
    "gpt_oss": _gpt_oss,
}  # fmt: skip
