"""What the server refuses, with which status and in which words."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from scripted import ScriptedModel, chunk
from starlette.testclient import TestClient

from flash_moe.errors import PromptError
from flash_moe.server.experts_feed import ExpertsFeed

ASK = [{"role": "user", "content": "Hi"}]
CHAT, MESSAGES, RESPONSES = "/v1/chat/completions", "/v1/messages", "/v1/responses"
Clients = Callable[..., TestClient]


@pytest.fixture
def client(client_of: Clients) -> TestClient:
    return client_of(ScriptedModel([chunk("a", reason="stop")]))


def chat(client: TestClient, **fields: Any) -> Any:
    return client.post(CHAT, json={"model": "scripted", "messages": ASK} | fields)


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"{", 400), (b"", 400), (b"[]", 400), (b"\xff\xfe", 400), (b'{"model": "scripted"}', 400),
        (b"[" * 60_000, 400), (b" " * 200_000, 413),
    ],
    ids=["cut", "empty", "list", "not-utf8", "no-messages", "deep", "large"],
)  # fmt: skip
def test_bodies(client: TestClient, content: bytes, status: int) -> None:
    for path in (CHAT, MESSAGES, "/v1/responses", "/v1/completions"):
        response = client.post(path, content=content, headers={"Content-Type": "application/json"})
        assert response.status_code == status
        assert response.json()["error"]["message"]
    assert response.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": "1"}, {"temperature": 3}, {"max_tokens": 0}, {"n": 2}, {"messages": []}, {"stop": [""]},
        {"messages": [{"role": "robot", "content": "a"}]}, {"logit_bias": {"x": 1}}, {"unknown": 1},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        {"top_logprobs": 3}, {"tool_choice": "required"}, {"response_format": {"type": "json_schema"}},
        {"temperature": 1.5}, {"seed": 2**70}, {"stream": "yes"},
    ],
    ids=lambda fields: next(iter(fields)),
)  # fmt: skip
def test_fields(client: TestClient, fields: dict[str, Any]) -> None:
    response = chat(client, **fields)
    assert response.status_code == 400, response.text
    assert next(iter(fields)).split("_")[0] in response.json()["error"]["message"]


IMAGE = {"type": "image_url", "image_url": {"url": "x"}}
RESULT = {"type": "tool_result", "tool_use_id": "c", "content": [{"type": "image"}]}


@pytest.mark.parametrize(
    ("path", "fields", "expected"),
    [
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, IMAGE]}]},
         "messages.0.content.1.type: content of type 'image_url' is not supported; this server takes text"),
        (MESSAGES, {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
         "messages.0.content.0: content of type 'image' is not supported; this server takes text"),
        (MESSAGES, {"messages": [{"role": "user", "content": [RESULT]}]},
         "messages.0.content.0.content.0.type: content of type 'image' is not supported; this server takes text"),
        (RESPONSES, {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
         "input.0.content.0.type: content of type 'input_image' is not supported; this server takes text"),
        (RESPONSES, {"input": [{"type": "item_reference"}]}, "input.0: the type is 'item_reference', expected 'message'"),
        (RESPONSES, {"input": []}, "input: List should have at least 1 item"),
        (CHAT, {"stop": ["a"] * 17}, "stop: List should have at most 16 items"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages.0.content.0.text: Field required"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]},
         "messages.0.content.0.text: Input should be a valid string"),
        (CHAT, {"messages": [{"role": "user", "content": 5}]}, "messages.0.content: Input should be a valid string"),
        (CHAT, {"tool_choice": {"type": "function"}}, "tool_choice.function: Field required"),
        (CHAT, {"tool_choice": "some"}, "tool_choice: Input should be 'none', 'auto' or 'required'"),
        ("/v1/completions", {"prompt": ["a", "b"]}, "prompt: List should have at most 1 item"),
    ],
)  # fmt: skip
def test_the_message_names_what_is_wrong(client: TestClient, path: str, fields: dict[str, Any], expected: str) -> None:
    base: dict[str, Any] = {} if path in (RESPONSES, "/v1/completions") else {"messages": ASK}
    response = client.post(
        path, json={"model": "scripted", **({"max_tokens": 5} if path == MESSAGES else {}), **base, **fields}
    )
    assert response.status_code == 400 and response.json()["error"]["message"].startswith(expected)


@pytest.mark.parametrize("value", ["NaN", "-Infinity", "1e999", "[{}, [NaN]]"])
@pytest.mark.parametrize("stream", ["false", "true"])
def test_numbers_that_json_does_not_have(client: TestClient, value: str, stream: str) -> None:
    body = f'{{"model": "scripted", "input": "Hi", "stream": {stream}, "metadata": {{"a": {value}}}}}'
    response = client.post(RESPONSES, content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 400 and response.json()["error"]["message"].startswith("metadata: found NaN or")


def test_log_probabilities_of_a_response(client: TestClient) -> None:
    for include, status in (["message.output_text.logprobs"], 400), (["reasoning.encrypted_content"], 200):
        body = {"model": "scripted", "input": "Hi", "include": include}
        assert client.post(RESPONSES, json=body).status_code == status


def test_a_refusal_of_a_stream_has_a_status(client: TestClient) -> None:
    assert chat(client, stream=True, temperature=1.5).status_code == 400


def test_names_of_models(client: TestClient) -> None:
    assert chat(client, model="gpt-9").status_code == 404
    assert chat(client, model="other").status_code == 200
    assert [entry["id"] for entry in client.get("/v1/models").json()["data"]] == ["scripted", "other"]
    assert client.get("/v1/models/other").status_code == 200 and client.get("/v1/models/x/y").status_code == 404


def test_content_types_that_pages_of_other_sites_can_send(client: TestClient) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
        response = client.post(CHAT, content=b"{}", headers={"Content-Type": kind})
        assert response.status_code == 415


def test_keys(client_of: Clients) -> None:
    client = client_of(ScriptedModel([chunk("a", reason="stop")]), api_key="sëcret")
    good = "sëcret".encode()
    for headers in ({}, {"Authorization": b"Bearer x"}, {"Authorization": good}, {"x-api-key": b""}, {"cookie": good}):
        for path in ("/v1/models", "/metrics", "/experts"):
            assert client.get(path, headers=headers).status_code == 401
        response = client.post(MESSAGES, json={}, headers=headers)
        assert response.status_code == 401 and response.json()["error"]["type"] == "authentication_error"
    for headers in ({"Authorization": b"Bearer " + good}, {"x-api-key": good}):
        assert client.get("/v1/models", headers=headers).status_code == 200
    assert client.get("/health").status_code == client.get("/").status_code == 200


def test_hosts(client_of: Clients) -> None:
    client = client_of(ScriptedModel([]), allowed_hosts=["localhost", "127.0.0.1"])
    assert client.get("/health", headers={"Host": "localhost:8080"}).status_code == 200
    assert client.get("/health", headers={"Host": "evil.example"}).status_code == 400


def test_no_other_site_may_ask_unless_allowed(client_of: Clients) -> None:
    origin = {"Origin": "https://chat.example", "Access-Control-Request-Method": "POST"}
    model = ScriptedModel([])
    assert "access-control-allow-origin" not in client_of(model).options(CHAT, headers=origin).headers
    allowed = client_of(model, allowed_origins=["https://chat.example"])
    asked = "x-stainless-lang, anthropic-dangerous-direct-browser-access"  # as the SDKs for browsers send
    response = allowed.options(CHAT, headers=origin | {"Access-Control-Request-Headers": asked})
    assert response.status_code == 200 and response.headers["access-control-allow-headers"] == asked
    assert response.headers["access-control-allow-origin"] == "https://chat.example"
    other = allowed.options(CHAT, headers=origin | {"Origin": "https://evil.example"})
    assert other.status_code == 400 and "access-control-allow-origin" not in other.headers


@pytest.mark.parametrize("path", ["/../../etc/passwd", "/%2e%2e/app.py", "/app.py", "/page/index.html", "/v1/nothing"])
def test_paths(client: TestClient, path: str) -> None:
    response = client.get(path)
    assert response.status_code == 404 and "error" in response.json()


def test_wrong_methods(client: TestClient) -> None:
    assert client.get(CHAT).status_code == 405 and client.post("/health").status_code == 405


def test_the_headers_of_a_stream_without_the_stream(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream without an end would keep the connection, and the client's next request on it waits."""
    monkeypatch.setattr(ExpertsFeed, "response", None)
    response = client.head("/experts")
    assert response.status_code == 200 and response.headers["content-type"].startswith("text/event-stream")


def test_a_slow_body(client: TestClient) -> None:
    def pieces() -> Any:
        yield b"{"
        time.sleep(1.0)
        yield b"}"

    # the test client sends a body whole; what a slow one gets is tested over a socket in tests/clients
    assert client.post(CHAT, content=pieces(), headers={"Content-Type": "application/json"}).status_code in (400, 408)


def test_a_full_queue(client_of: Clients) -> None:
    client = client_of(ScriptedModel([chunk("a"), chunk("b", reason="stop")], seconds=0.3), active=1, waiting=1)
    statuses: list[int] = []
    with client:
        threads = [threading.Thread(target=lambda: statuses.append(chat(client).status_code)) for _ in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(statuses) == [200, 200, 429, 429, 429]
        assert chat(client).status_code == 200
        metrics = client.get("/metrics").text
    assert 'flash_moe_requests_total{path="/v1/chat/completions",status="429"} 3' in metrics
    assert "flash_moe_generated_tokens_total 9" in metrics and "flash_moe_requests_active 0" in metrics


def test_long_prompts(client_of: Clients) -> None:
    client = client_of(ScriptedModel([chunk("a", reason="stop")]), prompt_limit=50)
    assert chat(client).status_code == 200
    response = chat(client, messages=[{"role": "user", "content": "a" * 100}])
    assert response.status_code == 400 and response.json()["error"]["code"] == "context_length_exceeded"
    prefilled = [*ASK, {"role": "assistant", "content": "a" * 100}]
    response = client.post(MESSAGES, json={"model": "scripted", "max_tokens": 5, "messages": prefilled})
    assert response.status_code == 400 and "this server takes 50" in response.json()["error"]["message"]


def test_prompts_beyond_the_context(client_of: Clients) -> None:
    class Model(ScriptedModel):
        def stream(self, prompt: Any, **options: Any) -> Any:
            raise PromptError("the prompt is wrong")

    client = client_of(Model([]))
    assert (
        chat(client).json()["error"] | {"message": "the prompt is wrong", "code": None} == chat(client).json()["error"]
    )
    response = chat(client, messages=[{"role": "user", "content": "a" * 200}])
    assert response.status_code == 400 and response.json()["error"]["code"] == "context_length_exceeded"
