"""Whole conversions with calibration: better, the same every time, and safe to kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import failed, flash_moe_command
from conversions import contents
from random_checkpoint import next_config, text_config, write_checkpoint
from safetensors.numpy import load_file, save_file

from flash_moe import ArgumentError, CheckpointError, Model, PromptError
from flash_moe.evaluation import LayerwiseModel, TokenSequence, calibration_tokens, divergence, token_scores
from flash_moe.packing.convert import convert
from flash_moe.packing.info import describe
from flash_moe.packing.verify import verify
from flash_moe.progress import Progress
from flash_moe.text import Tokenizer

SRC = Path(__file__).parents[2] / "src"
TEXT = [np.random.default_rng(0).integers(0, 256, length).tolist() for length in (120, 40, 1, 90)]
OPTIONS: dict[str, Any] = {"bits": 8, "expert_bits": 2, "calibration": TEXT}


@pytest.fixture(scope="module")
def calibrated(small_float: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The undisturbed conversion."""
    folder = tmp_path_factory.mktemp("calibrated") / "packed"
    assert convert(small_float, folder, **OPTIONS) == []
    return folder


@pytest.fixture(scope="module")
def structured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose tokens lie near a subspace, as hidden states of trained models do."""
    text = text_config(num_hidden_layers=3, full_attention_interval=3, num_experts=4, num_experts_per_tok=2)
    folder = write_checkpoint(tmp_path_factory.mktemp("structured") / "float", text, shards=1)
    (file,) = folder.glob("*.safetensors")
    weights = load_file(file)
    name = "model.language_model.embed_tokens.weight"
    decay = (1 / (1 + np.arange(64))).astype(np.float32)
    weights[name] = weights[name] * decay @ np.linalg.qr(np.random.default_rng(1).standard_normal((64, 64)))[0]
    weights[name] = (4 * weights[name]).astype(np.float32)
    save_file(weights, file, metadata={"format": "pt"})
    return folder


def kl(folder: Path, reference: Path) -> float:
    held_out = np.random.default_rng(7).integers(0, 256, (6, 100)).tolist()
    sequences = [TokenSequence(tuple(tokens), (False,) * len(tokens)) for tokens in held_out]
    models = [LayerwiseModel.open(path, experts_per_token=None) for path in (folder, reference)]
    return divergence(token_scores(models[0], sequences, models[1])).kl.value


def test_every_step_from_nearest_to_mixed_bits_pays(structured: Path, tmp_path: Path) -> None:
    text = np.random.default_rng(3).integers(0, 256, (20, 100)).tolist()
    two: dict[str, Any] = {"bits": 8, "expert_bits": 2}
    convert(structured, tmp_path / "nearest", **two, rounding="nearest")
    convert(structured, tmp_path / "searched", **two)
    convert(structured, tmp_path / "calibrated", **two, calibration=text)
    convert(structured, tmp_path / "mixed", **two, down_bits=3, calibration=text)
    names = ("nearest", "searched", "calibrated", "mixed")
    found = dict(zip(names, (kl(tmp_path / name, structured) for name in names), strict=True))
    assert found["searched"] < 0.8 * found["nearest"], found
    assert found["calibrated"] < 0.6 * found["nearest"], found
    assert found["mixed"] < 0.8 * found["calibrated"], found


def test_records_are_whole(calibrated: Path) -> None:
    assert verify(calibrated).checksums
    assert describe(calibrated).expert_formats == {"2-bit, groups of 64": 2}
    assert not list(calibrated.glob("calibration*"))
    with Model.load(calibrated) as model:
        assert np.isfinite(np.array(model.logits([1, 2, 3]))).all()


def test_the_same_every_time(calibrated: Path, small_float: Path, tmp_path: Path) -> None:
    convert(small_float, tmp_path / "packed", **OPTIONS)
    assert contents(tmp_path / "packed") == contents(calibrated)


def test_other_text_gives_other_weights(calibrated: Path, small_float: Path, tmp_path: Path) -> None:
    convert(small_float, tmp_path / "packed", **OPTIONS | {"calibration": [[5, 6, 7] * 40]})
    name = "experts-00000.safetensors"
    assert (tmp_path / "packed" / name).read_bytes() != (calibrated / name).read_bytes()


def test_dense_layers_and_quantised_sources(tmp_path: Path) -> None:
    text = next_config(mlp_only_layers=[0, 2], num_experts=4, num_experts_per_tok=2)
    source = write_checkpoint(tmp_path / "next", text, prefix="model.", nested_config=False)
    convert(source, tmp_path / "four", bits=4)
    (warning,) = convert(tmp_path / "four", tmp_path / "two", expert_bits=2, calibration=TEXT)
    assert "from 4 to 2 bits" in warning
    assert verify(tmp_path / "two").records == 8


def test_only_the_down_projections(small_quantized: Path, tmp_path: Path) -> None:
    """Gate and up stay, byte for byte."""
    convert(small_quantized, tmp_path / "packed", down_bits=3, calibration=TEXT)
    (text,) = describe(tmp_path / "packed").expert_formats
    assert text.endswith("up_proj 4-bit, groups of 64; down_proj 3-bit, groups of 64")
    convert(small_quantized, tmp_path / "twin")
    name = "experts-00000.safetensors"
    old, new = (load_file(tmp_path / folder / name)["experts"] for folder in ("twin", "packed"))
    kept = 2 * 64 * (32 + 2 * 4)  # bytes of gate and up: 64 rows of 64 4-bit weights, with float32 scales and biases
    np.testing.assert_array_equal(old[:, :kept], new[:, :kept])


class TestInterruption:
    @pytest.mark.slow
    def test_killed(self, calibrated: Path, small_float: Path, tmp_path: Path) -> None:
        """SIGKILL at several steps; the same command continues, and the bytes are those of an undisturbed run."""

        def run(number: int) -> tuple[Path, subprocess.CompletedProcess[str]]:
            destination = tmp_path / str(number) / "packed"
            destination.parent.mkdir()
            script = [sys.executable, str(Path(__file__).with_name("interrupted.py"))]
            done = subprocess.run(
                [*script, str(small_float), str(destination), str(number), json.dumps(OPTIONS)],
                capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(SRC)}, check=False,
            )  # fmt: skip
            return destination, done

        destination, whole = run(0)
        assert contents(destination) == contents(calibrated)
        steps = int(whole.stdout)
        for number in range(steps // 3, steps - 4, steps // 6):
            destination, done = run(number)
            assert done.returncode == -signal.SIGKILL, done.stderr
            convert(small_float, destination, **OPTIONS)
            assert contents(destination) == contents(calibrated)

    @pytest.fixture
    def half_done(self, small_float: Path, tmp_path: Path) -> Path:
        """A destination whose first layer is finished."""
        destination = tmp_path / "packed"

        def stop(progress: Progress) -> None:
            if (destination.with_name("packed.partial") / "content" / "experts-00000.safetensors").exists():
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            convert(small_float, destination, **OPTIONS, progress=stop)
        return destination

    def test_finished_layers_are_not_done_again(
        self, half_done: Path, calibrated: Path, small_float: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from flash_moe.nn.layerwise import Layerwise

        entered, run_layer = [], Layerwise.run_layer
        monkeypatch.setattr(
            Layerwise, "run_layer", lambda self, layer, *rest: entered.append(layer) or run_layer(self, layer, *rest)
        )
        convert(small_float, half_done, **OPTIONS)
        assert entered == [1]
        assert contents(half_done) == contents(calibrated)

    @pytest.mark.parametrize("lost", ["calibration-00001.npy", "content/experts-00000.safetensors"])
    def test_what_was_lost_is_made_again(self, half_done: Path, calibrated: Path, small_float: Path, lost: str) -> None:
        (half_done.with_name("packed.partial") / lost).unlink()
        convert(small_float, half_done, **OPTIONS)
        assert contents(half_done) == contents(calibrated)

    def test_states_of_something_else_are_refused(self, half_done: Path, small_float: Path) -> None:
        np.save(half_done.with_name("packed.partial") / "calibration-00001.npy", np.zeros((3, 64), np.float32))
        with pytest.raises(CheckpointError, match=r"saved calibration is float32 \(3, 64\), expected .*start again"):
            convert(small_float, half_done, **OPTIONS)

    def test_another_text_is_refused(self, half_done: Path, small_float: Path) -> None:
        for change in ({"calibration": TEXT[:2]}, {"calibration": None}, {"down_bits": 3}, {"expert_bits": 3}):
            with pytest.raises(CheckpointError, match="left by another conversion"):
                convert(small_float, half_done, **OPTIONS | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"calibration": []}, "no sequences; pass token ids"),
        ({"rounding": "nearest"}, "'nearest' takes no calibration; leave one of the two out"),
        ({"rounding": "dice", "calibration": None}, "'dice', expected one of nearest, search"),
    ],
    ids=["empty", "nearest", "unknown"],
)
def test_bad_options(small_float: Path, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        convert(small_float, tmp_path / "packed", **OPTIONS | change)
    assert list(tmp_path.iterdir()) == []


def test_calibration_of_nothing(small_quantized: Path, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"no expert is to be quantised.*leave it out"):
        convert(small_quantized, tmp_path / "packed", calibration=TEXT)


@pytest.mark.parametrize("tokens", [[], [288], [1] * 4097], ids=["none", "unknown", "too many"])
def test_bad_tokens(small_float: Path, tmp_path: Path, tokens: list[int]) -> None:
    with pytest.raises(PromptError):
        convert(small_float, tmp_path / "packed", expert_bits=2, calibration=[[1, 2], tokens])
    assert list(tmp_path.iterdir()) == []


def test_calibration_tokens_are_the_first(small_float: Path, tmp_path: Path) -> None:
    file, tokenizer = tmp_path / "text.jsonl", Tokenizer.load(small_float)
    lines = [{"messages": [{"role": "user", "content": text}]} for text in ("One.", "And two.", "Three")]
    file.write_text("\n".join(map(json.dumps, lines)))
    whole = calibration_tokens(file, tokenizer, 10**6)
    assert len(whole) == 3
    found = calibration_tokens(file, tokenizer, len(whole[0]) + 3)
    assert found == [whole[0], whole[1][:3]]


def test_command_line(small_float: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("What the experts will see. " * 20)
    options = ["--bits", 8, "--expert-bits", 2, "--down-bits", 3, "--calibrate", text, "--calibrate-tokens", 100]
    result = flash_moe_command("convert", small_float, tmp_path / "packed", *options)
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[1] == "experts: 3.33 bits per weight with their scales"
    tokens = calibration_tokens(text, Tokenizer.load(small_float), 100)
    convert(small_float, tmp_path / "twin", bits=8, expert_bits=2, down_bits=3, calibration=tokens)
    assert contents(tmp_path / "packed") == contents(tmp_path / "twin")
    table = flash_moe_command("info", tmp_path / "packed").stdout
    assert "3.33 in the experts, with scales and biases" in table


def test_command_line_errors(small_float: Path, tmp_path: Path) -> None:
    text = tmp_path / "empty.txt"
    text.write_text("")
    convert_to = ("convert", small_float, tmp_path / "packed")
    assert "holds no text" in failed(flash_moe_command(*convert_to, "--expert-bits", 2, "--calibrate", text), code=2)
    assert "not one of 2, 3" in failed(flash_moe_command(*convert_to, "--down-bits", 7), code=2)
    assert "--rounding" in failed(flash_moe_command(*convert_to, "--rounding", "up"), code=2)
    assert "--calibrate" in failed(flash_moe_command(*convert_to, "--calibrate", tmp_path / "none"), code=2)
    assert "pass --calibrate too" in failed(flash_moe_command(*convert_to, "--calibrate-tokens", 100), code=2)
