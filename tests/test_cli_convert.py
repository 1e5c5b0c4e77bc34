"""`flash-moe convert` and `flash-moe verify`: what they say, of a conversion that was interrupted, too."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from command_line import failed, flash_moe_command

import flash_moe.packing.convert
from flash_moe.checkpoint.packed import layer_file
from flash_moe.packing.info import describe
from flash_moe.progress import display


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """However slow the machine is, no work takes long enough for lines of progress."""
    monkeypatch.setattr(display, "DELAY", 1e9)


def test_convert_verify_and_damage(quantized_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(display, "DELAY", 0.0)
    packed = tmp_path / "new model"
    result = flash_moe_command("convert", quantized_checkpoint, packed)
    assert result.exit_code == 0
    assert result.stdout.splitlines()[2] == f"run it: flash-moe generate '{packed}' \"Why is the sky blue?\""
    assert re.match(rf"wrote {re.escape(str(packed))}: [\d.]+ MB in [\d.]+ s", result.stdout)
    lines = result.stderr.splitlines()
    assert 5 <= len(lines) <= 10
    assert all(re.match(r"converting: \d+% · [\d.]+ [kM]B of [\d.]+ MB", line) for line in lines)

    result = flash_moe_command("verify", packed)
    assert (result.exit_code, result.stdout.split(" (")[0]) == (
        0, f"OK: 64 expert records and {len(list(packed.glob('*.safetensors'))) - 4} other weight files match their checksums"
    )  # fmt: skip

    stride = describe(packed).record_bytes
    path = packed / layer_file(2)
    with path.open("r+b") as stream:
        stream.seek(path.stat().st_size - 3 * stride + 100)  # the third expert from the end
        byte = stream.read(1)
        stream.seek(-1, os.SEEK_CUR)
        stream.write(bytes([byte[0] ^ 1]))
    result = flash_moe_command("verify", packed)
    assert result.exit_code == 1
    assert "error: expert 13 of layer 2" in result.stderr


def test_verify_is_honest_without_checksums(quantized_checkpoint: Path) -> None:
    result = flash_moe_command("verify", quantized_checkpoint)
    assert result.exit_code == 0
    assert "OK" not in result.stdout
    assert "all 64 experts" in result.stdout and "no checksums" in result.stdout


def test_convert_warns_of_requantising(quantized_checkpoint: Path, tmp_path: Path) -> None:
    result = flash_moe_command("convert", quantized_checkpoint, tmp_path / "two", "--bits", 2, "--group-size", 32)
    assert result.exit_code == 0
    assert "warning: the experts were requantised from 4 to 2 bits" in result.stderr  # after progress, if it is slow


def test_convert_refuses_an_existing_folder(packed_checkpoint: Path, tmp_path: Path) -> None:
    assert "exists already" in failed(flash_moe_command("convert", packed_checkpoint, tmp_path))


@pytest.mark.parametrize("options", [("--bits", 7), ("--group-size", 16)], ids=["bits", "group-size"])
def test_convert_bad_formats(float_checkpoint: Path, tmp_path: Path, options: tuple[object, ...]) -> None:
    message = failed(flash_moe_command("convert", float_checkpoint, tmp_path / "x", *options), code=2)
    assert "is not one of" in message


def test_convert_interrupted_and_resumed(
    quantized_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    destination = tmp_path / "packed"
    write_layer = flash_moe.packing.convert._WholeConversion._write_layer

    def interrupted(self: object, reader: object, layer: int, *rest: object) -> list[str]:
        if layer == 2:
            raise KeyboardInterrupt
        return write_layer(self, reader, layer, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(flash_moe.packing.convert._WholeConversion, "_write_layer", interrupted)
        result = flash_moe_command("convert", quantized_checkpoint, destination)
    assert (result.exit_code, result.stdout) == (130, "")
    assert result.stderr == "interrupted; run the same command again to continue\n"
    result = flash_moe_command("convert", quantized_checkpoint, destination)
    assert result.exit_code == 0
    assert result.stderr.startswith(f"continuing in {destination}.partial")
    assert flash_moe_command("verify", destination).stdout.startswith("OK")
