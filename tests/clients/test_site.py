"""The documentation site in a browser, as `make docs` has built it: it fits every width and asks no other host."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from browser import CHROMIUM, page

SITE = Path(__file__).parents[2] / "site"
PAGES = ["", "choosing/", "performance/", "api/"]
pytestmark = [
    pytest.mark.clients,
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed"),
    pytest.mark.skipif(not SITE.is_dir(), reason="`make docs` has not been run"),
]


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """Keeps the test output clean."""


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(SITE))) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (1280, "dark"), (390, "light"), (390, "dark")])
def test_pages_fit_and_ask_no_other_host(width: int, scheme: str, address: str) -> None:
    with page("about:blank", viewport={"width": width, "height": 800}, color_scheme=scheme) as tab:
        asked: list[str] = []
        tab.on("request", lambda request: asked.append(request.url))
        for name in PAGES:
            tab.goto(address + name, timeout=60_000)
            too_wide = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
            assert tab.evaluate(too_wide) == 0, f"/{name} scrolls sideways"
            background = "getComputedStyle(document.body).backgroundColor"
            assert (tab.evaluate(background) == "rgb(255, 255, 255)") == (scheme == "light"), name
        assert [url for url in asked if not url.startswith((address, "data:"))] == []
