"""Runs of the demo model's training: for developers, since CI installs no torch."""

from __future__ import annotations

import json
import logging
import signal
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: training the demo model is for developers")
pytest.importorskip("transformers", reason="transformers is not installed: training the demo model is for developers")

from demo_model import batches, metrics, train  # noqa: E402
from demo_runs import options, tiny, write_shard  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "data").mkdir()
    for number in range(2):
        write_shard(tmp_path / "data", number)
    architecture = tiny()
    monkeypatch.setattr(train.model, "config", lambda: architecture)
    return tmp_path


@pytest.mark.slow
def test_a_run_learns_and_an_interrupted_one_ends_the_same(data: Path) -> None:
    whole = train.Trainer(options(data, "--out", str(data / "whole"), "--steps", "10", "--fewer-experts", "0.5"))
    before = metrics.evaluate(whole.network, whole.held_out, whole.device)["loss"]
    whole.run()
    after = metrics.evaluate(whole.network, whole.held_out, whole.device)["loss"]
    assert after < before - 0.3

    words = ["--out", str(data / "parts"), "--steps", "10", "--fewer-experts", "0.5"]
    first = train.Trainer(options(data, *words))
    step = first.step

    def interrupted(batch: batches.Batch) -> Any:
        if first.progress.step == 3:
            signal.raise_signal(signal.SIGTERM)
        return step(batch)

    first.step = interrupted  # type: ignore[method-assign]
    first.run()
    assert first.progress.step == 4
    second = train.Trainer(options(data, *words))
    assert second.progress.step == 4
    second.run()
    for (name, one), other in zip(whole.model.state_dict().items(), second.model.state_dict().values(), strict=True):
        assert torch.equal(one, other), name
    lines = [json.loads(line) for line in (data / "parts" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "norm" in line] == list(range(1, 11))
    assert any("held_out" in line for line in lines)


def test_a_run_ends_on_time_and_another_architecture_is_refused(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--out", str(data / "run"), "--minutes", "0.02"]
    trainer = train.Trainer(options(data, *words))
    trainer.run()
    elapsed, steps = trainer.progress.elapsed, trainer.progress.step
    assert 1.2 <= elapsed < 1.2 + 10 * elapsed / steps  # it stops behind the first step that ends later
    larger = type(trainer.model.config).from_dict(trainer.model.config.to_dict() | {"num_experts": 16})
    monkeypatch.setattr(train.model, "config", lambda: larger)
    with pytest.raises(ValueError, match=r"expected \(16, 64\)"):
        train.Trainer(options(data, *words))


def test_what_does_not_compile_runs_without(
    data: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    trainer = train.Trainer(options(data, "--out", str(data / "run"), "--steps", "1"))

    def broken(*_: Any) -> Any:
        raise RuntimeError("no compiler")

    trainer.network.compiled, trainer.network._sparse_moe = True, broken
    trainer.compile()
    assert not trainer.network.compiled
    assert "NOT COMPILED" in caplog.text and "no compiler" in capsys.readouterr().err
    trainer.run()
    assert trainer.progress.step == 1
