"""Checkpoints of mlx-lm's families, packed: repacked without loss, and quantised from floats."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from family_checkpoints import GROUP_SIZE, OWN, checkpoint, plain, utils, write
from mlx_lm.models.switch_layers import SwitchLinear
from published import PUBLISHED

from flash_moe import ArgumentError, CheckpointError, Model, NumericalError, convert, stream_experts, verify
from flash_moe.checkpoint.packed import MANIFEST
from flash_moe.experts.opening import ExpertIO
from flash_moe.packing.conversion import Mode
from flash_moe.packing.info import describe
from flash_moe.packing.staging import Staging

PROMPT = [17, 250, 3, 99, 140, 8, 8, 61, 230, 77, 5, 44, 91, 12, 0, 201]
REPACKED = ("qwen3_moe", "gpt_oss", "nemotron_h", "deepseek_v3", "minimax_m2", "qwen2_moe")


def _slow(values: Sequence[str], quick: Sequence[str]) -> list[Any]:
    return [pytest.param(value, marks=() if value in quick else pytest.mark.slow) for value in values]


def logits(folder: Path, expert_io: ExpertIO = "auto") -> np.ndarray:
    with Model.load(folder, expert_io=expert_io) as model:
        return np.array(model.logits(PROMPT))


def expected(folder: Path) -> np.ndarray:
    return np.array(plain(folder)(mx.array([PROMPT]))[0].astype(mx.float32))


@pytest.mark.parametrize("name", _slow(REPACKED, ("gpt_oss", "nemotron_h", "qwen3_moe")))
def test_repacked_without_loss(name: str, tmp_path: Path) -> None:
    folder, packed = checkpoint(name, tmp_path / name), tmp_path / "packed"
    assert convert(folder, packed) == []
    for expert_io in ("slots", "mapped", "resident"):
        np.testing.assert_array_equal(logits(packed, expert_io), expected(folder))
    found = verify(packed)
    assert found.checksums and found.records == describe(folder).experts * len(
        json.loads((packed / MANIFEST).read_text())["layers"]
    )
    assert describe(packed).form == "packed"
    model = plain(folder)
    stream_experts(model, packed).close()


@pytest.mark.parametrize("name", ["qwen3_moe", "llama4", "gemma4_text"])
@pytest.mark.parametrize("mode", _slow(("affine", "mxfp4", "nvfp4", "mxfp8"), ("affine",)))
def test_floats_are_quantised_as_mlx_lm_does(name: str, mode: Mode, tmp_path: Path) -> None:
    """From the files as the hub has them, with MLX's own rounding: what mlx_lm.convert and mlx-lm make of them."""
    source = checkpoint(name, tmp_path / "source", mode=None, published=True)
    same = write(name, tmp_path / "same", mode)
    bits = 4 if mode == "affine" else None
    packed = tmp_path / "packed"
    convert(source, packed, bits=bits, group_size=GROUP_SIZE["affine"], mode=mode, rounding="nearest")
    np.testing.assert_array_equal(logits(packed), expected(same))


def test_searched_rounding_and_other_bits(tmp_path: Path) -> None:
    source, packed = checkpoint("mixtral", tmp_path / "source", mode=None, published=True), tmp_path / "packed"
    convert(source, packed, bits=8, down_bits=6, group_size=32)
    assert describe(packed).expert_formats == {
        "gate_proj 8-bit, groups of 32; up_proj 8-bit, groups of 32; down_proj 6-bit, groups of 32": 2
    }
    assert np.median(np.abs(logits(packed) - expected(source))) < 0.05
    fewer = tmp_path / "fewer"
    assert "requantised from 8 to 4 bits" in convert(packed, fewer, expert_bits=4, group_size=32)[0]
    assert set(describe(fewer).expert_formats) == {"4-bit, groups of 32"}
    assert 0.05 < np.median(np.abs(logits(fewer) - expected(source))) < 0.5


@pytest.mark.parametrize("ending", ["layers.1.self_attn.o_proj.weight", "model.norm.weight"])
def test_weights_that_are_not_finite_are_refused(ending: str, tmp_path: Path) -> None:
    source = checkpoint("qwen3_moe", tmp_path / "source", mode=None, published=True, shards=1)
    (file,) = source.glob("*.safetensors")
    tensors = dict(mx.load(str(file)))
    (name,) = (name for name in tensors if name.endswith(ending))
    tensors[name] = mx.where(mx.arange(tensors[name].shape[-1]) == 5, mx.nan, tensors[name])
    mx.save_safetensors(str(file), tensors)
    with pytest.raises(NumericalError, match=rf"{ending} has numbers that are NaN"):
        convert(source, tmp_path / "packed", mode="mxfp4")


def test_an_interrupted_conversion_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = checkpoint("qwen3_moe", tmp_path / "source", mode=None, published=True)
    convert(source, tmp_path / "whole", group_size=32)
    commits: list[str] = []
    commit = Staging.commit

    def stop(self: Staging, name: str, receipt: object) -> None:
        commit(self, name, receipt)
        commits.append(name)
        if len(commits) in (1, 3):
            raise KeyboardInterrupt

    monkeypatch.setattr(Staging, "commit", stop)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            convert(source, tmp_path / "packed", group_size=32)
    convert(source, tmp_path / "packed", group_size=32)
    assert len(commits) == len(set(commits))
    for file in (tmp_path / "whole").iterdir():
        assert file.read_bytes() == (tmp_path / "packed" / file.name).read_bytes()


def test_refusals(tmp_path: Path) -> None:
    folder, packed = checkpoint("qwen3_moe", tmp_path / "source"), tmp_path / "packed"
    with pytest.raises(ArgumentError, match=r"mlx-lm's network, and a calibration needs"):
        convert(folder, packed, bits=2, group_size=32, calibration=[PROMPT])
    convert(folder, packed)
    manifest = json.loads((packed / MANIFEST).read_text())
    del manifest["layers"]["0"]
    (packed / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"of the experts of 3 layers, the model has 4; convert"):
        Model.load(packed)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in PUBLISHED if name not in OWN])
def test_every_published_family_is_packed(name: str, tmp_path: Path) -> None:
    quantized = name == "gpt_oss"
    source = checkpoint(name, tmp_path / "source", mode="mxfp4" if quantized else None, published=True)
    convert(source, tmp_path / "packed", mode=None if quantized else "mxfp4", rounding="nearest")
    model = plain(source)
    if not quantized:
        predicate = getattr(model, "quant_predicate", None)
        model, _ = utils.quantize_model(
            model,
            {},
            32,
            4,
            "mxfp4",
            quant_predicate=lambda path, m: isinstance(m, SwitchLinear) or predicate is None or predicate(path, m),
        )
    np.testing.assert_array_equal(
        logits(tmp_path / "packed"), np.array(model(mx.array([PROMPT]))[0].astype(mx.float32))
    )
