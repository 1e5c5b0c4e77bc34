from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from random_checkpoint import next_config, text_config
from record_golden import FREQUENCIES, GOLDEN

from flash_moe.config import ModelConfig
from flash_moe.errors import ConfigError
from flash_moe.models import FAMILIES, family_of, open_model
from flash_moe.models.config_json import read_config
from flash_moe.rope import Yarn

REQUIRED = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim", "num_experts",
    "num_experts_per_tok", "moe_intermediate_size", "shared_expert_intermediate_size",
)  # fmt: skip
LINEAR, FULL = "linear_attention", "full_attention"


def parsed(raw: dict[str, Any]) -> ModelConfig:
    return family_of(raw["model_type"]).config(raw)


def loaded(folder: Path) -> ModelConfig:
    return parsed(read_config(folder))


def parse(**changes: Any) -> ModelConfig:
    return parsed(text_config(**changes))


def test_nested_and_bare_configs_agree() -> None:
    bare = text_config(model_type="qwen3_5_moe")
    nested = {"model_type": "qwen3_5_moe", "text_config": text_config(), "vision_config": {"depth": 2}}
    assert parsed(nested) == parsed(bare)


def test_values_are_those_of_the_file() -> None:
    raw = text_config()
    config = parsed(raw)
    for key in REQUIRED:
        assert getattr(config, key) == raw[key]
    assert config.rms_norm_eps == 1e-6
    assert config.max_position_embeddings == 4096
    assert (config.key_dim, config.value_dim) == (2 * 32, 4 * 32)
    assert config.experts.layers == (0, 1, 2, 3)


def test_tied_embeddings_may_be_stated_outside_the_text_config() -> None:
    text = text_config()
    del text["tie_word_embeddings"]
    raw = {"model_type": "qwen3_5_moe", "text_config": text, "tie_word_embeddings": True}
    assert parsed(raw).tie_word_embeddings
    text["tie_word_embeddings"] = False
    assert not parsed(raw).tie_word_embeddings


def test_qwen3_next_reads_its_own_switches() -> None:
    config = parsed(next_config(mlp_only_layers=[1], num_hidden_layers=6, decoder_sparse_step=2, norm_topk_prob=False))
    assert config.model_type == "qwen3_next"
    assert config.experts.layers == (3, 5)
    assert config.norm_topk_prob is False
    assert (config.rope_theta, config.rotary_dims) == (1e7, 8)


def test_qwen3_5_always_normalises_its_routing_weights() -> None:
    assert parse(norm_topk_prob=False).norm_topk_prob is True


@pytest.mark.parametrize("key", REQUIRED)
@pytest.mark.parametrize("null", [False, True], ids=["absent", "null"])
def test_missing_key_is_named(key: str, null: bool) -> None:
    raw = text_config()
    if null:
        raw[key] = None
    else:
        del raw[key]
    with pytest.raises(ConfigError, match=f"lacks '{key}'"):
        parsed(raw)


@pytest.mark.parametrize("key", [*REQUIRED, "head_dim", "linear_conv_kernel_dim", "max_position_embeddings"])
@pytest.mark.parametrize("value", [0, -1, 1.5, "8", True, [8]], ids=repr)
def test_what_is_no_positive_integer_is_named(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"{key} is .*expected an integer of at least"):
        parse(**{key: value})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rms_norm_eps", "1e-6"),
        ("rms_norm_eps", 0),
        ("rms_norm_eps", float("nan")),
        ("attention_bias", 1),
        ("tie_word_embeddings", "no"),
        ("hidden_act", "gelu"),
        ("mlp_only_layers", 3),
        ("decoder_sparse_step", 0),
        ("full_attention_interval", "4"),
        ("layer_types", "full_attention"),
        ("rope_parameters", [1]),
    ],
)
def test_value_of_the_wrong_kind_is_named(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=key):
        parse(**{key: value})


@pytest.mark.parametrize("found", [None, "llama", "qwen3_moe", 7, ["qwen3_next"]], ids=repr)
def test_unknown_model_type_is_named(found: Any, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(text_config(model_type=found)))
    with pytest.raises(ConfigError, match=f"model_type is {re.escape(repr(found))}") as caught:
        open_model(tmp_path)
    known = [name for family in FAMILIES for name in family.model_types]
    assert not isinstance(found, str) or all(name in str(caught.value) for name in known)


def test_text_config_must_be_an_object() -> None:
    with pytest.raises(ConfigError, match="text_config is list"):
        parsed({"model_type": "qwen3_5_moe", "text_config": []})


def test_top_k_cannot_exceed_the_experts() -> None:
    assert parse(num_experts=4, num_experts_per_tok=4).num_experts_per_tok == 4
    with pytest.raises(ConfigError, match="num_experts_per_tok is 5, more than the 4 experts"):
        parse(num_experts=4, num_experts_per_tok=5)


@pytest.mark.parametrize(
    ("heads", "key_heads"),
    [("num_attention_heads", "num_key_value_heads"), ("linear_num_value_heads", "linear_num_key_heads")],
)
def test_heads_are_a_multiple_of_their_key_heads(heads: str, key_heads: str) -> None:
    with pytest.raises(ConfigError, match=f"{heads} is 4, expected a multiple of its 3"):
        parse(**{heads: 4, key_heads: 3})


def test_head_dim_defaults_to_that_of_transformers() -> None:
    raw = text_config(hidden_size=96, num_attention_heads=4)
    del raw["head_dim"]
    assert parsed(raw).head_dim == 256


@pytest.mark.parametrize("value", [1 << 40, 10**400], ids=["40 bits", "400 digits"])
@pytest.mark.parametrize("key", [*REQUIRED, "head_dim", "max_position_embeddings", "full_attention_interval"])
def test_dimensions_of_no_model_are_refused(key: str, value: int) -> None:
    with pytest.raises(ConfigError, match=rf"{key} is .* expected at most"):
        parse(**{key: value})


@pytest.mark.parametrize("key", ["num_hidden_layers", "num_experts"])
def test_a_billion_layers_or_experts_are_refused(key: str) -> None:
    with pytest.raises(ConfigError, match=rf"{key} is 1000000000, expected at most"):
        parse(**{key: 10**9})


@pytest.mark.parametrize(
    ("rope", "theta", "dims"),
    [
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "partial_rotary_factor": 0.5}}, 5e6, 16),
        ({"rope_parameters": {"type": "mrope", "mrope_section": [4, 2, 2], "rope_theta": 5e6}}, 5e6, 8),
        ({"rope_scaling": {"type": "default"}, "rope_theta": 3e6, "partial_rotary_factor": 1.0}, 3e6, 32),
        ({"rope_scaling": None, "rope_theta": 3e6}, 3e6, 8),
        ({}, 10000.0, 8),
    ],
    ids=["parameters", "interleaved m-RoPE", "scaling", "no scaling", "defaults"],
)
def test_rope_variants(rope: dict[str, Any], theta: float, dims: int) -> None:
    raw = text_config()
    del raw["rope_parameters"]
    config = parsed(raw | rope)
    assert (config.rope_theta, config.rotary_dims) == (theta, dims)


SECTIONS, TYPES = ["rope_scaling", "rope_parameters"], ["type", "rope_type"]
YARN = {"rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 1024, "partial_rotary_factor": 0.5}


@pytest.mark.parametrize("kind", ["linear", "dynamic", "longrope", "llama3", "proportional", ["yarn"]], ids=str)
@pytest.mark.parametrize("section", SECTIONS)
@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("outside", [False, True], ids=["text config", "beside it"])
def test_other_scaled_rope_is_refused(kind: Any, section: str, name: str, outside: bool) -> None:
    raw = {"model_type": "qwen3_5_moe", "text_config": text_config()}  # which has plain rope_parameters
    (raw if outside else raw["text_config"])[section] = {name: kind, "factor": 4.0}
    with pytest.raises(ConfigError, match=rf"rope_type is {re.escape(repr(kind))}; only 'default' and 'yarn'"):
        parsed(raw)


@pytest.mark.parametrize("section", SECTIONS)
@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("place", ["text config", "beside it", "bare", "per layer type"])
def test_yarn_is_found_wherever_it_stands(section: str, name: str, place: str) -> None:
    text = text_config()
    raw = text if place == "bare" else {"model_type": "qwen3_5_moe", "text_config": text}
    yarn = YARN | {name: "yarn"}
    (raw if place == "beside it" else text)[section] = {FULL: yarn} if place == "per layer type" else yarn
    config = parsed(raw)
    assert config.yarn == Yarn(4.0, 1024, attention_factor=0.1 * math.log(4) + 1)
    assert (config.rope_theta, config.rotary_dims) == (1e6, 16)
    assert config.max_position_embeddings == 4096


def test_context_under_yarn() -> None:
    yarn = {"rope_type": "yarn", "rope_theta": 1e7, "factor": 4.0}
    assert parse(rope_parameters=yarn).max_position_embeddings == 4 * 4096
    outside = parse(rope_parameters=yarn, original_max_position_embeddings=3000, factor=9.0, attention_factor=7.0)
    assert outside.yarn == Yarn(4.0, 3000, attention_factor=0.1 * math.log(4) + 1)
    wider = parse(rope_parameters=yarn | {"original_max_position_embeddings": 2048}, max_position_embeddings=10_000)
    assert wider.max_position_embeddings == 10_000


def test_yarn_that_states_no_theta_takes_that_of_transformers_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    config = parse(rope_scaling={"type": "yarn", "factor": 4.0})
    assert (config.rope_theta, parse().rope_theta) == (1e4, 1e7)
    assert "Copy rope_theta into the section with yarn" in caplog.text
    caplog.clear()
    assert parse(rope_scaling={"type": "yarn", "factor": 4.0}, rope_theta=2e6).rope_theta == 2e6
    assert not caplog.text


@pytest.mark.parametrize(
    "change",
    [
        {"factor": 0.5}, {"factor": "4"}, {"original_max_position_embeddings": 0}, {"beta_fast": -1}, {"rope_theta": 1},
        {"truncate": "no"}, {"attention_factor": float("nan")}, {"mscale": [1]},
    ],
    ids=str,
)  # fmt: skip
def test_malformed_yarn(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"{next(iter(change))}.* expected"):
        parse(rope_parameters=YARN | {"rope_type": "yarn"} | change)


@pytest.mark.parametrize("case", FREQUENCIES)
def test_frequencies_are_those_of_transformers(case: str) -> None:
    """Recorded by tools/record_golden.py, which computes in float32."""
    golden = json.loads((GOLDEN / "frequencies.json").read_text())[case]
    config = parse(head_dim=256, max_position_embeddings=262144, rope_parameters=FREQUENCIES[case])
    np.testing.assert_allclose(config.rope_frequencies, golden["frequencies"], rtol=2e-6)
    assert config.yarn is not None
    assert config.yarn.attention_factor == pytest.approx(golden["attention_factor"], rel=1e-12)


@pytest.mark.parametrize("factor", [0.1, 0.01, 1.5, float("inf"), 10**400], ids=["odd", "none", "all", "inf", "huge"])
def test_impossible_rotary_factor_is_refused(factor: float) -> None:
    with pytest.raises(ConfigError, match=r"rotary dimensions|partial_rotary_factor"):
        parse(rope_parameters={"partial_rotary_factor": factor})


def test_layer_types_are_derived_from_the_interval() -> None:
    kinds = parse(num_hidden_layers=7, full_attention_interval=3).layer_types
    assert kinds == (LINEAR, LINEAR, FULL, LINEAR, LINEAR, FULL, LINEAR)


def test_given_layer_types_win_over_the_interval() -> None:
    kinds = [FULL, LINEAR, LINEAR, FULL]
    assert parse(layer_types=kinds, full_attention_interval=2).layer_types == tuple(kinds)


@pytest.mark.parametrize(
    "kinds",
    [[FULL] * 3, [FULL] * 5, [FULL, LINEAR, FULL, "sliding_attention"], [FULL, LINEAR, FULL, []]],
    ids=["too few", "too many", "unknown", "no string"],
)
def test_wrong_layer_types_are_refused(kinds: list[Any]) -> None:
    with pytest.raises(ConfigError, match=r"layer_types is .*expected 4 entries"):
        parse(layer_types=kinds)


def test_load_reads_config_json(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(text_config()))
    assert loaded(tmp_path) == parse()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist; expected a folder with config.json"),
        (b"", "cannot be read as JSON"),
        (b'{"model_type": ', "cannot be read as JSON"),
        (b"\xff\xfe\x00", "cannot be read as JSON"),
        (b"[" * 100_000, "cannot be read as JSON"),
        (b"[]", "holds list, expected a JSON object"),
        (b"null", "holds NoneType, expected a JSON object"),
    ],
    ids=["missing", "empty", "cut off", "no text", "deeply nested", "list", "null"],
)
def test_unreadable_file(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        loaded(tmp_path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-10, 10) | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)


@given(key=st.sampled_from(sorted(next_config() | text_config() | {"layer_types": 0})), value=JSON)
def test_any_value_for_any_key_is_taken_or_refused(key: str, value: Any) -> None:
    raw = next_config(**{key: value})
    try:
        family_of("qwen3_next").config(raw)
    except ConfigError as error:
        assert str(error)
