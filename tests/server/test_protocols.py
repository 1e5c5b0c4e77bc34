"""Replies in the words of each protocol, whole and as streams, from a scripted model."""

from __future__ import annotations

import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from scripted import ScriptedModel, Step, chunk
from starlette.testclient import TestClient

from flash_moe.errors import NumericalError

CALL = SimpleNamespace(id="call_1", name="weather", arguments={"city": "Bern"})
SECOND = SimpleNamespace(id="call_2", name="weather", arguments={"city": "Köln"})
STEPS = [
    chunk(reasoning="Let me "), chunk(reasoning="see."), chunk("It is"), chunk(" warm."), chunk(calls=(CALL,)),
    chunk(calls=(SECOND,)), chunk(reason="tool_calls"),
]  # fmt: skip
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
ASK = [{"role": "user", "content": "How is the weather?"}]
Clients = Callable[..., TestClient]


def events(text: str) -> list[Any]:
    """The JSON of server-sent events."""
    lines = [line.removeprefix("data: ") for line in text.split("\n") if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


def post(client: TestClient, path: str, **body: Any) -> Any:
    return client.post(path, json={"model": "scripted", **body})


def test_chat(client_of: Clients) -> None:
    answer = post(client_of(ScriptedModel(STEPS)), "/v1/chat/completions", messages=ASK, tools=[TOOL]).json()
    choice = answer["choices"][0]
    assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] == "It is warm."
    assert choice["message"]["reasoning_content"] == "Let me see."
    calls = choice["message"]["tool_calls"]
    assert [(call["id"], json.loads(call["function"]["arguments"])) for call in calls] == [
        ("call_1", {"city": "Bern"}), ("call_2", {"city": "Köln"}),
    ]  # fmt: skip
    assert answer["usage"]["completion_tokens_details"] == {"reasoning_tokens": 2}
    assert answer["usage"]["prompt_tokens"] == 7 and answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 2
    assert answer["object"] == "chat.completion" and answer["model"] == "scripted"


def test_chat_stream(client_of: Clients) -> None:
    model = ScriptedModel(STEPS)
    options = {"stream": True, "stream_options": {"include_usage": True}}
    response = post(client_of(model), "/v1/chat/completions", messages=ASK, **options)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.text.endswith("data: [DONE]\n\n")
    found = events(response.text)
    deltas = [event["choices"][0]["delta"] for event in found if event["choices"]]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(delta.get("content", "") for delta in deltas) == "It is warm."
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "Let me see."
    assert [call["index"] for delta in deltas for call in delta.get("tool_calls", ())] == [0, 1]
    assert found[-2]["choices"][0]["finish_reason"] == "tool_calls"
    assert found[-1]["usage"]["completion_tokens"] == 3 and found[-1]["choices"] == []
    assert len({event["id"] for event in found}) == 1


@pytest.mark.parametrize("stream", [False, True])
def test_one_call_where_the_client_takes_no_more(client_of: Clients, stream: bool) -> None:
    model = ScriptedModel([*STEPS[:-1], *[chunk("more")] * 1000], seconds=0.01)  # would take 10 seconds
    options = {"messages": ASK, "tools": [TOOL], "parallel_tool_calls": False, "stream": stream}
    response = post(client_of(model), "/v1/chat/completions", **options)
    assert "call_1" in response.text and "call_2" not in response.text and "tool_calls" in response.text
    assert model.cancelled == 1


def test_messages(client_of: Clients) -> None:
    answer = post(client_of(ScriptedModel(STEPS)), "/v1/messages", messages=ASK, max_tokens=9).json()
    assert [block["type"] for block in answer["content"]] == ["thinking", "text", "tool_use", "tool_use"]
    assert answer["content"][2] == {"type": "tool_use", "id": "call_1", "name": "weather", "input": {"city": "Bern"}}
    assert answer["stop_reason"] == "tool_use" and answer["type"] == "message"
    assert answer["usage"]["input_tokens"] == 5 and answer["usage"]["cache_read_input_tokens"] == 2


def test_messages_stream(client_of: Clients) -> None:
    response = post(client_of(ScriptedModel(STEPS)), "/v1/messages", messages=ASK, max_tokens=9, stream=True)
    found = events(response.text)
    kinds = [event["type"] for event in found]
    assert kinds[0] == "message_start" and kinds[-2:] == ["message_delta", "message_stop"]
    assert kinds.count("content_block_start") == kinds.count("content_block_stop") == 4
    starts = [event for event in found if event["type"] == "content_block_start"]
    assert [(event["index"], event["content_block"]["type"]) for event in starts] == [
        (0, "thinking"), (1, "text"), (2, "tool_use"), (3, "tool_use"),
    ]  # fmt: skip
    parts = [event["delta"].get("partial_json") for event in found if event["type"] == "content_block_delta"]
    assert [json.loads(part) for part in parts if part] == [{"city": "Bern"}, {"city": "Köln"}]
    assert found[-2]["delta"]["stop_reason"] == "tool_use"


@pytest.mark.parametrize(("reason", "expected"), [("stop", "stop_sequence"), ("tool_calls", "tool_use")])
def test_messages_that_a_stop_sequence_ends(client_of: Clients, reason: str, expected: str) -> None:
    model = ScriptedModel([chunk("K is "), Step(finish_reason=reason, stop_string="END")])
    found = {"stop_reason": expected, "stop_sequence": "END" if reason == "stop" else None}
    options = {"messages": ASK, "max_tokens": 9, "stop_sequences": ["END"]}
    answer = post(client_of(model), "/v1/messages", **options).json()
    assert answer | found == answer
    streamed = events(post(client_of(model), "/v1/messages", stream=True, **options).text)
    assert streamed[-2]["delta"] == found and streamed[0]["message"]["stop_reason"] is None


def test_responses(client_of: Clients) -> None:
    answer = post(client_of(ScriptedModel(STEPS)), "/v1/responses", input="How is the weather?").json()
    assert [item["type"] for item in answer["output"]] == ["reasoning", "message", "function_call", "function_call"]
    assert answer["output"][1]["content"][0]["text"] == "It is warm." and answer["status"] == "completed"
    assert {item["status"] for item in answer["output"]} == {"completed"}
    assert answer["usage"]["output_tokens_details"] == {"reasoning_tokens": 2}


def test_a_cut_response(client_of: Clients) -> None:
    model = ScriptedModel([chunk(reasoning="Hm."), chunk("It"), chunk(" is", reason="length")])
    wanted = {"type": "json_schema", "name": "a", "schema": {"type": "string"}}
    options = {"input": "Hi", "text": {"format": wanted}}
    answer = post(client_of(model), "/v1/responses", **options).json()
    assert answer["status"] == "incomplete" and answer["incomplete_details"] == {"reason": "max_output_tokens"}
    assert [item["status"] for item in answer["output"]] == ["completed", "incomplete"]
    assert answer["text"] == {"format": wanted}
    done = [
        e for e in events(post(client_of(model), "/v1/responses", stream=True, **options).text) if "done" in e["type"]
    ]
    assert done[-1]["item"]["status"] == "incomplete"


def test_responses_stream(client_of: Clients) -> None:
    found = events(post(client_of(ScriptedModel(STEPS)), "/v1/responses", input="Hi", stream=True).text)
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    assert found[0]["type"] == "response.created" and found[-1]["type"] == "response.completed"
    assert "".join(e["delta"] for e in found if e["type"] == "response.output_text.delta") == "It is warm."
    done = [event["item"]["type"] for event in found if event["type"] == "response.output_item.done"]
    assert done == ["reasoning", "message", "function_call", "function_call"]


def test_completion(client_of: Clients) -> None:
    model = ScriptedModel([chunk("Once"), chunk(" upon", reason="length")])
    answer = post(client_of(model), "/v1/completions", prompt="Tell").json()
    assert answer["choices"][0]["text"] == "Once upon" and answer["choices"][0]["finish_reason"] == "length"
    assert model.asked == [("Tell", {"raw": True, "max_tokens": 16})]


def test_options_reach_the_library(client_of: Clients) -> None:
    model = ScriptedModel([chunk("a", reason="stop")])
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    options = {
        "temperature": 0, "top_p": 0.5, "seed": 3, "stop": ["x"], "presence_penalty": 1, "frequency_penalty": 0.5,
        "logit_bias": {"5": -100}, "max_completion_tokens": 4, "tools": [TOOL], "tool_choice": "required",
        "reasoning_effort": "none", "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}},
        "user": "somebody",
    }  # fmt: skip
    assert post(client_of(model), "/v1/chat/completions", messages=ASK, **options).status_code == 200
    assert model.asked[0][1] == {
        "temperature": 0, "top_p": 0.5, "seed": 3, "stop": ["x"], "presence_penalty": 1, "frequency_penalty": 0.5,
        "logit_bias": {5: -100}, "max_tokens": 4, "tools": [TOOL], "tool_choice": "required", "enable_thinking": False,
        "response_format": {"type": "json_schema", "json_schema": {"schema": schema}},
    }  # fmt: skip


def test_anthropic_history_reaches_the_library(client_of: Clients) -> None:
    model = ScriptedModel([chunk("a", reason="stop")])
    history = [
        {"role": "user", "content": "Weather in Bern?"},
        {"role": "assistant", "content": [
            {"type": "thinking", "thinking": "Hm.", "signature": "s"}, {"type": "text", "text": "I look."},
            {"type": "tool_use", "id": "c1", "name": "weather", "input": {"city": "Bern"}},
        ]},
        {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "c1", "content": [{"type": "text", "text": "20 °C"}]},
            {"type": "tool_result", "tool_use_id": "c2", "content": "no such city", "is_error": True},
            {"type": "text", "text": "And?"},
        ]},
    ]  # fmt: skip
    system = [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}]
    post(client_of(model), "/v1/messages", messages=history, max_tokens=5, system=system)
    function = {"name": "weather", "arguments": {"city": "Bern"}}
    assert model.asked[0][0] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Weather in Bern?"},
        {
            "role": "assistant", "content": "I look.", "reasoning_content": "Hm.",
            "tool_calls": [{"id": "c1", "type": "function", "function": function}],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "20 °C"},
        {"role": "tool", "tool_call_id": "c2", "content": '{"error": "no such city"}'},
        {"role": "user", "content": "And?"},
    ]  # fmt: skip


def test_a_last_message_of_the_assistant_is_what_the_reply_begins_with(client_of: Clients) -> None:
    model = ScriptedModel([chunk("a", reason="stop")])
    post(client_of(model), "/v1/messages", messages=[*ASK, {"role": "assistant", "content": "It is"}], max_tokens=5)
    assert model.asked == [(ASK, {"max_tokens": 5, "prefill": "It is"})]


def test_a_malformed_call_is_not_lost(client_of: Clients) -> None:
    model = ScriptedModel([Step(tool_call_error=ValueError("no end")), chunk(reason="stop")])
    answer = post(client_of(model), "/v1/chat/completions", messages=ASK, tools=[TOOL]).json()
    assert answer["choices"][0]["message"]["content"] == "(no end)"


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/v1/responses", "/v1/completions"])
def test_an_error_in_the_middle_of_a_stream_is_an_event(client_of: Clients, path: str) -> None:
    model = ScriptedModel([chunk("It"), NumericalError("NaN in layer 3 of /secret")])
    body = {"messages": ASK, "max_tokens": 5} if "messages" in path or "chat" in path else {"input": "a"}
    body = {"prompt": "a"} if path.endswith("completions") and "chat" not in path else body
    text = post(client_of(model), path, stream=True, **body).text
    assert "NumericalError" in text and "/secret" not in text and "[DONE]" not in text


def test_tokens_are_counted(client_of: Clients) -> None:
    answer = post(client_of(ScriptedModel([])), "/v1/messages/count_tokens", messages=ASK).json()
    assert answer == {"input_tokens": len(str(ASK[0]))}
