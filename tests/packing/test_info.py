from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from expected_records import expected_records, stored_tensors

from flash_moe import CheckpointError, ConfigError
from flash_moe.packing.info import describe

FLOATS = 3 * 64 * 64 * 4  # bytes of a float32 record: three matrices of 64 × 64
FORMS = {
    "small_float": ("float", "F32", FLOATS),
    "small_quantized": ("MLX quantised", "4-bit, groups of 64", 16384),
    "small_packed": ("packed", "4-bit, groups of 64", 16384),
}


@pytest.mark.parametrize(("name", "expected"), FORMS.items(), ids=FORMS)
def test_form_and_sizes(request: pytest.FixtureRequest, name: str, expected: tuple[str, str, int]) -> None:
    folder = request.getfixturevalue(name)
    info = describe(folder)
    form, text, stride = expected
    assert (info.form, info.expert_formats, info.record_bytes) == (form, {text: 2}, stride)
    assert info.expert_bytes == 2 * 4 * stride
    assert info.bytes_per_token == 2 * 2 * stride
    resident = {n: t for n, t in stored_tensors(folder).items() if ".experts." not in n and ".switch_mlp." not in n}
    resident.pop("experts", None)
    assert info.resident_bytes == sum(len(data) for _, _, data in resident.values())


def test_dimensions(small_packed: Path) -> None:
    info = describe(small_packed)
    assert info.path == str(small_packed)
    assert info.model_type == "qwen3_5_moe"
    assert (info.layers, info.attention_layers, info.experts) == (2, 1, 4)
    assert (info.hidden_size, info.vocab_size, info.context) == (64, 288, 4096)


@pytest.mark.parametrize(("k", "used"), [(None, 2), (1, 1), (2, 2)])
def test_bytes_per_token_follow_the_experts_used(small_packed: Path, k: int | None, used: int) -> None:
    info = describe(small_packed, k)
    assert (info.model_experts_per_token, info.experts_per_token) == (2, used)
    assert info.bytes_per_token == used * 2 * 16384


def test_mixed_formats(small_float: Path, mlx_quantize: Callable[..., Path], tmp_path: Path) -> None:
    def predicate(path: str, module: object) -> bool | dict[str, int]:
        if not hasattr(module, "to_quantized"):
            return False
        bits = 8 if "layers.1." in path and "down_proj" in path else 4
        return {"bits": bits, "group_size": 32}

    folder = mlx_quantize(small_float, tmp_path / "mixed", quant_predicate=predicate)
    mixed = "gate_proj 4-bit, groups of 32; up_proj 4-bit, groups of 32; down_proj 8-bit, groups of 32"
    info = describe(folder)
    assert info.expert_formats == {"4-bit, groups of 32": 1, mixed: 1}
    assert info.expert_bytes == sum(map(len, expected_records(folder).values()))


def test_what_is_no_checkpoint(tmp_path: Path, small_packed: Path) -> None:
    with pytest.raises(ConfigError):
        describe(tmp_path)
    (tmp_path / "config.json").write_bytes((small_packed / "config.json").read_bytes())
    with pytest.raises(CheckpointError):
        describe(tmp_path)
