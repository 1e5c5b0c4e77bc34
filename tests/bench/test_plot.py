"""The picture of a measurement."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from flash_moe.bench.phases import ModelReport, Phase
from flash_moe.bench.plot import plot
from flash_moe.errors import ArgumentError
from flash_moe.experts.store import StoreStats


@pytest.fixture
def report() -> ModelReport:
    layers = {i: StoreStats(2, 1000, 800, 500, 0.001 * (i + 1), 0.004) for i in range(6)}
    total = StoreStats(12, 6000, 4800, 3000, 0.021, 0.024)
    phases = [Phase("decode", cold, None, 2, (0.1, 0.1), total, layers, None) for cold in (True, False)]
    return ModelReport("model", "slots", 4, 8, 10, (phases[0], phases[1]))


def test_a_picture(report: ModelReport, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot(report, tmp_path / "layers.png")
    assert (tmp_path / "layers.png").read_bytes().startswith(b"\x89PNG")
    plot(report, tmp_path / "layers.svg")
    text = (tmp_path / "layers.svg").read_text()
    assert text.startswith("<?xml")


def test_no_such_format(report: ModelReport, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(ArgumentError, match=r"layers\.what cannot be written as a picture"):
        plot(report, tmp_path / "layers.what")


def test_without_matplotlib(report: ModelReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("flash_moe.bench.plot.find_spec", lambda name: None)
    with pytest.raises(ArgumentError, match=r"pip install 'flash-moe\[plot\]'"):
        plot(report, tmp_path / "layers.png")
