"""The page in a browser."""

from __future__ import annotations

import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from browser import CHROMIUM, page, serving, until
from scripted import ScriptedModel, chunk

from flash_moe.server.admission import Admission
from flash_moe.server.app import build
from flash_moe.server.service import Service

pytestmark = [pytest.mark.clients, pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")]
CALL = SimpleNamespace(id="call_1", name="weather", arguments={"city": "Bern"})
MARKUP = "<img src=x onerror=alert(1)> <script>alert(2)</script> **bold** <b>b</b>"


class Watched(ScriptedModel):
    """Reads two experts of each layer for every step."""

    def _chunks(self, cancel: Any) -> Iterator[Any]:
        for step in super()._chunks(cancel):
            for layer in range(2):
                self.used(layer, [0, 3], [0, 500])
            yield step


def app_of(model: ScriptedModel, **options: Any) -> Any:
    return build(Service(model, ["scripted"], Admission(2, 2)), **options)  # type: ignore[arg-type]


def ask(tab: Any, text: str) -> None:
    tab.fill("#input", text)
    tab.keyboard.press("Enter")


def test_a_reply_streams_in_as_text_and_experts_light_up() -> None:
    model = Watched([chunk(reasoning="Hm."), chunk("It is "), chunk(MARKUP), chunk(reason="stop")], seconds=0.2)
    with serving(app_of(model)) as address, page(address) as tab:
        ask(tab, "<i>hello</i>")
        until(tab, "document.querySelector('.text')?.textContent.length > 3")
        assert tab.is_visible("#stop") and not tab.is_visible("#send")
        until(tab, "document.querySelector('.reply .note')")
        assert tab.text_content(".text") == f"It is {MARKUP}" and tab.text_content(".user") == "<i>hello</i>"
        assert tab.evaluate("document.querySelectorAll('.reply img, .reply script, .reply b, .user i').length") == 0
        assert tab.text_content(".reasoning div") == "Hm." and not tab.is_visible(".reasoning div")
        assert tab.text_content("#hits") == "75%" and tab.text_content("#bytes") != "–"
        drawn = "Array.from(document.querySelector('#experts').getContext('2d').getImageData(5, 5, 1, 1).data)"
        assert tab.evaluate(drawn)[3] == 255
        ask(tab, "and now?")
        until(tab, "document.querySelectorAll('.reply .note').length == 2")
    assert [message["role"] for message in model.asked[1][0]] == ["user", "assistant", "user"]


def test_stop_ends_a_reply_and_keeps_it() -> None:
    model = ScriptedModel([chunk(f"{i} ") for i in range(500)], seconds=0.02)
    with serving(app_of(model)) as address, page(address) as tab:
        ask(tab, "count")
        until(tab, "document.querySelector('.text')?.textContent.length > 3")
        tab.keyboard.press("Escape")
        until(tab, "document.querySelector('.reply .note')?.textContent == 'Stopped.'")
        end = time.monotonic() + 1
        while not model.cancelled and time.monotonic() < end:
            time.sleep(0.01)
        assert model.cancelled == 1 and tab.text_content(".text").startswith("0 1 ")


def test_tool_calls_are_shown_and_answered() -> None:
    model = ScriptedModel([chunk(calls=(CALL,)), chunk(reason="tool_calls")])
    with serving(app_of(model)) as address, page(address) as tab:
        ask(tab, "weather?")
        tab.wait_for_selector(".call input")
        assert tab.text_content(".call code") == 'weather({"city": "Bern"})'
        tab.keyboard.type("20 °C")
        tab.keyboard.press("Enter")
        until(tab, "document.querySelectorAll('.reply').length == 2")
    assert model.asked[1][0][-1] == {"role": "tool", "tool_call_id": "call_1", "content": "20 °C"}


def test_errors_and_keys() -> None:
    model = ScriptedModel([chunk("a", reason="stop")])
    with serving(app_of(model, api_key="k")) as address:
        from playwright.sync_api import sync_playwright

        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
            tab = browser.new_page()
            tab.goto(address)
            until(tab, "document.querySelector('#model').textContent.includes('API key')")
            tab.click("summary")
            tab.fill("#key", "k")
            until(tab, "document.querySelector('#model').textContent.includes('scripted')")
            tab.fill("#tools", "{")
            ask(tab, "hello")
            assert "not JSON" in tab.text_content(".error")
            browser.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_overflows(width: int, scheme: Any) -> None:
    model = ScriptedModel([chunk("word" * 200), chunk("\n```\n" + "x" * 500 + "\n```\n", reason="stop")])
    size = {"width": width, "height": 800}
    with serving(app_of(model)) as address, page(address, viewport=size, color_scheme=scheme) as tab:
        ask(tab, "long" * 200)
        until(tab, "document.querySelector('.reply .note')")
        assert tab.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
