"""The architecture of a model, read once from config.json and checked; nothing else in the library knows a dimension."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import ConfigError
from .record import ExpertShape
from .rope import Yarn, attention_factor, frequencies

SUPPORTED = ("qwen3_5_moe", "qwen3_5_moe_text", "qwen3_next")
MAX_LAYERS, MAX_EXPERTS, MAX_DIMENSION = 10_000, 1_000_000, 1 << 30  # far above any model: a damaged file asks for more
FULL_ATTENTION, LINEAR_ATTENTION = "full_attention", "linear_attention"
_log = logging.getLogger(__name__)
_PLAIN_ROPE = ("default", "mrope", None)  # for text, interleaved m-RoPE equals plain RoPE


@dataclass(frozen=True)
class ModelConfig:
    """Dimensions and switches of a Qwen3.5-MoE or Qwen3-Next text model, named as in config.json.

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

    @classmethod
    def load(cls, folder: Path) -> ModelConfig:
        """Reads and validates ``folder/config.json``.

        Raises:
            ConfigError: the file is missing, is not JSON, or describes a model we cannot run.
        """
        return cls.from_dict(read_config(folder))

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> ModelConfig:
        """Builds a config from the content of config.json (with or without ``text_config``)."""
        return _parse(raw)


def read_config(folder: Path) -> dict[str, Any]:
    """The content of ``folder/config.json`` as it stands."""
    path = folder / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"{path} does not exist; expected a folder with config.json and *.safetensors files"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read as JSON ({error}); download it again") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} holds {type(raw).__name__}, expected a JSON object; download it again")
    return raw


class _Reader:
    """Typed look-ups in config.json that fail with the key's name."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = values

    def integer(self, key: str, default: int | None = None, *, least: int = 1, most: int = MAX_DIMENSION) -> int:
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ConfigError(f"config.json: {key} is {value!r}, expected an integer of at least {least}")
        if value > most:
            raise ConfigError(
                f"config.json: {key} is {value!r:.20}, expected at most {most}; restore the original file"
            )
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e38:
            raise ConfigError(f"config.json: {key} is {value!r}, expected a positive, finite number")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise ConfigError(f"config.json: {key} is {value!r}, expected true or false")
        return value

    def _get(self, key: str, default: Any) -> Any:
        value = self.values.get(key)
        value = default if value is None else value
        if value is None:
            raise ConfigError(f"config.json lacks {key!r}; is this the config of one of {', '.join(SUPPORTED)}?")
        return value


def _parse(raw: Mapping[str, Any]) -> ModelConfig:
    model_type = raw.get("model_type")
    if model_type not in SUPPORTED:
        raise ConfigError(f"model_type is {model_type!r}; flash_moe runs {', '.join(SUPPORTED)}")
    text = raw.get("text_config", raw)
    if not isinstance(text, Mapping):
        raise ConfigError(f"config.json: text_config is {type(text).__name__}, expected an object")
    if (act := text.get("hidden_act", "silu")) != "silu":
        raise ConfigError(f"config.json: hidden_act is {act!r}; only 'silu' is supported")
    get = _Reader(text)
    layers = get.integer("num_hidden_layers", most=MAX_LAYERS)
    heads, kv_heads = get.integer("num_attention_heads"), get.integer("num_key_value_heads")
    key_heads, value_heads = get.integer("linear_num_key_heads"), get.integer("linear_num_value_heads")
    hidden = get.integer("hidden_size")
    head_dim = get.integer("head_dim", hidden // heads)
    experts = get.integer("num_experts", most=MAX_EXPERTS)
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
        model_type=model_type,
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
        norm_topk_prob=get.flag("norm_topk_prob", True) if model_type == "qwen3_next" else True,
        rms_norm_eps=get.number("rms_norm_eps", 1e-6),
        tie_word_embeddings=get.flag("tie_word_embeddings", bool(raw.get("tie_word_embeddings", False))),
        max_position_embeddings=positions if yarn is None else max(positions, yarn.max_position_embeddings),
    )


def _rope(
    raw: Mapping[str, Any], text: Mapping[str, Any], head_dim: int, positions: int
) -> tuple[float, int, Yarn | None]:
    """Base of the rotary frequencies, number of rotated dimensions, and YaRN, wherever config.json states it."""
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
        rope = {**plain, **scaled}  # beside text_config, where transformers does not look
    get = _Reader({**text, **rope})
    dims = int(head_dim * get.number("partial_rotary_factor", 0.25))
    if dims % 2 or not 0 < dims <= head_dim:
        raise ConfigError(f"config.json: {dims} rotary dimensions of {head_dim}, expected an even number of at least 2")
    theta = get.number("rope_theta", 10000.0)
    return theta, dims, None if scaled is None else _yarn(rope, text, theta, positions)


def _rope_sections(owner: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The sections about RoPE, what they state under the newer names; that which counts first in transformers is first."""
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
    get, key = _Reader(rope), "original_max_position_embeddings"
    original = _Reader(text).number(key, get.number(key, positions))  # of the two, transformers prefers that outside
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
        interval = _Reader(text).integer("full_attention_interval", 4)
        kinds = [LINEAR_ATTENTION if (i + 1) % interval else FULL_ATTENTION for i in range(layers)]
    known = (FULL_ATTENTION, LINEAR_ATTENTION)
    if not isinstance(kinds, list) or len(kinds) != layers or not all(kind in known for kind in kinds):
        raise ConfigError(
            f"config.json: layer_types is {kinds!r}, expected {layers} entries of {FULL_ATTENTION!r} or {LINEAR_ATTENTION!r}"
        )
    return tuple(kinds)


def _sparse_layers(text: Mapping[str, Any], layers: int) -> tuple[bool, ...]:
    step = _Reader(text).integer("decoder_sparse_step", 1)
    dense = text.get("mlp_only_layers") or []
    if not isinstance(dense, list):
        raise ConfigError(f"config.json: mlp_only_layers is {dense!r}, expected a list of layer indices")
    return tuple(i not in dense and (i + 1) % step == 0 for i in range(layers))
