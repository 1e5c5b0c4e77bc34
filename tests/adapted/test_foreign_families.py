"""Checkpoints of mlx-lm's families that other libraries have quantised: converted to what their weights stand for."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from conversions import contents, packed_records
from family_checkpoints import checkpoint, plain
from foreign_layouts import LAYOUTS, Tensors, content, save
from hub_server import HubServer
from shard_conversions import killed, on_little_disk, served_hub  # noqa: F401

from flash_moe import ArgumentError, CheckpointError, Model, convert
from flash_moe.checkpoint.packed import Manifest
from flash_moe.packing.info import describe

PROMPT = [17, 250, 3, 99, 140, 8, 8, 61, 230, 77, 5, 44, 91, 12, 0, 201]
KEPT = re.compile(r"lm_head|embed|gate\.weight|\.e_score|router|kv_b_proj")  # what publishers leave as it is
QUANTIZED = re.compile(r"(_proj|\.w[123])\.weight$")
FORMS = {"NVFP4": "nvfp4 with a global scale", "MXFP4": "mxfp4", "MXFP8": "mxfp8", "integers": "4-bit, groups of 32"}


def write_foreign(name: str, folder: Path, layout: str, shards: int = 3) -> tuple[Path, Path, Tensors]:
    """Returns a published checkpoint as another library stores it, the float one that it stands for, and the tensors of the
    first.
    """
    store, section = LAYOUTS[layout]
    floats = checkpoint(name, folder / "floats", mode=None, published=True, shards=1)
    foreign = checkpoint(name, folder / "foreign", mode=None, published=True, shards=1)
    config = json.loads((foreign / "config.json").read_text())
    (foreign / "config.json").write_text(json.dumps(config | {"quantization_config": section}))
    (file,) = floats.glob("*.safetensors")
    tensors = {n: a.astype(mx.bfloat16) if a.ndim > 1 else a for n, a in mx.load(str(file)).items()}
    stored = {n: ({mx.bfloat16: "BF16", mx.float32: "F32"}[a.dtype], a) for n, a in tensors.items()}
    for key, array in list(tensors.items()):
        if QUANTIZED.search(key) and array.ndim == 2 and array.shape[1] % 32 == 0 and not KEPT.search(key):
            parts, tensors[key] = store(key.removesuffix(".weight"), array)
            if "NVFP4" in layout and ".experts." not in key:  # mlx-lm's modules take no global scale there
                tensors[key] = tensors[key].astype(mx.bfloat16)
            del stored[key]
            stored |= parts
    mx.save_safetensors(str(file), tensors)
    (foreign / file.name).unlink()
    names = sorted(stored)
    for i in range(shards):  # scales lie beside their weights, but for a few
        mine = names[len(names) * i // shards : len(names) * (i + 1) // shards]
        save(foreign / f"model-{i + 1:05d}-of-{shards:05d}.safetensors", {n: stored[n] for n in mine})
    return foreign, floats, stored


FP8 = [("qwen3_moe", "Qwen FP8"), ("deepseek_v3", "Qwen FP8"), ("minimax_m2", "Qwen FP8"),
       ("glm4_moe", "compressed-tensors FP8"), ("mixtral", "ModelOpt FP8")]  # fmt: skip
PACKED = [("qwen3_moe", "ModelOpt NVFP4"), ("deepseek_v3", "ModelOpt NVFP4"), ("glm4_moe", "compressed-tensors NVFP4"),
          ("minimax_m2", "AWQ integers"), ("qwen3_moe", "GPTQ integers"), ("kimi_k2", "compressed-tensors integers"),
          ("mixtral", "Quark MXFP4"), ("glm4_moe", "ModelOpt MXFP8"), ("qwen3_moe", "AutoRound integers")]  # fmt: skip
QUICK = (FP8[0], PACKED[0])


def _slow(values: list[tuple[str, str]]) -> list[Any]:
    return [pytest.param(*value, marks=() if value in QUICK else pytest.mark.slow) for value in values]


@pytest.mark.parametrize(("name", "layout"), _slow(FP8))
def test_fp8_counts_as_what_it_stands_for(name: str, layout: str, tmp_path: Path) -> None:
    foreign, floats, _ = write_foreign(name, tmp_path, layout)
    convert(foreign, tmp_path / "packed", group_size=32)
    convert(floats, tmp_path / "expected", group_size=32)
    assert contents(tmp_path / "packed") == contents(tmp_path / "expected")


@pytest.mark.parametrize(("name", "layout"), _slow(PACKED))
def test_other_numbers_stay_as_they_are(name: str, layout: str, tmp_path: Path) -> None:
    foreign, floats, _ = write_foreign(name, tmp_path, layout)
    assert convert(foreign, tmp_path / "packed", group_size=32) == []
    network = plain(floats)
    network.set_dtype(mx.float32)
    expected = np.array(network(mx.array([PROMPT]))[0])
    with Model.load(tmp_path / "packed", dtype="float32") as model:
        atol = 2e-2 if "AWQ" in layout else 2e-3  # products of scale and zero are rounded to float16
        np.testing.assert_allclose(np.array(model.logits(PROMPT)), expected, atol=atol)
    (found,) = describe(tmp_path / "packed").expert_formats
    assert found == next(v for k, v in FORMS.items() if k in layout)


def test_nvfp4_is_repacked_bit_for_bit(tmp_path: Path) -> None:
    foreign, _, stored = write_foreign("qwen3_moe", tmp_path, "ModelOpt NVFP4")
    convert(foreign, tmp_path / "packed")
    manifest = Manifest.load(tmp_path / "packed")
    assert manifest is not None
    for (layer, expert), record in packed_records(tmp_path / "packed").items():
        for part in manifest.layers[layer].layout.parts:
            if (kind := {"weight": "weight", "scales": "weight_scale"}.get(part.name)) is not None:
                _, array = stored[f"model.layers.{layer}.mlp.experts.{expert}.{part.linear}.{kind}"]
                assert record[part.offset : part.offset + part.nbytes] == content(array)


@pytest.mark.slow
def test_from_the_hub_on_little_disk(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FP8 becomes bfloat16 on the way, which takes twice as much."""
    foreign, _, _ = write_foreign("qwen3_moe", tmp_path, "Qwen FP8", shards=5)
    largest = max(file.stat().st_size for file in foreign.glob("*.safetensors"))
    on_little_disk(hub, foreign, tmp_path, monkeypatch, most=4 * largest, group_size=32)


@pytest.mark.slow
def test_killed_at_twenty_points(hub: HubServer, tmp_path: Path) -> None:
    killed(hub, write_foreign("deepseek_v3", tmp_path, "ModelOpt NVFP4")[0], tmp_path, 20)


def test_what_cannot_be_translated(tmp_path: Path) -> None:
    foreign, _, stored = write_foreign("qwen3_moe", tmp_path, "Qwen FP8", shards=1)
    with pytest.raises(CheckpointError, match=r"run `flash-moe convert` first"):
        Model.load(foreign)
    with pytest.raises(ArgumentError, match="a calibration needs one of flash_moe's own"):
        convert(foreign, tmp_path / "packed", calibration=[PROMPT])
    (file,) = foreign.glob("*.safetensors")
    config = json.loads((foreign / "config.json").read_text())
    scattered = {"quant_method": "gptq", "bits": 4, "desc_act": True}
    (foreign / "config.json").write_text(json.dumps(config | {"quantization_config": scattered}))
    with pytest.raises(CheckpointError, match="GPTQ with desc_act"):
        convert(foreign, tmp_path / "packed")
    (foreign / "config.json").write_text(json.dumps(config))
    scales = next(key for key in stored if key.endswith("down_proj.weight_scale_inv"))
    save(file, stored | {scales: ("BF16", mx.ones((3, 1), mx.bfloat16))})
    with pytest.raises(CheckpointError, match=r"scales of shape \[3, 1\] for weights of \[\d+, \d+\], expected one"):
        convert(foreign, tmp_path / "packed")
    assert not (tmp_path / "packed.partial").exists()
