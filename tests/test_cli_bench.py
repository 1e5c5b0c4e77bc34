"""`flash-moe bench` and `flash-moe plan` print what the library measures, in tables of 80 columns or as JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import failed, flash_moe_command

from flash_moe.progress import display


@pytest.fixture(autouse=True)
def fast_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """However slow the machine is, no work takes long enough for lines of progress."""
    monkeypatch.setattr(display, "DELAY", 1e9)


def printed(*arguments: object) -> list[str]:
    """The lines of a command that has nothing to say on stderr."""
    result = flash_moe_command(*arguments)
    assert (result.exit_code, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert max(len(line) for line in lines[1:]) <= 80  # the first holds a path
    return lines


def row(lines: list[str], label: str) -> list[str]:
    """The cells of a row; the last with that label."""
    return [line for line in lines if line.strip().startswith(label)][-1].strip().removeprefix(label).split()


SMALL = ("--prompt-tokens", 12, "--tokens", 2)


@pytest.mark.parametrize("command", [("bench",), ("bench", "model")])
def test_bench_a_model(packed_checkpoint: Path, command: tuple[str, ...]) -> None:
    lines = printed(*command, packed_checkpoint, *SMALL, "-k", 2, "--expert-io", "mapped")
    assert lines[0] == str(packed_checkpoint)
    assert lines[1].startswith("K=2 of the model's 4, experts mapped, ")
    assert row(lines, "tokens") != row(lines, "tokens per second")
    assert [line.split() for line in lines[3:6]] == [
        ["prefill", "decode", "prefill", "decode"], ["cold", "cold", "warm", "warm"], ["tokens", "12", "2", "12", "2"]
    ]  # fmt: skip
    assert len(row(lines, "ms per token")) == 4
    assert row(lines, "in memory")[2:] == ["100.0%", "100.0%"]
    assert all(len(row(lines, str(layer))) == 6 for layer in range(4))


def test_bench_options_before_the_model(packed_checkpoint: Path) -> None:
    lines = printed("bench", "--expert-io", "resident", *SMALL, packed_checkpoint)
    assert "A resident store holds all experts: nothing could be cold." in lines


def test_bench_json(packed_checkpoint: Path) -> None:
    found = json.loads("\n".join(printed("bench", packed_checkpoint, *SMALL, "--json")))
    assert found["path"] == str(packed_checkpoint)
    assert [(phase["name"], phase["cold"]) for phase in found["phases"]] == [
        ("prefill", True), ("decode", True), ("prefill", False), ("decode", False)
    ]  # fmt: skip


def test_bench_plot(packed_checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    printed("bench", packed_checkpoint, *SMALL, "--plot", tmp_path / "layers.png")
    assert (tmp_path / "layers.png").read_bytes().startswith(b"\x89PNG")


def test_a_plot_without_matplotlib_fails_before_anything_is_measured(
    packed_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flash_moe.bench.plot.find_spec", lambda name: None)
    monkeypatch.setattr("flash_moe.cli.loading.load", None)
    message = failed(flash_moe_command("bench", packed_checkpoint, "--plot", tmp_path / "layers.png"), code=2)
    assert "pip install 'flash-moe[plot]'" in message


def test_bench_io(packed_checkpoint: Path, tmp_path: Path) -> None:
    lines = printed("bench", "io", packed_checkpoint, "--seconds", 0.3)
    assert next(line for line in lines if "plain reads" in line).split()[-5:] == ["1", "2", "4", "8", "16"]
    assert len(row(lines, "mapped, 4 records at once")) == len(row(lines, "slots, 16 records at once")) == 2
    found = json.loads("\n".join(printed("bench", "io", packed_checkpoint, "--seconds", 0.3, "--json")))
    assert {fetch["store"] for fetch in found["fetches"]} == {"mapped", "slots"}
    (tmp_path / "file").write_bytes(bytes(1 << 20))
    lines = printed("bench", "io", tmp_path / "file", "--seconds", 0.1)
    assert not any("the library" in line for line in lines)


def test_bench_errors(tmp_path: Path, packed_checkpoint: Path) -> None:
    for command in (("bench",), ("bench", "io"), ("plan",)):
        assert "does not exist" in failed(flash_moe_command(*command, tmp_path / "nothing"))
        assert "config.json does not exist" in failed(flash_moe_command(*command, tmp_path))
    (tmp_path / "short").write_bytes(b"1")
    assert "expected 262144 or more" in failed(flash_moe_command("bench", "io", tmp_path / "short"))
    assert "fewer than 4096" in failed(flash_moe_command("bench", packed_checkpoint, "--tokens", 5000), code=2)
    assert "--seconds" in failed(flash_moe_command("bench", "io", packed_checkpoint, "--seconds", 0), code=2)


def test_plan_for_a_named_machine(packed_checkpoint: Path) -> None:
    lines = printed("plan", packed_checkpoint, "--machine", "m4 pro 24gb", "--prompt", 100)
    assert lines[0] == f"{packed_checkpoint} on M4 Pro 24 GB"
    assert lines[1] == "K=4, packed, experts mapped"
    assert row(lines, "fits") == ["yes"]
    assert len(row(lines, "tokens per second")) == len(row(lines, "s to the first of 100 tokens")) == 3
    assert lines[3].startswith("It fits, and should generate about ")
    assert row(lines, "memory") == ["24", "GB"]  # as Apple writes it
    assert lines[-1].startswith("Predicted from the chip's figures")
    assert printed("plan", packed_checkpoint, "--machine", "m4 pro 24gb", "--prompt", 100) == lines


def test_plan_for_this_machine(packed_checkpoint: Path) -> None:
    lines = printed("plan", packed_checkpoint, "--prompt", 32, "-k", 2)
    assert lines[1] == "K=2 of the model's 4, packed, experts slots"
    assert row(lines, "experts in memory, decoding") == ["0%", "100%", "100%"]
    assert not any("Predicted" in line for line in lines)


def test_plan_json(packed_checkpoint: Path) -> None:
    options = ("--machine", "M1 8GB", "--json", "--skew", 0, "--context", 100)
    found = json.loads("\n".join(printed("plan", packed_checkpoint, *options)))
    assert (found["machine"], found["skew"], found["context"], found["measured"]) == ("M1 8 GB", 0.0, 100, False)
    assert found["memory"]["fits"]
    assert found["decode"]["cold"]["total"] > found["decode"]["warm"]["total"]
    assert found["costs"]["reads"]["memory"] is None  # used in place


def test_plan_of_what_does_not_fit(packed_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flash_moe.planning.needs._KEPT_LEAST", 8 << 30)
    lines = printed("plan", packed_checkpoint, "--machine", "M1 8GB")
    assert row(lines, "fits")[0] == "no:"
    assert lines[3].startswith("It does not fit: ")
    assert row(lines, "largest context")[0] == "0"


def test_plan_of_a_machine_without_its_memory(packed_checkpoint: Path) -> None:
    message = failed(flash_moe_command("plan", packed_checkpoint, "--machine", "m3 max"), code=2)
    assert message == "error: 'm3 max' does not say how much memory the machine has; add it, as in 'M3 Max 48GB'"


def test_plan_of_an_unknown_machine(packed_checkpoint: Path) -> None:
    message = failed(flash_moe_command("plan", packed_checkpoint, "--machine", "toaster"), code=2)
    assert "unknown machine 'toaster'" in message
