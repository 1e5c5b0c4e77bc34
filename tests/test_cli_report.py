"""`flash-moe report`: one block of Markdown, with nothing private in it."""

from __future__ import annotations

import getpass
import platform
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_line import flash_moe_command

from flash_moe.cli import report_sections
from flash_moe.ops import dispatch
from flash_moe.proofs import process
from flash_moe.proofs.trial import Verdict

QUICK = ("--prompt-tokens", 8, "--tokens", 2, "--seconds", 0.2)


def test_a_report_has_all_parts_and_nothing_private(packed_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = report_sections.model

    def model(folder: Path, k: int | None, *sizes: float) -> str:
        return "of the demo" if k is None else measured(folder, k, *sizes)

    monkeypatch.setattr(report_sections, "model", model)
    for name in ("machine_memory", "memory_limit"):
        monkeypatch.setattr(f"flash_moe.limits.{name}", lambda: 48 << 30)
    result = flash_moe_command("report", packed_checkpoint, *QUICK, "-k", 2)
    assert result.exit_code == 0, result.output
    titles = [line for line in result.stdout.splitlines() if line.startswith("#")]
    assert titles == ["#### Machine", "#### Kernels", "#### Demo model", "#### Model"]
    for expected in (
        "| mlx |", "| MLX computes with | CPU |", "No GPU that MLX can use.", "\nof the demo\n",
        "4 layers of 64, 16 experts of 16.4 kB", "K=2 of 4, experts\nslots.", "| memory | 48 GB |", "| plain reads of 262 kB |",
        "| slots, 2 records at once |", "| ms | measured | planned | ratio | waiting for experts |", "| a token, cold |",
        "| a prompt of 8, warm |",
    ):  # fmt: skip
        assert expected in result.stdout
    assert "Not measured" not in result.stdout
    for word in (str(packed_checkpoint), str(packed_checkpoint.parent), str(Path.home()), platform.node()):
        assert word not in result.stdout
    assert getpass.getuser() not in re.split(r"\W+", result.stdout)


def test_a_part_that_fails_hides_no_other_and_tells_no_path(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> str:
        raise OSError("/home/somebody/secret is gone")

    monkeypatch.setattr(report_sections, "machine", fails)
    monkeypatch.setattr(report_sections, "model", lambda *_: "of the demo")
    result = flash_moe_command("report", *QUICK)
    assert result.exit_code == 0
    assert "#### Machine\n\nNot measured: OSError.\n" in result.stdout
    assert "secret" not in result.stdout
    assert "/home/somebody/secret is gone" in result.stderr
    assert "\nof the demo\n" in result.stdout


def test_kernels_on_a_gpu(packed_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    verdicts = {
        "router": Verdict(True, True, "", 1e-3, 2e-2, 4e-6, 8e-6),
        "experts": Verdict(True, False, "it takes longer", 1e-3, 2e-2, 9e-6, 8e-6),
        "add_rms_norm": Verdict(False, False, "its error is large", 0.5, 2e-2),
    }

    def judged(cases: list[dispatch.Case]) -> Iterator[tuple[dispatch.Case, Verdict]]:
        yield from ((case, verdicts[str(case[0])]) for case in cases if case[0] in verdicts)

    monkeypatch.setattr(dispatch, "on_gpu", lambda: True)
    monkeypatch.setattr(process, "judged", judged)
    lines = report_sections.kernels(None, None).splitlines()
    assert lines[0] == "| kernel | error | µs | MLX µs | verdict |"
    assert "| router (512, 4, 1, 1, bfloat16) | 1.0e-03 of 2e-02 | 4.0 | 8.0 | used |" in lines
    assert any(line.endswith("| 9.0 | 8.0 | right, not faster |") for line in lines)
    assert "| add_rms_norm (4096, bfloat16) | 5.0e-01 of 2e-02 |  |  | wrong |" in lines
