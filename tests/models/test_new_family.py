"""A family of its own conventions takes one class and one line: everything else works with it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from random_checkpoint import text_config, write_checkpoint

from flash_moe import Model, convert, models, verify
from flash_moe.config import ModelConfig
from flash_moe.evaluation.layerwise_model import LayerwiseModel
from flash_moe.models.family import ModelFiles, ResidentWeights
from flash_moe.models.qwen3_5 import Qwen35
from flash_moe.packing.info import describe
from flash_moe.planning.chips import parse_machine
from flash_moe.planning.plan import plan

TEXT = text_config(num_hidden_layers=2, full_attention_interval=2, num_experts=4, num_experts_per_tok=2)
TOKENS = [17, 250, 3, 99, 140, 8]
NAMES = {"decoder.": "model.language_model.", ".moe.": ".mlp.", "root_norm": "input_layernorm"}


class Another(Qwen35):
    """Other keys in config.json, other names of tensors, and the first norm of a layer stored as its double."""

    model_types = ("another_moe",)

    def config(self, raw: Mapping[str, Any]) -> ModelConfig:
        return super().config({**raw["network"], "model_type": raw["model_type"]})

    def canonical_name(self, name: str) -> str | None:
        for own, usual in NAMES.items():
            name = name.replace(own, usual)
        return super().canonical_name(name)

    def in_one_convention(
        self, files: ModelFiles, stored: Mapping[str, mx.array], dtype: mx.Dtype, keep_matrices: bool = False
    ) -> ResidentWeights:
        halved = {} if files.follows_mlx else {k: a / 2 for k, a in stored.items() if "input_layernorm" in k}
        return super().in_one_convention(files, {**stored, **halved}, dtype, keep_matrices)

    def mlx_array(self, files: ModelFiles, name: str, array: mx.array) -> mx.array:
        doubled = "input_layernorm" in name and not files.follows_mlx
        return super().mlx_array(files, name, array / 2 if doubled else array)


@pytest.fixture
def checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """The same model as Qwen3.5 and as the new family."""
    usual, another = write_checkpoint(tmp_path / "usual", TEXT), write_checkpoint(tmp_path / "another", TEXT)
    for file in another.glob("*.safetensors"):
        tensors = {}
        for name, array in mx.load(str(file)).items():
            array = array * 2 if "input_layernorm" in name else array
            for own, theirs in NAMES.items():
                name = name.replace(theirs, own)
            tensors[name] = array
        mx.save_safetensors(str(file), tensors)
    (another / "model.safetensors.index.json").unlink()
    (another / "config.json").write_text(json.dumps({"model_type": "another_moe", "network": TEXT}))
    monkeypatch.setitem(models._OWN, "another_moe", Another())  # what the line of FAMILIES does
    return usual, another


def logits(folder: Path) -> np.ndarray:
    with Model.load(folder, dtype="float32") as model:
        return np.array(model.logits(TOKENS))


def test_it_loads_converts_and_is_described(checkpoints: tuple[Path, Path], tmp_path: Path) -> None:
    usual, another = checkpoints
    np.testing.assert_array_equal(logits(another), logits(usual))
    for folder in checkpoints:
        convert(folder, folder.with_name(f"{folder.name}-packed"), bits=4, group_size=32)
    packed = tmp_path / "another-packed"
    np.testing.assert_array_equal(logits(packed), logits(tmp_path / "usual-packed"))
    assert verify(packed).checksums
    for folder in (another, packed):
        found, expected = describe(folder), describe(Path(str(folder).replace("another", "usual")))
        assert (found.model_type, found.experts, found.expert_bytes) == ("another_moe", 4, expected.expert_bytes)
    machine = parse_machine("M3 Max 48GB")
    plans = [plan(str(folder), experts_per_token=2, machine=machine, prompt=16, context=64) for folder in checkpoints]
    assert plans[0].decode == plans[1].decode
    states = [LayerwiseModel.open(folder, experts_per_token=2).final_states([TOKENS])[0] for folder in checkpoints]
    np.testing.assert_array_equal(np.array(states[0]), np.array(states[1]))
