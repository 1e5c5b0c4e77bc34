"""A server around a scripted model, reached without a socket."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("starlette")

from scripted import ScriptedModel
from starlette.testclient import TestClient

from flash_moe.server.admission import Admission
from flash_moe.server.app import Limits, build
from flash_moe.server.service import Service


@pytest.fixture
def client_of() -> Callable[..., TestClient]:
    """``client_of(model, active=..., waiting=..., api_key=...)``."""

    def make(
        model: ScriptedModel, active: int = 2, waiting: int = 2, prompt_limit: int | None = None, **options: Any
    ) -> TestClient:
        options = {"limits": Limits(body_bytes=100_000, body_seconds=0.5)} | options
        service = Service(model, ["scripted", "other"], Admission(active, waiting), prompt_limit)  # type: ignore[arg-type]
        return TestClient(build(service, **options), base_url="http://localhost")

    return make
