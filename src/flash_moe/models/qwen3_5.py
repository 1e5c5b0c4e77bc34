"""Qwen3.5-MoE and its successors of the same architecture (Qwen3.6, Qwen3.8): config.json and weights.

Hugging Face stores RMSNorm weights as w - 1, except that of the gated norm, and convolutions as [C, 1, taps]; mlx-lm
stores w and [C, taps, 1]. The network takes w and [taps, C].
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import mlx.core as mx

from ..checkpoint.names import module_path
from ..checkpoint.safetensors import TensorInfo
from ..config import FULL_ATTENTION, LINEAR_ATTENTION, ModelConfig
from ..errors import CheckpointError, ConfigError
from ..formats import Quantization
from ..rope import Yarn, attention_factor
from .config_json import Reader
from .family import Family, ModelFiles, ResidentWeights

_MAX_LAYERS, _MAX_EXPERTS = 10_000, 1_000_000  # far above any model; only a damaged file has more
_PLAIN_ROPE = ("default", "mrope", None)  # for text, interleaved m-RoPE equals plain RoPE
_log = logging.getLogger(__name__)
_ZERO_CENTRED = ("input_layernorm.weight", "post_attention_layernorm.weight", "q_norm.weight", "k_norm.weight")


class Qwen35(Family):
    """``qwen3_5_moe``."""

    model_types: tuple[str, ...] = ("qwen3_5_moe", "qwen3_5_moe_text")
    float32 = ("A_log", "dt_bias", ".global_scale")

    def config(self, raw: Mapping[str, Any]) -> ModelConfig:
        return _parsed(raw)

    def in_one_convention(
        self, files: ModelFiles, stored: Mapping[str, mx.array], dtype: mx.Dtype, keep_matrices: bool = False
    ) -> ResidentWeights:
        hugging_face = not files.follows_mlx
        arrays: dict[str, mx.array] = {}
        quantization: dict[str, Quantization] = {}
        for name, array in stored.items():
            keeps = keep_matrices and _is_of_matrix(name, array)
            is_float = array.dtype not in (mx.uint32, mx.uint8)
            if is_float and not keeps:
                array = array.astype(mx.float32 if name.endswith(self.float32) or hugging_face else dtype)
            if hugging_face and _is_zero_centred(name):
                array = array + 1.0
            if name.endswith("conv1d.weight"):
                array = _taps_first(array, files.resident[name], hugging_face)
            as_stored = not is_float or keeps or name.endswith(self.float32)
            arrays[name] = array if as_stored else array.astype(dtype)
            if name.endswith(".scales"):
                module = module_path(name)
                if (weight := files.resident.get(f"{module}.weight")) is None:
                    raise CheckpointError(f"the checkpoint has {name} but no {module}.weight; download it again")
                found = quantization[module] = files.quantization.of([module], weight, files.resident[name])
                if not found.is_affine and f"{module}.biases" in files.resident:
                    raise CheckpointError(f"{name} is U8, as in mode {found.mode}, but there is {module}.biases, too")
                stated = files.quantization.stated([module])
                if stated is not None and stated.global_scale and f"{module}.global_scale" not in files.resident:
                    raise CheckpointError(
                        f"config.json states a global scale of {module}, but {module}.global_scale is in no file; "
                        "download the checkpoint again"
                    )
        return ResidentWeights(arrays, quantization)

    def mlx_name(self, canonical: str) -> str:
        return "language_model." + (canonical if canonical.startswith("lm_head.") else "model." + canonical)

    def mlx_array(self, files: ModelFiles, name: str, array: mx.array) -> mx.array:
        if files.follows_mlx:
            return array
        if _is_zero_centred(name):
            return (array.astype(mx.float32) + 1.0).astype(array.dtype)
        return array.moveaxis(2, 1) if name.endswith("conv1d.weight") else array


def _is_of_matrix(canonical: str, array: mx.array) -> bool:
    """Returns whether an array belongs to the matrix of a linear layer or an embedding.

    Weights of convolutions do not count: they have three dimensions.
    """
    return array.ndim == 2 and canonical.endswith((".weight", ".scales", ".biases"))


def _is_zero_centred(canonical: str) -> bool:
    return canonical.endswith(_ZERO_CENTRED) or canonical == "norm.weight"


def _taps_first(array: mx.array, info: TensorInfo, hugging_face: bool) -> mx.array:
    """Converts a stored convolution, [C, 1, taps] (Hugging Face) or [C, taps, 1] (MLX), to [taps, C]."""
    axis = 1 if hugging_face else 2
    if array.ndim != 3 or array.shape[axis] != 1:
        expected = "[C, 1, taps]" if hugging_face else "[C, taps, 1]"
        raise CheckpointError(
            f"{info.file}: {info.name!r} has shape {list(info.shape)}, expected {expected} with the taps of config.json; "
            "config.json and weights do not belong together"
        )
    return array.squeeze(axis).T


def text_config(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the section of config.json for the language model. Raises ConfigError if it is not an object."""
    text = raw.get("text_config", raw)
    if not isinstance(text, Mapping):
        raise ConfigError(f"config.json: text_config is {type(text).__name__}, expected an object")
    return text


def _parsed(raw: Mapping[str, Any]) -> ModelConfig:
    text = text_config(raw)
    if (act := text.get("hidden_act", "silu")) != "silu":
        raise ConfigError(f"config.json: hidden_act is {act!r}; only 'silu' is supported")
    get = Reader(text)
    layers = get.integer("num_hidden_layers", most=_MAX_LAYERS)
    heads, kv_heads = get.integer("num_attention_heads"), get.integer("num_key_value_heads")
    key_heads, value_heads = get.integer("linear_num_key_heads"), get.integer("linear_num_value_heads")
    hidden = get.integer("hidden_size")
    head_dim = get.integer("head_dim", 256)  # as in transformers
    experts = get.integer("num_experts", most=_MAX_EXPERTS)
    top_k = get.integer("num_experts_per_tok")
    positions = get.integer("max_position_embeddings", 32768)
    theta, rotary_dims, yarn = _rope(raw, text, head_dim, positions)
    for many, few, what in (
        (heads, kv_heads, "num_attention_heads"),
        (value_heads, key_heads, "linear_num_value_heads"),
    ):
        if many % few:
            raise ConfigError(f"config.json: {what} is {many}, expected a multiple of its {few} key heads")
    if top_k > experts:
        raise ConfigError(f"config.json: num_experts_per_tok is {top_k}, more than the {experts} experts")
    return ModelConfig(
        model_type=raw["model_type"],
        vocab_size=get.integer("vocab_size"),
        hidden_size=hidden,
        num_hidden_layers=layers,
        layer_types=_layer_types(text, layers),
        sparse_layers=_sparse_layers(text, layers),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        rotary_dims=rotary_dims,
        rope_theta=theta,
        yarn=yarn,
        attention_bias=get.flag("attention_bias", False),
        linear_num_key_heads=key_heads,
        linear_num_value_heads=value_heads,
        linear_key_head_dim=get.integer("linear_key_head_dim"),
        linear_value_head_dim=get.integer("linear_value_head_dim"),
        linear_conv_kernel_dim=get.integer("linear_conv_kernel_dim", 4, least=2),
        num_experts=experts,
        num_experts_per_tok=top_k,
        moe_intermediate_size=get.integer("moe_intermediate_size"),
        shared_expert_intermediate_size=get.integer("shared_expert_intermediate_size"),
        intermediate_size=get.integer("intermediate_size", 0, least=0),
        norm_topk_prob=True,
        rms_norm_eps=get.number("rms_norm_eps", 1e-6),
        tie_word_embeddings=get.flag("tie_word_embeddings", bool(raw.get("tie_word_embeddings", False))),
        max_position_embeddings=positions if yarn is None else max(positions, yarn.max_position_embeddings),
    )


def _rope(
    raw: Mapping[str, Any], text: Mapping[str, Any], head_dim: int, positions: int
) -> tuple[float, int, Yarn | None]:
    """Returns the base of the rotary frequencies, the number of rotated dimensions, and the parameters of YaRN."""
    inner, outer = _rope_sections(text), [] if text is raw else _rope_sections(raw)
    scaled = next((section for section in (*inner, *outer) if section["rope_type"] == "yarn"), None)
    plain = {key: value for section in reversed([*inner, *outer]) for key, value in section.items()}
    if scaled is None:
        rope = plain
    elif scaled in inner:
        rope = scaled  # as in transformers, it replaces the other section
        if "rope_theta" not in rope and "rope_theta" in plain and text.get("rope_theta") is None:
            _log.warning(
                "config.json: the section with yarn states no rope_theta; as transformers does, flash_moe takes 10000 and "
                "not the %s of the other section. Copy rope_theta into the section with yarn.", plain["rope_theta"],
            )  # fmt: skip
    else:
        rope = {**plain, **scaled}  # next to text_config, where transformers does not look
    get = Reader({**text, **rope})
    dims = int(head_dim * get.number("partial_rotary_factor", 0.25))
    if dims % 2 or not 0 < dims <= head_dim:
        raise ConfigError(f"config.json: {dims} rotary dimensions of {head_dim}, expected an even number of at least 2")
    theta = get.number("rope_theta", 10000.0)
    return theta, dims, None if scaled is None else _yarn(rope, text, theta, positions)


def _rope_sections(owner: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the sections about RoPE with the newer names of keys, in the order of priority of transformers."""
    sections = []
    for key in ("rope_scaling", "rope_parameters"):
        section = owner.get(key) or {}
        if isinstance(section, Mapping):
            section = section.get(FULL_ATTENTION, section)  # transformers also writes a section per type of layer
        if not isinstance(section, Mapping):
            raise ConfigError(f"config.json: {key} is {type(section).__name__}, expected an object")
        kind = section.get("rope_type", section.get("type"))
        if kind not in (*_PLAIN_ROPE, "yarn"):
            raise ConfigError(f"config.json: rope_type is {kind!r}; only 'default' and 'yarn' are supported (in {key})")
        if section:
            sections.append({**_stated(section), "rope_type": kind})
    return sections


def _stated(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


def _yarn(rope: Mapping[str, Any], text: Mapping[str, Any], theta: float, positions: int) -> Yarn:
    get, key = Reader(rope), "original_max_position_embeddings"
    original = Reader(text).number(key, get.number(key, positions))  # transformers prefers the outer one
    factor = get.number("factor", positions / original)
    fast, slow = get.number("beta_fast", 32.0), get.number("beta_slow", 1.0)
    if factor < 1 or theta <= 1:
        raise ConfigError(
            f"config.json: yarn with factor {factor} and rope_theta {theta}, expected at least 1 and more than 1"
        )
    mscale = (get.number(key) if rope.get(key) else None for key in ("mscale", "mscale_all_dim"))
    scale = get.number("attention_factor", attention_factor(factor, *mscale))
    return Yarn(factor, original, fast, slow, get.flag("truncate", True), scale)


def _layer_types(text: Mapping[str, Any], layers: int) -> tuple[str, ...]:
    kinds = text.get("layer_types")
    if kinds is None:
        interval = Reader(text).integer("full_attention_interval", 4)
        kinds = [LINEAR_ATTENTION if (i + 1) % interval else FULL_ATTENTION for i in range(layers)]
    known = (FULL_ATTENTION, LINEAR_ATTENTION)
    if not isinstance(kinds, list) or len(kinds) != layers or not all(kind in known for kind in kinds):
        raise ConfigError(
            f"config.json: layer_types is {kinds!r}, expected {layers} entries of {FULL_ATTENTION!r} or {LINEAR_ATTENTION!r}"
        )
    return tuple(kinds)


def _sparse_layers(text: Mapping[str, Any], layers: int) -> tuple[bool, ...]:
    step = Reader(text).integer("decoder_sparse_step", 1)
    dense = text.get("mlp_only_layers") or []
    if not isinstance(dense, list):
        raise ConfigError(f"config.json: mlp_only_layers is {dense!r}, expected a list of layer indices")
    return tuple(i not in dense and (i + 1) % step == 0 for i in range(layers))
