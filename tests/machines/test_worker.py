"""Commands in a group of machines: `flash-moe generate` on rank 0, `flash-moe worker` elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest
from ranks import Ranks
from typer.testing import CliRunner

from flash_moe.cli import app


def test_generate_with_a_worker(packed_checkpoint: Path, tmp_path: Path) -> None:
    words = [str(packed_checkpoint), "Hello", "--max-tokens", "5", "--temperature", "0"]
    alone = CliRunner().invoke(app, ["generate", *words])
    assert alone.exit_code == 0, alone.output
    generate, worker = ["-m", "flash_moe", "generate", *words], ["-m", "flash_moe", "worker", str(packed_checkpoint)]
    with Ranks(tmp_path, 2, generate, worker) as ranks:
        assert ranks.wait() == [0, 0], ranks.said()
    assert (tmp_path / "0.out").read_text() == alone.stdout
    assert (tmp_path / "1.out").read_text() == ""


def test_a_worker_without_a_group(packed_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLX_RANK", raising=False)
    failed = CliRunner().invoke(app, ["worker", str(packed_checkpoint)])
    assert failed.exit_code == 2
    assert "start a worker as rank 1 or higher" in failed.output
