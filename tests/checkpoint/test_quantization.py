"""What config.json states about quantisation, against the shapes of the stored tensors."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from damage import edit_json
from expected_records import rewrite, stored_tensors
from random_checkpoint import text_config, write_checkpoint

from flash_moe import CheckpointError, Model
from flash_moe.checkpoint.quantization import QuantizationMap
from flash_moe.checkpoint.safetensors import TensorInfo
from flash_moe.packing.convert import convert
from flash_moe.record import Quantization

Copy = Callable[[str], Path]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory, mlx_quantize: Callable[..., Path]) -> Path:
    """4 bits in groups of 32, with gates and all routed experts' down projections at 8 bits in groups of 64."""
    folder = tmp_path_factory.mktemp("mixed")
    text = text_config(num_hidden_layers=2, full_attention_interval=2, num_experts=4, num_experts_per_tok=2)
    source = write_checkpoint(folder / "float", text)

    def eight(path: str, module: Any) -> Any:
        wide = path.endswith((".gate", ".shared_expert_gate", "switch_mlp.down_proj"))
        return {"bits": 8, "group_size": 64} if wide else hasattr(module, "to_quantized")

    return mlx_quantize(source, folder / "mixed", q_bits=4, q_group_size=32, quant_predicate=eight)


def logits(folder: Path) -> np.ndarray:
    with Model.load(folder, experts_per_token=None, dtype="float32") as model:
        return np.array(model.logits([1, 2, 3]))


def change_overrides(folder: Path, change: Callable[[str, dict[str, Any]], tuple[str, dict[str, Any]] | None]) -> None:
    def edit(config: Any) -> None:
        section = {}
        for key, value in config["quantization"].items():
            if not isinstance(value, dict):
                section[key] = value
            elif (pair := change(key, value)) is not None:
                section[pair[0]] = pair[1]
        config["quantization"] = section
        config.pop("quantization_config", None)

    edit_json(folder / "config.json", edit)


def copied(mixed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(mixed, tmp_path / "copy"))


def test_an_override_takes_nothing_from_the_section(mixed: Path, tmp_path: Path) -> None:
    folder = copied(mixed, tmp_path)
    expected = logits(folder)
    change_overrides(folder, lambda key, value: (key, {"bits": 8}))  # MLX's default is 64, the section's is 32
    np.testing.assert_array_equal(logits(folder), expected)
    change_overrides(folder, lambda key, value: (key, {"group_size": 64}))
    np.testing.assert_array_equal(logits(folder), expected)
    change_overrides(folder, lambda key, value: (key, {}))
    np.testing.assert_array_equal(logits(folder), expected)


def test_an_override_has_its_own_mode() -> None:
    section = {"bits": 4, "group_size": 32, "mode": "affine", "lm_head": {"bits": 4, "group_size": 32, "mode": "mxfp4"}}
    quantization = QuantizationMap.from_config({"quantization": section})
    weight = TensorInfo("w", "U32", (8, 32), Path("model.safetensors"), 0, 0)
    scales = TensorInfo("s", "U8", (8, 8), Path("model.safetensors"), 0, 0)
    assert quantization.of(["lm_head"], weight, scales) == Quantization(4, 32, "mxfp4")


@pytest.mark.parametrize("groups", [1, 2, 32, 0], ids=str)
def test_scales_of_a_byte_for_groups_of_no_mode(groups: int) -> None:
    quantization = QuantizationMap.from_config({"quantization": {"bits": 4, "group_size": 32, "mode": "mxfp4"}})
    weight = TensorInfo("w", "U32", (8, 32), Path("model.safetensors"), 0, 0)
    scales = TensorInfo("s", "U8", (8, groups), Path("model.safetensors"), 0, 0)
    with pytest.raises(CheckpointError, match=r"expected 64 \(nvfp4\), 128 \(mxfp4\) or 256"):
        quantization.of(["lm_head"], weight, scales)


@pytest.mark.parametrize("spelling", ["mlp.experts", "mlp.experts.{}", "mlp.switch_mlp"])
@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model.", "model."])
def test_overrides_may_use_the_names_of_the_file(mixed: Path, tmp_path: Path, spelling: str, prefix: str) -> None:
    folder = copied(mixed, tmp_path)
    expected = logits(folder)

    def rename(key: str, value: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        key = key.replace("language_model.model.", prefix)
        return key.replace("mlp.switch_mlp", spelling.format(0)), value

    change_overrides(folder, rename)
    np.testing.assert_array_equal(logits(folder), expected)
    assert convert(folder, tmp_path / "packed") == []
    np.testing.assert_array_equal(logits(tmp_path / "packed"), expected)


def test_what_is_stated_and_wrong_is_refused(mixed: Path, tmp_path: Path) -> None:
    folder = copied(mixed, tmp_path)
    change_overrides(folder, lambda key, value: None)
    with pytest.raises(CheckpointError, match=r"config\.json asks for"):
        logits(folder)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_shapes_complete_what_is_left_open(bits: int, group_size: int) -> None:
    file, columns = Path("model.safetensors"), 256
    weight = TensorInfo("w", "U32", (8, columns * bits // 32), file, 0, 0)
    scales = TensorInfo("s", "F16", (8, columns // group_size), file, 0, 0)
    for stated in ({"bits": bits}, {"group_size": group_size}, {"bits": bits, "group_size": group_size}):
        quantization = QuantizationMap.from_config({"quantization": {"bits": 6, "group_size": 32, "lm_head": stated}})
        assert quantization.of(["lm_head"], weight, scales) == Quantization(bits, group_size)


@pytest.mark.parametrize("modules", [["gate_up_proj", "gate_proj"], ["gate_proj", "gate_up_proj"]])
def test_an_override_for_fused_projections_holds_for_their_halves_and_the_reverse(modules: list[str]) -> None:
    file = Path("model.safetensors")
    weight = TensorInfo("w", "U32", (8, 64), file, 0, 0)
    scales = TensorInfo("s", "F16", (8, 4), file, 0, 0)
    section = {"bits": 4, "group_size": 32, f"layers.0.mlp.experts.{modules[1]}": {"bits": 8}}
    quantization = QuantizationMap.from_config({"quantization": section})
    paths = [f"layers.0.mlp.switch_mlp.{name}" for name in modules]
    assert quantization.of(paths, weight, scales) == Quantization(8, 64)


FOREIGN = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True},
    "auto-round": {
        "quant_method": "auto-round",
        "bits": 4,
        "group_size": 128,
        "packing_format": "auto_round:auto_gptq",
    },
    "compressed-tensors": {"quant_method": "compressed-tensors", "config_groups": {}},
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "some day's": {"quant_method": "some day's", "bits": 4, "group_size": 32},
}


@pytest.mark.parametrize("place", ["quantization_config", "text_config"])
@pytest.mark.parametrize("method", FOREIGN)
def test_quantisation_of_another_library_is_named(tiny_copy: Copy, method: str, place: str) -> None:
    folder = tiny_copy("fused")
    section = {"quantization_config": FOREIGN[method]}
    edit_json(
        folder / "config.json",
        lambda config: (config["text_config"] if place == "text_config" else config).update(section),
    )
    for file in folder.glob(
        "*.safetensors"
    ):  # as such a checkpoint has it: the experts under names that we do not know
        rewrite(file, lambda tensors: [tensors.pop(name) for name in list(tensors) if ".experts." in name])
    with pytest.raises(CheckpointError, match=f"{method}.* expected MLX's affine form .* mlx_lm.convert"):
        Model.load(folder)


@pytest.mark.parametrize(
    ("ending", "method"),
    [
        ("qweight", "GPTQ or AWQ"),
        ("weight_packed", "compressed-tensors"),
        ("weight_scale_inv", "FP8"),
        ("weight.absmax", "bitsandbytes"),
    ],
)
def test_quantisation_that_only_the_tensors_show(tiny_copy: Copy, ending: str, method: str) -> None:
    """Older files of AutoGPTQ and AutoAWQ say nothing in config.json."""
    folder = tiny_copy("fused")
    file = sorted(folder.glob("*.safetensors"))[0]
    name = next(name for name in stored_tensors(folder) if "experts.down_proj" in name)
    foreign = name.replace("experts.down_proj", f"experts.0.down_proj.{ending}")
    rewrite(file, lambda tensors: (tensors.pop(name, None), tensors.update({foreign: np.zeros((4, 4), np.int32)})))
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match=rf"{ending}'?, which is {method}.* mlx_lm.convert"):
        Model.load(folder)
