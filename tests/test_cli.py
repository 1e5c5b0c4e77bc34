"""What all commands share: help, version, paths, sizes, the log."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from command_line import failed, flash_moe_command
from typer.main import get_command

from flash_moe import __version__
from flash_moe.cli import app, loading
from flash_moe.cli.arguments import ExpertIOChoice, size
from flash_moe.cli.console import print_json
from flash_moe.packing.verify import verify

WITHOUT_JSON = {"chat", "serve", "worker", "report"}  # what reports nothing, and what reports in Markdown


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (
            [],
            [
                "flash-moe plan ORG/NAME",
                "flash-moe download ORG/NAME",
                'flash-moe generate demo "Hello"',
                "-v, --verbose",
            ],
        ),
        (
            ["generate"],
            ['flash-moe generate MODEL "Why is the sky blue?"', "-k own", "--max-tokens N", "--no-thinking"],
        ),
        (["info"], ["flash-moe info MODEL --json", "-k, --experts-per-token"]),
        (["convert"], ["flash-moe convert ./qwen-mlx-4bit ./qwen-packed", "--bits 2|3|4|5|6|8", "DST.partial"]),
        (["verify"], ["flash-moe verify ./qwen-packed && echo good"]),
        (["plan"], ['flash-moe plan org/name --machine "M3 Max 48GB"', "--context N"]),
        (["bench"], ["flash-moe bench io MODEL --seconds 10", "is short for"]),
        (["bench", "model"], ["--plot FILE", "flash-moe bench MODEL --json |"]),
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


def test_loading_options_are_those_of_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "load", lambda model, revision, options: (model, revision, options))
    common = [ExpertIOChoice.slots, "1k", True, 0.1, 0.2, None, 3, "main"]
    assert loading._loader(*common)("folder", "own") == (
        "folder",
        "main",
        {
            "experts_per_token": None, "expert_io": "slots", "expert_cache": 1000, "prefetch": True,
            "drop_cold_below": 0.1, "prefer_cached": 0.2, "dtype": None, "threads": 3,
        },
    )  # fmt: skip


@pytest.mark.parametrize("behind", [False, True], ids=["before", "behind"])
def test_verbose_shows_the_log(behind: bool, quantized_checkpoint: Path, tmp_path: Path) -> None:
    command = ["convert", quantized_checkpoint, tmp_path / "packed"]
    result = flash_moe_command(*([*command, "-v"] if behind else ["-v", *command]))
    assert "flash_moe.packing.convert: packing the experts of layer 3" in result.stderr


def all_commands() -> dict[str, Any]:
    """Every command by what is typed after flash-moe."""
    top = get_command(app).commands
    return {
        f"{name} {inner}".strip(): command
        for name, group in top.items()
        for inner, command in getattr(group, "commands", {"": group}).items()
    }


@pytest.mark.parametrize("name", all_commands())
def test_every_command_has_the_same_options(name: str) -> None:
    options = {option: parameter for parameter in all_commands()[name].params for option in parameter.opts}
    assert options["-v"] is options["--verbose"]
    assert name in WITHOUT_JSON or options["--json"].is_flag
    shown = flash_moe_command(*name.split(), "--help").stdout
    assert "-v, --verbose" in shown and "[[" not in shown
    assert max(map(len, shown.splitlines())) <= 80


def test_json_of_convert_and_verify(quantized_checkpoint: Path, tmp_path: Path) -> None:
    packed = tmp_path / "packed"
    wrote = json.loads(flash_moe_command("convert", quantized_checkpoint, packed, "--json").stdout)
    assert wrote["path"] == str(packed)
    assert wrote["bytes"] == sum(file.stat().st_size for file in packed.iterdir())
    found = json.loads(flash_moe_command("verify", packed, "--json").stdout)
    assert found == vars(verify(packed))


def test_json_has_no_numbers_that_json_does_not_know(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"a": [1.5, math.nan], "b": ({"c": -math.inf},)})
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail) == {"a": [1.5, None], "b": [{"c": None}]}


@pytest.mark.parametrize("arguments", [[], ["bench"]], ids=["flash-moe", "bench"])
def test_nothing_typed_shows_help(arguments: list[str]) -> None:
    assert flash_moe_command(*arguments).stdout == flash_moe_command(*arguments, "--help").stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sing"], "no such command 'sing'; see flash-moe --help"),
        (["generat"], "Did you mean 'generate'? See flash-moe --help"),
        (["generate", "demo", "hi", "-k"], "option '-k' requires an argument; see flash-moe generate --help"),
        (["serve", "demo", "--port"], "option '--port' requires an argument; see flash-moe serve --help"),
        (["generate", "demo", "Why", "me"], "(me); put a text of several words in quotes; see flash-moe generate"),
        (["generate", "demo", "hi", "--expert-cache", "2"], "'2' has no unit; write it as 2GB"),
        (["--loud"], "no such option: --loud; see flash-moe --help"),
        (["info"], "missing argument 'MODEL'; see flash-moe info --help"),
        (["bench", "demo", "--tokens", "0"], "; see flash-moe bench model --help"),
        (["bench", "io"], "missing argument 'PATH'; see flash-moe bench io --help"),
        (["plan", "demo", "--skew", "nan"], "skew is nan, expected 0"),
        (["generate", "demo", "hi", "--temperature", "-1"], "temperature is -1.0, expected a number of 0 or more"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_usage_errors_have_one_form(arguments: list[str], message: str) -> None:
    assert message in failed(flash_moe_command(*arguments), code=2)


def test_each_command_has_examples_of_its_own() -> None:
    for name in ("download", "list", "remove", "bench io"):
        _, _, examples = flash_moe_command(*name.split(), "--help").stdout.partition("Examples:")
        assert f"flash-moe {name}" in examples
        assert not any(f"flash-moe {other}" in examples for other in {"list", "remove", "bench MODEL"} - {name})
