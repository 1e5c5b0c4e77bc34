"""Pictures show what was counted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from flash_moe import ArgumentError, Generation, Model
from flash_moe.notebook import figures

pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def reply(model: Model) -> Generation:
    return model.generate([1, 2, 3], max_tokens=4)


def test_where_time_went(reply: Generation, tmp_path: Path) -> None:
    stats, picture = reply.stats, reply.stats.plot()
    assert 0 < stats.decode_fetch_seconds < stats.fetch_seconds
    times, memory = picture.figure.axes
    widths = [bar.get_width() for bar in times.patches]
    assert widths[0] + widths[1] == pytest.approx(1e3 * stats.prompt_seconds / 3)
    assert widths[2] == pytest.approx(1e3 * min(stats.decode_fetch_seconds, stats.decode_seconds) / 3)
    assert widths[2] + widths[3] == pytest.approx(1e3 * stats.decode_seconds / 3)
    assert memory.patches[0].get_width() == pytest.approx(100 * stats.hit_rate)
    assert picture._repr_png_().startswith(b"\x89PNG")
    picture.save(tmp_path / "times.svg")
    assert (tmp_path / "times.svg").stat().st_size > 1000


def test_layers_of_the_store(model: Model, reply: Generation) -> None:
    times, hits = model.expert_store.plot().figure.axes
    waits = [1e3 * stats.fetch_seconds / stats.fetches for stats in model.expert_store.by_layer.values()]
    assert [bar.get_height() for bar in times.patches] == pytest.approx(waits)
    assert len(hits.patches) == 4 and all(0 <= bar.get_height() <= 100 for bar in hits.patches)


def test_uses_of_experts(model: Model) -> None:
    with model.expert_uses() as uses:
        model.generate([1, 2, 3], max_tokens=6, temperature=0)
    counted = uses.counts.copy()
    model.generate([1, 2, 3], max_tokens=2)
    assert np.array_equal(uses.counts, counted), "nothing is counted once the block has ended"
    decoded = 5 * model.experts_per_token
    assert all(decoded < row.sum() <= decoded + 12 for row in counted), "five tokens, and a chunk of three"
    image = uses.plot().figure.axes[0].images[0].get_array()
    assert np.array_equal(image, -np.sort(-counted, axis=1))
    assert 0.1 <= uses.concentration <= 1
    assert "experts used at all" in uses._repr_html_() and "\n" not in repr(uses)


def test_without_matplotlib(reply: Generation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "find_spec", lambda name: None)
    with pytest.raises(ArgumentError, match=r"pip install 'flash-moe\[plot\]'"):
        reply.stats.plot()
