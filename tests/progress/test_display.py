"""Where progress shows, how often, and what it says."""

from __future__ import annotations

import io
import logging
import sys
import types
from typing import Any

import pytest

from flash_moe import ArgumentError, Model, Progress
from flash_moe.amounts import format_seconds
from flash_moe.progress import ask, display, following, views
from flash_moe.progress.views import bar_html


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


class Clock:
    """Time that passes when it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        for module in (display, views):
            monkeypatch.setattr(module, "time", types.SimpleNamespace(monotonic=lambda: self.now))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def read(clock: Clock, report: Any, seconds: float, steps: int = 20, total: int = 2000) -> None:
    for step in range(1, steps + 1):
        clock.now += seconds
        report(Progress("prompt", step * total // steps, total, "tokens"))


def test_forms(clock: Clock) -> None:
    seen: list[Progress] = []
    with following(seen.append) as report:
        assert report is not None
        read(clock, report, 5.0)
    assert [p.done for p in seen] == list(range(100, 2001, 100))
    with following(False) as report:
        assert report is None
    with pytest.raises(ArgumentError, match="progress is 'yes', expected True, False or a callable"), following("yes"):
        pass


def test_the_log_gets_a_line_for_every_tenth(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "flash_moe"), following() as report:
        read(clock, report, 1.0, steps=100)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 10
    assert lines[0] == "reading the prompt: 10% · 200 of 2,000 tokens · 20 tokens/s · 1:30 min left"


def test_the_log_gets_a_line_a_minute(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "flash_moe"), following() as report:
        read(clock, report, 30.0, steps=100)
    assert 45 <= len(caplog.records) <= 51


def test_what_takes_a_moment_shows_nowhere(
    clock: Clock, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with caplog.at_level(logging.INFO, "flash_moe"), following() as report:
        read(clock, report, 0.04)
    monkeypatch.setattr(sys, "stderr", stream := Terminal())
    with following() as report:
        read(clock, report, 0.04)
    assert not caplog.records and not stream.getvalue()


def test_a_bar_in_a_terminal_goes_away(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", stream := Terminal())
    with following() as report:
        assert report is not None
        for done in range(5):
            clock.now += 1
            report(
                Progress("download", done * 10**9, 10**10, "bytes", "org/[x]: 3 files, 10.0 GB, to /tmp (20.0 GB free)")
            )
        shown = stream.getvalue()
    assert "downloading org/[x]: 3 files, 10.0 GB, to /tmp (20.0 GB free)" in shown
    assert "of 10.0 GB" in shown and "GB/s" in shown and "left" in shown
    assert stream.getvalue().endswith("\x1b[2K"), "the line of the bar is empty again"


def test_a_stage_of_which_nothing_is_heard_shows_in_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(display, "DELAY", 0.05)
    monkeypatch.setattr(sys, "stderr", stream := Terminal())
    with following() as report:
        assert report is not None
        report(Progress("prompt", 1, 10, "tokens"))
        for _ in range(200):
            if "reading the prompt" in stream.getvalue():
                break
            display.time.sleep(0.02)
    assert "reading the prompt" in stream.getvalue()


class Cell:
    """Stands for IPython in a kernel: what is displayed, and how often it is updated."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.bundles: list[dict[str, str]] = []
        self.created = 0
        ipython: Any = types.ModuleType("IPython")
        ipython.get_ipython = lambda: types.SimpleNamespace(kernel=object())
        shown: Any = types.ModuleType("IPython.display")
        shown.display = self.display
        monkeypatch.setitem(sys.modules, "IPython", ipython)
        monkeypatch.setitem(sys.modules, "IPython.display", shown)

    def display(self, bundle: dict[str, str], *, raw: bool, display_id: bool) -> Cell:
        assert raw and display_id
        self.created += 1
        self.update(bundle, raw=raw)
        return self

    def update(self, bundle: dict[str, str], *, raw: bool) -> None:
        self.bundles.append(bundle)


def test_a_notebook_gets_one_output_of_html(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    cell = Cell(monkeypatch)
    with following() as report:
        read(clock, report, 0.3)
    assert cell.created == 1
    assert 10 <= len(cell.bundles) <= 20
    assert "width:" in cell.bundles[0]["text/html"] and "<script" not in cell.bundles[0]["text/html"]
    assert cell.bundles[-1]["text/plain"] == "reading the prompt: 2,000 tokens in 5.7 s", "what remains is a line"


def test_notes_are_text() -> None:
    markup = bar_html(Progress("download", 1, 4, "bytes", "<script>alert(1)</script>"), " · <b>")
    assert "<script" not in markup and "<b>" not in markup and "width:25.0%" in markup


@pytest.mark.parametrize(("answer", "expected"), [("y\n", True), ("YES\n", True), ("\n", False), ("no\n", False)])
def test_asking(monkeypatch: pytest.MonkeyPatch, answer: str, expected: bool) -> None:
    monkeypatch.setattr(sys, "stderr", stream := Terminal())
    monkeypatch.setattr(sys, "stdin", Terminal(answer))
    assert ask("Download 223 GB?") is expected
    assert stream.getvalue() == "Download 223 GB? [y/N] "


def test_nobody_is_asked_where_nobody_can_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("n\n"))
    assert ask("Download 223 GB?")


def test_seconds() -> None:
    assert [format_seconds(s) for s in (0.42, 9.9, 12.4, 59.6, 200, 3723)] == [
        "0.42 s", "9.9 s", "12 s", "1:00 min", "3:20 min", "1:02:03 h"
    ]  # fmt: skip


def test_a_callback_that_raises_in_a_layer_leaves_the_model_usable(model: Model) -> None:
    prompt = list(range(30))
    expected = model.generate(prompt, max_tokens=3, temperature=0).tokens
    model.forget()

    def stop(progress: Progress) -> None:
        if progress.done == 15:  # the second of four layers
            raise InterruptedError

    with pytest.raises(InterruptedError):
        model.generate(prompt, progress=stop)
    assert model.generate(prompt, max_tokens=3, temperature=0, progress=False).tokens == expected
