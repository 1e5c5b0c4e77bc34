"""Sources that other libraries have quantised: what they are converted to, bit for bit."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from foreign_layouts import LAYOUTS, content, save, write_foreign, write_fused_fp8

from flash_moe import CheckpointError, Model
from flash_moe.packing.convert import convert
from flash_moe.packing.info import describe
from flash_moe.packing.verify import verify

TOKENS = [17, 250, 3, 99, 140, 8, 8, 61, 230, 77, 5]


def logits(folder: Path, **options: object) -> np.ndarray:
    with Model.load(folder, experts_per_token=None, dtype="float32", **options) as model:
        return np.array(model.logits(TOKENS))


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name.endswith(" FP8")])
@pytest.mark.parametrize("options", [{}, {"bits": 8, "rounding": "nearest"}, {"mode": "mxfp8"}], ids=str)
def test_fp8_converts_as_the_bf16_that_it_stands_for(layout: str, options: dict, tmp_path: Path) -> None:
    foreign, plain, _ = write_foreign(tmp_path, layout)
    assert convert(foreign, tmp_path / "a", group_size=32, **options) == convert(
        plain, tmp_path / "b", group_size=32, **options
    )
    files = sorted(file.name for file in (tmp_path / "b").iterdir())
    assert sorted(file.name for file in (tmp_path / "a").iterdir()) == files
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file


def test_fp8_experts_in_one_tensor(tmp_path: Path) -> None:
    foreign, plain = write_fused_fp8(tmp_path)
    assert convert(foreign, tmp_path / "a") == convert(plain, tmp_path / "b") == []
    for file in (tmp_path / "b").iterdir():
        assert (tmp_path / "a" / file.name).read_bytes() == file.read_bytes(), file


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name.endswith(("FP4", "MXFP8"))])
def test_what_mlx_has_a_mode_for_is_repacked_bit_for_bit(layout: str, tmp_path: Path) -> None:
    foreign, plain, tensors = write_foreign(tmp_path, layout)
    assert convert(foreign, tmp_path / "packed") == []
    mode = layout.split()[-1].lower()
    scaled = mode == "nvfp4"
    assert describe(tmp_path / "packed").expert_formats == {f"{mode} with a global scale" if scaled else mode: 2}
    layer = json.loads((tmp_path / "packed" / "flash_moe.json").read_text())["layers"]["1"]
    stride = layer["layout"]["stride"]
    records = (tmp_path / "packed" / layer["file"]).read_bytes()[-4 * stride :]
    for expert in range(4):
        record, at = records[expert * stride : (expert + 1) * stride], 0
        for projection in ("gate_proj", "up_proj", "down_proj"):
            prefix = f"model.language_model.layers.1.mlp.experts.{expert}.{projection}."
            weight = tensors.get(prefix + "weight") or tensors[prefix + "weight_packed"]
            for part in (content(weight[1]), content(tensors[prefix + "weight_scale"][1])):
                assert record[at : at + len(part)] == part
                at += -(-len(part) // 64) * 64
            at += 64 if scaled else 0
    packed = logits(tmp_path / "packed")
    for store in ("slots", "resident"):
        np.testing.assert_array_equal(logits(tmp_path / "packed", expert_io=store), packed)
    # floats become 8-bit in both, and what stands for NVFP4 survives that nearly unchanged
    convert(foreign, tmp_path / "8-bit", bits=8, group_size=32)
    convert(plain, tmp_path / "plain-8-bit", bits=8, group_size=32)
    np.testing.assert_allclose(logits(tmp_path / "8-bit"), logits(tmp_path / "plain-8-bit"), atol=0.08)
    verify(tmp_path / "packed")


def test_a_stated_global_scale_of_an_always_read_matrix_is_missed(tmp_path: Path) -> None:
    foreign, _, _ = write_foreign(tmp_path, "ModelOpt NVFP4")
    convert(foreign, tmp_path / "packed")
    for file in (tmp_path / "packed").glob("model-resident-*.safetensors"):
        held = {name: a for name, a in mx.load(str(file)).items() if not name.endswith("global_scale")}
        mx.save_safetensors(str(file), held)
    index = tmp_path / "packed" / "model.safetensors.index.json"
    places = json.loads(index.read_text())["weight_map"]
    left = {name: file for name, file in places.items() if not name.endswith("global_scale")}
    index.write_text(json.dumps({"weight_map": left}))
    with pytest.raises(CheckpointError, match=r"states a global scale of .*, but .*global_scale is in no file"):
        Model.load(tmp_path / "packed")


def test_foreign_weights_are_not_run_but_named(tmp_path: Path) -> None:
    foreign, _, _ = write_foreign(tmp_path, "Qwen FP8")
    with pytest.raises(CheckpointError, match=r"'fp8', expected MLX's .*flash-moe convert"):
        Model.load(foreign)


def test_a_global_scale_is_missed(tmp_path: Path) -> None:
    lost = "model.language_model.layers.1.mlp.experts.2.up_proj.weight_scale_2"
    foreign, _, _ = write_foreign(tmp_path, "ModelOpt NVFP4", without=lost)
    with pytest.raises(CheckpointError, match=r"experts\.2\.up_proj\.weight' lack their global scale"):
        convert(foreign, tmp_path / "packed")


OUT_PROJ = "model.language_model.layers.0.linear_attn.out_proj"


def replaced(folder: Path, layout: str, name: str, change: Callable[[str, mx.array], tuple[str, mx.array]]) -> Path:
    """A checkpoint of another library with one tensor changed."""
    foreign, _, tensors = write_foreign(folder, layout, without=name)
    save(foreign / "more.safetensors", {name: change(*tensors[name])})
    return foreign


@pytest.mark.parametrize("shape", [(1, 2), (1, 1), (3, 2), (3, 1), (2,)], ids=str)
def test_fp8_scales_outside_the_experts_belong_to_the_blocks(shape: tuple[int, ...], tmp_path: Path) -> None:
    """out_proj has 192 rows and 128 columns."""
    foreign = replaced(
        tmp_path, "Qwen FP8", f"{OUT_PROJ}.weight_scale_inv", lambda dtype, _: (dtype, mx.ones(shape, mx.bfloat16))
    )
    with pytest.raises(
        CheckpointError, match=rf"{re.escape(str(list(shape)))} for weights of \[192, 128\].*: \[2, 1\]"
    ):
        convert(foreign, tmp_path / "packed")


def test_fp8_in_other_blocks_is_refused(tmp_path: Path, edit_config: Callable) -> None:
    foreign, _, _ = write_foreign(tmp_path, "Qwen FP8")
    edit_config(foreign, lambda config: config["quantization_config"].update(weight_block_size=[64, 64]))
    with pytest.raises(CheckpointError, match=r"states blocks of \[64, 64\] weights, expected \[128, 128\]"):
        convert(foreign, tmp_path / "packed")


def test_a_block_of_two_projections_is_refused(tmp_path: Path) -> None:
    foreign, _ = write_fused_fp8(tmp_path, moe_intermediate_size=64)
    with pytest.raises(CheckpointError, match=r"gate_up_proj_scale_inv' has scales of shape \[4, 1, 2\]"):
        convert(foreign, tmp_path / "packed")


def test_a_global_scale_is_one_number(tmp_path: Path) -> None:
    foreign = replaced(tmp_path, "ModelOpt NVFP4", f"{OUT_PROJ}.weight_scale_2", lambda dtype, _: (dtype, mx.ones(2)))
    with pytest.raises(CheckpointError, match=r"weight_scale_2' is F32 \[2\] .* expected one F32 for each matrix"):
        convert(foreign, tmp_path / "packed")


def test_zeros_belong_to_the_groups(tmp_path: Path) -> None:
    foreign = replaced(
        tmp_path, "GPTQ integers", f"{OUT_PROJ}.qzeros", lambda dtype, zeros: (dtype, mx.contiguous(zeros.T))
    )
    with pytest.raises(CheckpointError, match="do not belong together"):
        convert(foreign, tmp_path / "packed")


def test_fp8_scales_of_another_shape_are_refused(tmp_path: Path) -> None:
    lost = "model.language_model.layers.0.mlp.experts.0.gate_proj.weight_scale_inv"
    foreign, _, tensors = write_foreign(tmp_path, "Qwen FP8", without=lost)
    save(foreign / "more.safetensors", {lost: ("BF16", tensors[lost][1][:, :1])})
    with pytest.raises(CheckpointError, match=r"scales of shape \[2, 1\] for weights of \[160, 192\].*: \[2, 2\]"):
        convert(foreign, tmp_path / "packed")


SLOW = {"GPTQ v2 8-bit integers", "AutoRound integers"}  # as GPTQ, but for config.json and bits


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(name, marks=pytest.mark.slow if name in SLOW else ())
        for name in LAYOUTS
        if name.endswith("integers")
    ],
)
def test_integers_keep_their_values(layout: str, tmp_path: Path) -> None:
    """Codes and scales are the same; a bias is rounded to the scales' dtype, which is exact where zeros are symmetric."""
    foreign, plain, _ = write_foreign(tmp_path, layout)
    assert convert(foreign, tmp_path / "packed") == []
    bits = 8 if "8-bit" in layout else 4
    assert describe(tmp_path / "packed").expert_formats == {f"{bits}-bit, groups of 32": 2}
    verify(tmp_path / "packed")
    found = logits(tmp_path / "packed")
    np.testing.assert_allclose(found, logits(plain), atol=1e-2 if "AWQ" in layout else 1e-4)
    # and quantised anew as what they stand for
    convert(foreign, tmp_path / "8-bit", bits=8, group_size=32, rounding="nearest")
    np.testing.assert_allclose(logits(tmp_path / "8-bit"), logits(plain), atol=0.08)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"desc_act": True}, "GPTQ with desc_act"),
        ({"checkpoint_format": "marlin"}, "GPTQ of format 'marlin'"),
        ({"checkpoint_format": ["gptq"]}, "GPTQ of format"),
        ({"bits": 3}, "integers of 3 bits"),
        ({"quant_method": "awq", "version": "gemv"}, "AWQ of version 'gemv'"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {
            "g": {"weights": {"num_bits": 4, "actorder": "group"}}}}, "actorder"),
        ({"quant_method": "awq"}, "do not belong together"),
        ({"quant_method": "bitsandbytes"}, "'bitsandbytes', expected MLX's"),
    ],
    ids=str,
)  # fmt: skip
def test_integers_that_mlx_cannot_have_are_refused(
    changes: dict, words: str, tmp_path: Path, edit_config: Callable
) -> None:
    foreign, _, _ = write_foreign(tmp_path, "GPTQ integers")
    edit_config(foreign, lambda config: config["quantization_config"].update(changes))
    with pytest.raises(CheckpointError, match=words):
        convert(foreign, tmp_path / "packed")
    assert not (tmp_path / "packed").exists()


@pytest.mark.parametrize("name", [f"{OUT_PROJ}.g_idx", "model.language_model.layers.1.mlp.experts.2.up_proj.g_idx"])
def test_scattered_groups_are_refused_whatever_config_json_says(name: str, tmp_path: Path) -> None:
    foreign = replaced(tmp_path, "GPTQ integers", name, lambda dtype, groups: (dtype, groups[::-1]))
    with pytest.raises(CheckpointError, match=rf"{re.escape(name)}' scatters groups over a row"):
        convert(foreign, tmp_path / "packed")
    zeros = replaced(tmp_path / "z", "GPTQ integers", name, lambda dtype, groups: (dtype, mx.zeros_like(groups)))
    convert(zeros, tmp_path / "packed")  # older files leave the order out in this way


def test_factors_of_inputs_are_refused(tmp_path: Path) -> None:
    foreign, _, _ = write_foreign(tmp_path, "ModelOpt NVFP4")
    name = "model.language_model.layers.1.mlp.experts.2.up_proj.pre_quant_scale"
    save(foreign / "more.safetensors", {name: ("F32", mx.ones(192))})
    with pytest.raises(CheckpointError, match=r"up_proj\.pre_quant_scale', a factor of the inputs"):
        convert(foreign, tmp_path / "packed")


@pytest.mark.parametrize("layout", ["compressed-tensors integers", "compressed-tensors NVFP4"])
def test_rotated_weights_are_refused(layout: str, tmp_path: Path, edit_config: Callable) -> None:
    foreign, _, _ = write_foreign(tmp_path, layout)
    groups = {"u": {"type": "hadamard", "apply": [{"targets": ["Linear"], "location": "input"}]}}
    edit_config(foreign, lambda c: c["quantization_config"].update(transform_config={"config_groups": groups}))
    with pytest.raises(CheckpointError, match="has a transform_config"):
        convert(foreign, tmp_path / "packed")
