"""Errors of the server itself: what its log says."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

import pytest
from scripted import ScriptedModel, chunk
from starlette.testclient import TestClient

from flash_moe.cli.console import log_to_stderr

ASK = [{"role": "user", "content": "a private prompt"}]
Clients = Callable[..., TestClient]


@pytest.fixture
def logger() -> Iterator[logging.Logger]:
    """The logger of the library, restored afterwards."""
    found = logging.getLogger("flash_moe")
    before = found.handlers, found.level
    yield found
    found.handlers, found.level = before


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("verbose", [False, True])
def test_the_log_names_the_error(
    client_of: Clients, logger: logging.Logger, capsys: pytest.CaptureFixture[str], stream: bool, verbose: bool
) -> None:
    log_to_stderr(verbose)
    client = client_of(ScriptedModel([chunk("a"), RuntimeError("no such\n\x1b[31mlayer")]))
    body = {"model": "scripted", "messages": ASK, "stream": stream}
    assert "the server's log says more" in client.post("/v1/chat/completions", json=body).text
    said = capsys.readouterr().err
    assert said.count("warning: a request failed: RuntimeError: no such \ufffd[31mlayer\n") == 1
    assert ("Traceback" in said and "raise step" in said) == verbose
    assert "private" not in said and "\x1b" not in said
