"""nvfp4 with a global scale for each expert, which MLX multiplies with on a GPU only."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from family_checkpoints import checkpoint, plain

from flash_moe import Model
from flash_moe.formats import GLOBAL_SCALE
from flash_moe.packing.convert import convert
from flash_moe.packing.info import describe

PROMPT = [17, 25, 3, 99, 40, 8, 8, 61, 30, 77, 5]


def scaled(name: str, folder: Path) -> tuple[Path, Path]:
    """A checkpoint with global scales, and one with the floats that its experts stand for."""
    checkpoint(name, folder / "scaled", mode="nvfp4")
    checkpoint(name, folder / "plain", mode="nvfp4")
    config = json.loads((folder / "scaled" / "config.json").read_text())
    rng = np.random.default_rng(3)
    for file in (folder / "scaled").glob("*.safetensors"):
        weights = dict(mx.load(str(file)))
        floats = dict(weights)
        for module in [key.removesuffix(".scales") for key in weights if ".experts." in key or ".switch_mlp." in key]:
            if f"{module}.scales" not in weights:
                continue
            parts = floats.pop(f"{module}.weight"), floats.pop(f"{module}.scales")
            factors = mx.array(rng.uniform(1000, 5000, parts[0].shape[0]).astype(np.float32))
            weights[f"{module}.global_scale"] = factors
            config["quantization"][module] = {"group_size": 16, "bits": 4, "mode": "nvfp4", "global_scale": True}
            w = mx.dequantize(*parts, group_size=16, bits=4, mode="nvfp4", dtype=mx.float32)
            floats[f"{module}.weight"] = w * (factors / GLOBAL_SCALE)[:, None, None]
        mx.save_safetensors(str(file), weights, metadata={"format": "mlx"})
        mx.save_safetensors(str(folder / "plain" / file.name), floats, metadata={"format": "mlx"})
    (folder / "scaled" / "config.json").write_text(json.dumps(config))
    for each in ("scaled", "plain"):
        (folder / each / "model.safetensors.index.json").unlink(missing_ok=True)
    return folder / "scaled", folder / "plain"


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])  # without biases, and with
@pytest.mark.skipif(mx.default_device() != mx.cpu, reason="elsewhere MLX multiplies")
def test_they_are_multiplied_in_on_the_cpu(name: str, tmp_path: Path) -> None:
    folder, floats = scaled(name, tmp_path)
    expected = np.array(plain(floats)(mx.array([PROMPT]))[0].astype(mx.float32))
    convert(folder, tmp_path / "packed")
    assert set(describe(folder).expert_formats) == {"nvfp4 with a global scale"}
    found = []
    for each in (folder, tmp_path / "packed"):
        for store in ("slots", "resident"):
            with Model.load(each, expert_io=store, dtype="float32") as model:
                found.append(np.array(model.logits(PROMPT)))
                model.expert_store.capacity = 2  # in several groups, of sorted rows
                np.testing.assert_allclose(np.array(model.logits(PROMPT)), expected, atol=2e-3)
    for logits in found:
        np.testing.assert_array_equal(logits, found[0])
    np.testing.assert_allclose(found[0], expected, atol=2e-3)
