from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from damage import INDEX, edit_json, remove_tensor, replace_tensor
from expected_records import rewrite, stored_tensors
from safetensors.numpy import load_file, save_file

from flash_moe import CheckpointError, ConfigError, Model
from flash_moe.models import open_model

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
Copy = Callable[[str], Path]


def refused(folder: Path, *words: str) -> str:
    """Loads a model that cannot be loaded; its message must hold all ``words``."""
    with pytest.raises(CheckpointError) as caught:
        Model.load(folder)
    for word in words:
        assert word in str(caught.value)
    return str(caught.value)


def test_every_tensor_is_found_once(tiny_checkpoints: dict[str, Path]) -> None:
    for form in ("fused", "separate", "quantized"):
        checkpoint = open_model(tiny_checkpoints[form])
        found = [info.name for info in [*checkpoint.resident.values(), *checkpoint.experts.values()]]
        assert sorted(found) == sorted(stored_tensors(tiny_checkpoints[form]))


def test_a_checkpoint_needs_no_index(tiny_copy: Copy) -> None:
    folder = tiny_copy("fused")
    before = open_model(folder)
    (folder / INDEX).unlink()
    after = open_model(folder)
    assert (after.resident, after.experts) == (before.resident, before.experts)


def test_files_that_the_index_does_not_name_are_left_alone(tiny_copy: Copy) -> None:
    folder = tiny_copy("fused")
    (folder / "consolidated.safetensors").write_bytes(b"not even a header")
    open_model(folder)


def test_files_without_metadata_as_mlx_writes_them(tiny_copy: Copy) -> None:
    """``mx.save_safetensors`` writes ``"__metadata__": null``."""
    folder = tiny_copy("quantized")
    before = open_model(folder)
    with Model.load(folder, experts_per_token=None) as model:
        expected = np.array(model.logits([1, 2]))
    for file in sorted(folder.glob("*.safetensors")):
        mx.save_safetensors(str(file), dict(mx.load(str(file))))
        assert b'"__metadata__":null' in file.read_bytes()[:100_000]
    after = open_model(folder)
    assert (after.resident.keys(), after.experts.keys()) == (before.resident.keys(), before.experts.keys())
    with Model.load(folder, experts_per_token=None) as model:
        np.testing.assert_array_equal(np.array(model.logits([1, 2])), expected)


def test_notes_of_macos_are_no_shards(tiny_copy: Copy) -> None:
    """On exFAT and SMB, macOS writes a file ._x beside every file x."""
    folder = tiny_copy("fused")
    (folder / INDEX).unlink()
    before = open_model(folder)
    for file in list(folder.iterdir()):
        (folder / f"._{file.name}").write_bytes(b"\0\5\x16\7" + bytes(4092))
    assert open_model(folder).resident == before.resident


def add_to_index(folder: Path, **files: str) -> None:
    edit_json(folder / INDEX, lambda index: index["weight_map"].update(files))


MTP, VISION = "mtp.layers.0.mlp.gate.weight", "model.visual.patch_embed.proj.weight"


def test_what_the_index_names_and_nobody_needs_may_be_missing(tiny_copy: Copy) -> None:
    folder = tiny_copy("fused")
    before = open_model(folder)
    add_to_index(folder, **{MTP: "mtp.safetensors", VISION: FIRST})
    assert open_model(folder).resident == before.resident
    (folder / "mtp.safetensors").write_bytes(b"not even a header")
    assert open_model(folder).resident == before.resident


def test_index_of_nothing_that_is_needed(tiny_copy: Copy) -> None:
    folder = tiny_copy("fused")
    before = open_model(folder)
    (folder / INDEX).write_text(json.dumps({"weight_map": {MTP: FIRST}}))
    assert open_model(folder).resident == before.resident


def merge(folder: Path) -> Path:
    """Puts all tensors into one file beside the shards."""
    tensors: dict[str, np.ndarray] = {}
    for file in (FIRST, SECOND):
        tensors |= load_file(folder / file)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder / "model.safetensors"


@pytest.mark.parametrize("left", [[], [FIRST]], ids=["no shard", "a shard"])
def test_stale_index_beside_one_complete_file(tiny_copy: Copy, left: list[str], caplog: Any) -> None:
    folder = tiny_copy("fused")
    with Model.load(folder, experts_per_token=None) as model:
        expected = np.array(model.logits([1, 2]))
    merged = merge(folder)
    for file in {FIRST, SECOND} - set(left):
        (folder / file).unlink()
    checkpoint = open_model(folder)
    assert {info.file for info in [*checkpoint.resident.values(), *checkpoint.experts.values()]} == {merged}
    assert "reading model.safetensors instead" in caplog.text
    with Model.load(folder, experts_per_token=None) as model:
        np.testing.assert_array_equal(np.array(model.logits([1, 2])), expected)


def test_stale_index_of_the_one_complete_file(tiny_copy: Copy) -> None:
    """As left behind where a model was quantised anew into its own folder."""
    folder = tiny_copy("fused")
    merge(folder)
    (folder / FIRST).unlink()
    (folder / SECOND).unlink()
    weights = {f"model.layers.0.mlp.experts.{name}": "model.safetensors" for name in ("down_proj", "gate_up_proj")}
    (folder / INDEX).write_text(json.dumps({"weight_map": weights}))
    with Model.load(folder, experts_per_token=None) as model:
        model.logits([1, 2])


def test_a_file_that_is_not_complete_does_not_replace_missing_shards(tiny_copy: Copy) -> None:
    folder = tiny_copy("fused")
    rewrite(merge(folder), lambda tensors: tensors.pop("lm_head.weight"))
    (folder / SECOND).unlink()
    refused(folder, "lacks 1 of the 2 files", SECOND, "finish the download")


@pytest.mark.parametrize("dtype", ["F4", "F6_E2M3", "C64", "F8_E4M3FNUZ", "no dtype"])
def test_tensors_that_nobody_needs_may_have_any_dtype(tiny_copy: Copy, dtype: str) -> None:
    folder = tiny_copy("fused")
    with Model.load(folder, experts_per_token=None) as model:
        expected = np.array(model.logits([1, 2]))
    for file in (FIRST, SECOND):
        name = f"{MTP}.{file}"
        rewrite(folder / file, lambda tensors, name=name: tensors.update({name: np.zeros(6, np.uint8)}))
        content = (folder / file).read_bytes()
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        header[name]["dtype"] = dtype
        text = json.dumps(header).encode()
        (folder / file).write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    with Model.load(folder, experts_per_token=None) as model:
        np.testing.assert_array_equal(np.array(model.logits([1, 2])), expected)


def test_no_config(tiny_copy: Copy) -> None:
    folder = tiny_copy("fused")
    (folder / "config.json").unlink()
    with pytest.raises(ConfigError, match="does not exist"):
        Model.load(folder)


def test_no_weights_at_all(tiny_copy: Copy) -> None:
    folder = tiny_copy("fused")
    for file in [*folder.glob("*.safetensors"), folder / INDEX]:
        file.unlink()
    refused(folder, "holds no *.safetensors file")


def test_missing_shard(tiny_copy: Copy) -> None:
    folder = tiny_copy("fused")
    (folder / SECOND).unlink()
    refused(folder, "lacks 1 of the 2 files", SECOND, "finish the download")


@pytest.mark.parametrize("keep", [0, 5, 1000, -1], ids=["empty", "in the length", "in the header", "one byte short"])
def test_truncated_shard(tiny_copy: Copy, keep: int) -> None:
    file = tiny_copy("fused") / FIRST
    content = file.read_bytes()
    file.write_bytes(content[:keep])
    refused(file.parent, str(file), "truncated", "download it again")


def test_tensor_left_over_in_another_shard(tiny_copy: Copy) -> None:
    folder = tiny_copy("fused")
    name = "model.language_model.norm.weight"
    owner = json.loads((folder / INDEX).read_text())["weight_map"][name]
    other = FIRST if owner == SECOND else SECOND
    rewrite(folder / other, lambda tensors: tensors.update({name: np.zeros(64, np.float32)}))
    refused(folder, repr(name), FIRST, SECOND, "remove the stale file")


def test_same_weight_under_two_names(tiny_copy: Copy) -> None:
    folder = tiny_copy("fused")
    rewrite(folder / FIRST, lambda tensors: tensors.update({"model.norm.weight": np.zeros(64, np.float32)}))
    refused(folder, "'model.norm.weight'", "'model.language_model.norm.weight'", "same weight")


def test_stale_file_without_an_index(tiny_copy: Copy) -> None:
    folder = tiny_copy("fused")
    (folder / INDEX).unlink()
    shutil.copyfile(folder / FIRST, folder / "old.safetensors")
    refused(folder, "old.safetensors", "remove the stale file")


def test_index_names_a_tensor_that_is_nowhere(tiny_copy: Copy) -> None:
    folder = tiny_copy("fused")
    name = remove_tensor(folder, "layers.0.mlp.gate.weight", from_index=False)
    refused(folder, INDEX, repr(name), "download")


def test_index_names_the_wrong_shard(tiny_copy: Copy) -> None:
    folder = tiny_copy("fused")

    def swap(index: Any) -> None:
        owner = index["weight_map"]["lm_head.weight"]
        index["weight_map"]["lm_head.weight"] = FIRST if owner == SECOND else SECOND

    edit_json(folder / INDEX, swap)
    refused(folder, INDEX, "'lm_head.weight'", "download")


@pytest.mark.parametrize("file", ["../other.safetensors", "/etc/passwd", "sub/a.safetensors", 5, None], ids=repr)
def test_index_may_only_name_files_of_the_folder(tiny_copy: Copy, file: Any) -> None:
    folder = tiny_copy("fused")
    shutil.copyfile(folder / FIRST, folder.parent / "other.safetensors")  # it exists: only the rule forbids it
    edit_json(folder / INDEX, lambda index: index["weight_map"].update({"lm_head.weight": file}))
    refused(folder, INDEX, "must name a file of this folder", "download it again")


@pytest.mark.parametrize(
    "file", ["", "..", ".", "a\0b", "a" * 5000, "é" * 128, "\ud800"], ids=["empty", "..", ".", "0", "5000", "é", "half"]
)
def test_index_naming_no_file(tiny_copy: Copy, file: str) -> None:
    folder = tiny_copy("fused")
    edit_json(folder / INDEX, lambda index: index["weight_map"].update({"lm_head.weight": file}))
    refused(folder, INDEX, "download")


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": "x"}', "[" * 100_000],
    ids=["empty", "list", "no weight map", "list as map", "text as map", "deeply nested"],
)  # fmt: skip
def test_damaged_index(tiny_copy: Copy, text: str) -> None:
    folder = tiny_copy("fused")
    (folder / INDEX).write_text(text)
    refused(folder, INDEX, "download it again")


@pytest.mark.parametrize(
    "name",
    [
        "embed_tokens.weight",
        "language_model.norm.weight",
        "lm_head.weight",
        "layers.0.input_layernorm.weight",
        "layers.0.linear_attn.in_proj_qkv.weight",
        "layers.0.linear_attn.conv1d.weight",
        "layers.0.linear_attn.A_log",
        "layers.0.mlp.gate.weight",
        "layers.0.mlp.shared_expert.up_proj.weight",
        "layers.1.self_attn.q_proj.weight",
        "layers.1.self_attn.k_norm.weight",
    ],
)
class TestResidentTensor:
    def test_missing(self, tiny_copy: Copy, name: str) -> None:
        folder = tiny_copy("fused")
        remove_tensor(folder, name)
        refused(folder, name.removeprefix("language_model."), "download it again")

    def test_of_the_wrong_shape(self, tiny_copy: Copy, name: str) -> None:
        folder = tiny_copy("fused")
        replace_tensor(folder, name, lambda tensor: np.concatenate([tensor, tensor]))
        refused(folder, name.removeprefix("language_model."), "shape", "do not belong together")

    def test_of_the_wrong_rank(self, tiny_copy: Copy, name: str) -> None:
        folder = tiny_copy("fused")
        replace_tensor(folder, name, lambda tensor: tensor[None])
        refused(folder, name.removeprefix("language_model."), "shape")

    @pytest.mark.parametrize("dtype", ["int64", "uint8"])
    def test_of_the_wrong_dtype(self, tiny_copy: Copy, name: str, dtype: str) -> None:
        folder = tiny_copy("fused")
        file = replace_tensor(folder, name, lambda tensor: tensor.astype(dtype))
        refused(folder, str(file), name, "expected BF16, F16, F32")


@pytest.mark.parametrize("part", ["scales", "biases"])
def test_quantised_tensor_without_its_scales_or_biases(tiny_copy: Copy, part: str) -> None:
    folder = tiny_copy("quantized")
    remove_tensor(folder, f"embed_tokens.{part}")
    refused(folder, "embed_tokens")


@pytest.mark.parametrize(
    ("section", "words"),
    [
        (None, ("no quantization section", "restore the original config.json")),
        ({"bits": 4, "group_size": 64}, ("config.json asks for",)),
        ({"bits": 8, "group_size": 32}, ("config.json asks for",)),
        ({"bits": 4, "group_size": 32, "mode": "mxfp4"}, ("of dtype F32", "mode mxfp4")),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, ("'fp8'", "Use the bf16 checkpoint")),
        ({"quant_method": "awq", "zero_point": True}, ("'awq'", "mlx_lm.convert")),
        ({"bits": 4, "group_size": 33}, ("groups of 33", "expected one of")),
        ({"bits": "4", "group_size": 32}, ("'4' bits", "expected one of")),
        ("int4", ("'int4'", "mlx_lm.convert")),
    ],
    ids=["missing", "group size", "bits", "mode", "fp8", "awq", "impossible group", "text as bits", "text"],
)
def test_quantization_section(tiny_copy: Copy, section: Any, words: tuple[str, ...]) -> None:
    folder = tiny_copy("quantized")

    def change(config: Any) -> None:
        config.pop("quantization", None)
        config.pop("quantization_config", None)
        if section is not None:
            config["quantization"] = section

    edit_json(folder / "config.json", change)
    refused(folder, *words)


def test_older_name_of_the_quantization_section(tiny_copy: Copy) -> None:
    folder = tiny_copy("quantized")
    edit_json(folder / "config.json", lambda config: config.update(quantization_config=config.pop("quantization")))
    with Model.load(folder) as renamed:
        renamed.logits([1, 2])


@pytest.mark.parametrize("form", ["fused", "separate", "quantized", "packed"])
def test_undamaged_checkpoints_load(tiny_checkpoints: dict[str, Path], form: str) -> None:
    with Model.load(tiny_checkpoints[form], experts_per_token=None) as model:
        assert model.logits([1, 2, 3]).shape == (3, 288)
