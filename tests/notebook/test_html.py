"""HTML forms: complete, well-formed, and with nothing of a model's text as markup."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest

from flash_moe import Chunk, Generation, Model, ToolCallError, show
from flash_moe.generation.result import ToolResult
from flash_moe.notebook import html, live
from flash_moe.text.call_reader import ToolCall

EVIL = "<script>alert(1)</script><img src=x onerror=alert(1)>&amp;\"'</div></details>"
ALLOWED = {"div", "table", "tr", "td", "details", "summary", "b", "span"}


class Reader(HTMLParser):
    """Collects text; checks that tags nest and that there are none but harmless ones."""

    def __init__(self, markup: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""
        self.feed(markup)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in ALLOWED and {name for name, _ in attrs} <= {"style", "open"}
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def reply(model: Model) -> Generation:
    return model.generate([1, 2, 3], max_tokens=3)


def evil(reply: Generation) -> Generation:
    return replace(
        reply, text=EVIL, reasoning=EVIL, calls=(ToolCall("1", EVIL, {EVIL: EVIL}),), enforced=EVIL,
        tool_call_error=ToolCallError(EVIL),
    )  # fmt: skip


def test_nothing_that_a_model_writes_becomes_markup(reply: Generation) -> None:
    chunk = Chunk(EVIL, 1, reply.stats, reasoning=EVIL, tool_calls=(ToolCall("1", EVIL, {"a": EVIL}),))
    for shown in (evil(reply), chunk):
        assert Reader(shown._repr_html_()).text.count("<script>alert(1)</script>") >= 3
    messages = [evil(reply).message, {"role": EVIL, "content": [{"type": "text", "text": EVIL}, {"type": EVIL}]}]
    messages.append(
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": EVIL, "arguments": EVIL}}]}
    )
    assert Reader(html.conversation(messages)).text.count("<script>alert(1)</script>") >= 6
    assert Reader(html.table([(EVIL, EVIL)])).text == 2 * EVIL


def test_a_reply_shows_its_parts(reply: Generation) -> None:
    shown = replace(
        reply, text="It is windy.", reasoning="Let me look.", finish_reason="length", enforced="tools",
        calls=(ToolCall("1", "get_weather", {"city": "Malmö"}),),
    )  # fmt: skip
    text = Reader(shown._repr_html_()).text
    for part in ("It is windy.", "Let me look.", 'get_weather {"city": "Malmö"}', "tok/s", "length", "held to tools"):
        assert part in text
    assert "<details" in shown._repr_html_() and "<details" not in reply._repr_html_()


def test_statistics_and_models_are_tables(model: Model, reply: Generation) -> None:
    stats = Reader(reply.stats._repr_html_()).text
    for part in ("prompt3 tokens", "reply3 tokens", "in memory", "waiting for experts", "peak memory"):
        assert part in stats
    assert (
        "4, 4 with experts" in Reader(model._repr_html_()).text and "16 per layer" in Reader(model._repr_html_()).text
    )


def test_plain_forms_are_one_line(model: Model, reply: Generation) -> None:
    chunk = next(iter(model.stream([1, 2, 3], max_tokens=1)))
    for shown in (model, reply, reply.stats, chunk):
        assert "\n" not in repr(shown) and len(repr(shown)) < 250
    assert re.fullmatch(r"Chunk\('.*', token=\d+, finish_reason='length'\)", repr(chunk))


def test_a_stream_shows_itself_outside_notebooks(model: Model, capsys: pytest.CaptureFixture[str]) -> None:
    expected = model.generate([1, 2, 3], max_tokens=5, temperature=0)
    show(model.stream([1, 2, 3], max_tokens=5, temperature=0))
    shown = capsys.readouterr().out
    assert shown.startswith(expected.text) and "tok/s" in shown and "\x1b" not in shown


def chunks(*parts: dict[str, Any]) -> list[Any]:
    plain = {"text": "", "reasoning": "", "tool_calls": (), "tool_result": None, "stats": "5 tok/s"}
    return [SimpleNamespace(**{**plain, **part}) for part in parts]


def test_a_stream_in_a_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    bundles: list[dict[str, str]] = []

    class Handle:
        def update(self, bundle: dict[str, str], raw: bool) -> None:
            bundles.append(bundle)

    def display(bundle: dict[str, str], raw: bool, display_id: bool) -> Handle:
        assert not bundles, "one output"
        bundles.append(bundle)
        return Handle()

    monkeypatch.setattr(live, "in_notebook", lambda: True)
    monkeypatch.setattr(live, "_REDRAW", 0.0)
    monkeypatch.setattr("IPython.display.display", display)
    call = ToolCall("1", "look", {"x": EVIL})
    show(chunks({"reasoning": "Hm. "}, {"reasoning": EVIL}, {"text": "An "}, {"text": EVIL}, {"tool_calls": (call,)}))
    texts = [Reader(bundle["text/html"]).text for bundle in bundles]
    assert "<details style" in bundles[0]["text/html"] and " open" in bundles[1]["text/html"]
    assert " open" not in bundles[-1]["text/html"], "reasoning is folded once the answer begins"
    assert all(len(a) <= len(b) for a, b in pairwise(texts))
    assert texts[-1].endswith("5 tok/s") and bundles[-1]["text/plain"] == f"An {EVIL}"


def test_results_of_calls_are_shown_where_they_came(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    call = ToolCall("1", "look", {"x": 1})
    turn = chunks(
        {"reasoning": "Hm."}, {"text": "I look."}, {"tool_calls": (call,)},
        {"tool_result": ToolResult(call, EVIL, failed=False)}, {"tool_result": ToolResult(None, "bad", failed=True)},
        {"reasoning": "So."}, {"text": "It is so."},
    )  # fmt: skip
    order = ("Hm.", "I look.", "look", EVIL, "malformed call", "bad", "So.", "It is so.", "5 tok/s")
    show(turn)
    printed = capsys.readouterr().out
    bundles: list[dict[str, str]] = []
    monkeypatch.setattr(live, "in_notebook", lambda: True)
    monkeypatch.setattr(live, "_REDRAW", 1e9)
    monkeypatch.setattr("IPython.display.display", lambda bundle, **_: bundles.append(bundle))
    show(turn)
    for text in (printed, Reader(bundles[-1]["text/html"]).text):
        places = [text.index(part) for part in order]
        assert places == sorted(places), text
    assert " open" not in bundles[-1]["text/html"]


def test_what_came_of_an_interrupted_stream_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    bundles: list[dict[str, str]] = []
    monkeypatch.setattr(live, "in_notebook", lambda: True)
    monkeypatch.setattr("IPython.display.display", lambda bundle, **_: bundles.append(bundle))

    def interrupted() -> Any:
        yield from chunks({"text": "so far"})
        raise KeyboardInterrupt

    monkeypatch.setattr(live, "_REDRAW", 1e9)
    with pytest.raises(KeyboardInterrupt):
        show(interrupted())
    assert "so far" in bundles[-1]["text/html"]


def test_a_conversation_shows_its_messages(model: Model) -> None:
    chat = model.chat(system=EVIL, messages=[{"role": "user", "content": "Hello?"}])
    text = Reader(chat._repr_html_()).text
    assert text == f"system{EVIL}userHello?"
    assert repr(chat) == "Conversation(2 messages, the last of the user)"
    assert Reader(model.chat()._repr_html_()).text == repr(model.chat()) == "Conversation(0 messages)"
