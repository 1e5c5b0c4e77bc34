"""What all commands share: help, version, paths, sizes, the log."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from command_line import failed, flash_moe_command

from flash_moe import __version__
from flash_moe.cli.arguments import size


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ([], ["flash-moe info MODEL", "flash-moe convert SRC DST", 'flash-moe generate DST "Hello"', "-v, --verbose"]),
        (
            ["generate"],
            ['flash-moe generate MODEL "Why is the sky blue?"', "-k own", "--max-tokens N", "--no-thinking"],
        ),
        (["info"], ["flash-moe info MODEL --json", "-k, --experts-per-token"]),
        (["convert"], ["flash-moe convert ./qwen-mlx-4bit ./qwen-packed", "--bits 2|3|4|5|6|8", "DST.partial"]),
        (["verify"], ["flash-moe verify ./qwen-packed && echo good"]),
        (["plan"], ['flash-moe plan org/name --machine "M3 Max 48GB"', "--context N"]),
        (["bench"], ["flash-moe bench io MODEL --seconds 10", "is short for"]),
        (["bench", "model"], ["--plot FILE", "flash-moe bench MODEL --json -"]),
        (["bench", "io"], ["PATH", "--seconds S"]),
    ],
    ids=["app", "generate", "info", "convert", "verify", "plan", "bench", "bench model", "bench io"],
)
def test_help(command: list[str], words: list[str]) -> None:
    result = flash_moe_command(*command, "--help")
    assert result.exit_code == 0
    assert all(word in result.stdout for word in words)
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert not re.search(r"[a-z]\.\.\.$", result.stdout, re.MULTILINE)  # a description that was cut


def test_version() -> None:
    assert flash_moe_command("--version").stdout == f"flash-moe {__version__}\n"


@pytest.mark.parametrize("command", ["generate", "info", "verify", "convert"])
def test_wrong_path(command: str, tmp_path: Path) -> None:
    rest = {"generate": ["hello"], "convert": [tmp_path / "new"]}.get(command, [])
    assert "does not exist" in failed(flash_moe_command(command, tmp_path / "nothing", *rest))


@pytest.mark.parametrize(
    ("text", "expected"),
    [("0", 0), ("1000", 1000), ("2GB", 2 * 10**9), ("512 mb", 512 * 10**6), ("1.5GiB", 3 << 29), ("3k", 3000)],
)
def test_sizes(text: str, expected: int) -> None:
    assert size(text, "--expert-cache") == expected


def test_verbose_shows_the_log(quantized_checkpoint: Path, tmp_path: Path) -> None:
    result = flash_moe_command("-v", "convert", quantized_checkpoint, tmp_path / "packed")
    assert "flash_moe.packing.convert: packing the experts of layer 3" in result.stderr
