"""How the tools of each protocol reach the library."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from scripted import ScriptedModel, chunk
from starlette.testclient import TestClient

CHAT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/responses", "/v1/messages"
PATHS = pytest.mark.parametrize("path", [CHAT, RESPONSES, MESSAGES])
SCHEMA = {"type": "object", "properties": {}}
Clients = Callable[..., TestClient]


def tool(path: str, name: str, **more: Any) -> dict[str, Any]:
    if path == MESSAGES:
        return {"name": name, "input_schema": SCHEMA, **more}
    function = {"name": name, "parameters": SCHEMA, **more}
    return {"type": "function", "function": function} if path == CHAT else {"type": "function", **function}


def forced(path: str, name: str) -> dict[str, Any]:
    if path == MESSAGES:
        return {"type": "tool", "name": name}
    return {"type": "function", "function": {"name": name}} if path == CHAT else {"type": "function", "name": name}


def post(client: TestClient, path: str, **fields: Any) -> Any:
    body: dict[str, Any] = {"input": "Hi"} if path == RESPONSES else {"messages": [{"role": "user", "content": "Hi"}]}
    return client.post(
        path, json={"model": "scripted", **({"max_tokens": 5} if path == MESSAGES else {}), **body, **fields}
    )


@PATHS
@pytest.mark.parametrize(("strict", "expected"), [((True, None), True), ((False, None), None), ((None, None), None)])
def test_strict_tools(client_of: Clients, path: str, strict: tuple[Any, Any], expected: bool | None) -> None:
    model = ScriptedModel([chunk("a", reason="stop")])
    tools = [tool(path, f"f{i}", **({} if value is None else {"strict": value})) for i, value in enumerate(strict)]
    assert post(client_of(model), path, tools=tools).status_code == 200
    options = model.asked[0][1]
    assert options.get("strict_tools") is expected
    assert options["tools"][0] == {"type": "function", "function": {"name": "f0", "parameters": SCHEMA}}


@PATHS
def test_forced_functions(client_of: Clients, path: str) -> None:
    model = ScriptedModel([chunk("a", reason="stop")])
    client = client_of(model)
    assert post(client, path, tools=[tool(path, "f")], tool_choice=forced(path, "f")).status_code == 200
    assert model.asked[0][1]["tool_choice"] == "f"
    for name in ("none", "auto", "required"):
        response = post(client, path, tools=[tool(path, name)], tool_choice=forced(path, name))
        assert response.status_code == 400 and f"called '{name}'" in response.json()["error"]["message"]
        assert post(client, path, tools=[tool(path, name)]).status_code == 200, "only forcing it is refused"
    response = post(client, path, tool_choice=forced(path, "f"))
    assert response.status_code == 400 and "needs tools" in response.json()["error"]["message"]
