"""The SDKs of OpenAI and Anthropic against a server with the demo model."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import anthropic
import openai
import pytest
from browser import serving

from flash_moe import Model
from flash_moe.server.admission import Admission
from flash_moe.server.app import build
from flash_moe.server.service import Service

pytestmark = pytest.mark.clients
ASK: Any = [{"role": "user", "content": "What is the page cache?"}]
GREEDY = {"temperature": 0}  # the SDK of Anthropic has no temperature any more
WEATHER: Any = {
    "type": "object",
    "properties": {"city": {"type": "string", "description": "The city."}},
    "required": ["city"],
}
TOOL: Any = {
    "type": "function",
    "function": {"name": "get_weather", "description": "The weather.", "parameters": WEATHER},
}


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    with Model.load("demo", experts_per_token=None) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def address(model: Model) -> Iterator[str]:
    with serving(build(Service(model, ["demo"], Admission(4, 8)), api_key="secret")) as found:
        yield found


@pytest.fixture(scope="module")
def client(address: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{address}/v1", api_key="secret", max_retries=0)


@pytest.fixture(scope="module")
def claude(address: str) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=address, api_key="secret", max_retries=0)


def test_models(client: openai.OpenAI) -> None:
    assert [entry.id for entry in client.models.list()] == ["demo"]
    assert client.models.retrieve("demo").id == "demo"


def test_a_reply_is_that_of_the_library(client: openai.OpenAI, claude: anthropic.Anthropic, model: Model) -> None:
    expected = model.generate(ASK, max_tokens=20, temperature=0)
    reply = client.chat.completions.create(model="demo", messages=ASK, max_tokens=20, temperature=0)
    assert reply.choices[0].message.content == expected.text
    assert reply.usage is not None and reply.usage.completion_tokens == len(expected.tokens)
    message = claude.messages.create(model="demo", messages=ASK, max_tokens=20, extra_body=GREEDY)
    assert "".join(block.text for block in message.content if block.type == "text") == expected.text
    response = client.responses.create(model="demo", input=ASK, max_output_tokens=20, temperature=0)
    assert response.output_text == expected.text and response.status == "incomplete"


def test_streams(client: openai.OpenAI, claude: anthropic.Anthropic, model: Model) -> None:
    expected = model.generate(ASK, max_tokens=20, temperature=0).text
    options: Any = {"stream": True, "stream_options": {"include_usage": True}, "temperature": 0, "max_tokens": 20}
    chunks = list(client.chat.completions.create(model="demo", messages=ASK, **options))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == expected
    assert chunks[-1].usage.completion_tokens == 20 and chunks[-2].choices[0].finish_reason == "length"
    with claude.messages.stream(model="demo", messages=ASK, max_tokens=20, extra_body=GREEDY) as stream:
        assert "".join(stream.text_stream) == expected
        assert stream.get_final_message().stop_reason == "max_tokens"
    with client.responses.stream(model="demo", input=ASK, max_output_tokens=20, temperature=0) as events:
        text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
        assert text == expected


def test_a_loop_with_tools(client: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": "What is the weather in Bern?"}]
    options: Any = {"model": "demo", "tools": [TOOL], "tool_choice": "required", "temperature": 0, "max_tokens": 200}
    reply = client.chat.completions.create(messages=messages, **options).choices[0]  # type: ignore[call-overload]
    assert reply.finish_reason == "tool_calls"
    (call,) = reply.message.tool_calls
    assert call.function.name == "get_weather" and set(json.loads(call.function.arguments)) == {"city"}
    messages += [
        reply.message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": "18 degrees, sunny"},
    ]
    options["tool_choice"] = "none"
    answer = client.chat.completions.create(messages=messages, **options).choices[0]  # type: ignore[call-overload]
    assert answer.message.content and not answer.message.tool_calls


def test_a_loop_with_tools_in_anthropic_words(claude: anthropic.Anthropic) -> None:
    messages: Any = [{"role": "user", "content": "What is the weather in Bern?"}]
    tool: Any = {"name": "get_weather", "description": "The weather.", "input_schema": WEATHER}
    choice: Any = {"type": "tool", "name": "get_weather"}
    options: Any = {"model": "demo", "max_tokens": 200, "tools": [tool], "extra_body": GREEDY}
    with claude.messages.stream(messages=messages, tool_choice=choice, **options) as stream:
        message = stream.get_final_message()
    assert message.stop_reason == "tool_use"
    (use,) = [block for block in message.content if block.type == "tool_use"]
    assert use.name == "get_weather" and set(use.input) == {"city"}  # type: ignore[arg-type]
    result = {"type": "tool_result", "tool_use_id": use.id, "content": "18 degrees, sunny"}
    messages += [{"role": "assistant", "content": message.content}, {"role": "user", "content": [result]}]
    answer = claude.messages.create(messages=messages, tool_choice={"type": "none"}, **options)
    assert answer.content[0].type == "text" and answer.content[0].text


def test_formats(client: openai.OpenAI) -> None:
    schema = {
        "type": "object", "additionalProperties": False, "required": ["name", "age"],
        "properties": {"name": {"type": "string", "maxLength": 20}, "age": {"type": "integer", "minimum": 0, "maximum": 150}},
    }  # fmt: skip
    form: Any = {"type": "json_schema", "json_schema": {"name": "person", "schema": schema, "strict": True}}
    ask: Any = [{"role": "user", "content": "Anna is 31 years old. Name and age as JSON."}]
    reply = client.chat.completions.create(
        model="demo", messages=ask, response_format=form, max_tokens=100, temperature=0
    )
    found = json.loads(reply.choices[0].message.content or "")
    assert set(found) == {"name", "age"} and type(found["age"]) is int
    response = client.responses.create(
        model="demo", input=ask, max_output_tokens=100, temperature=0,
        text={"format": {"type": "json_schema", "name": "person", "schema": schema}},
    )  # fmt: skip
    assert set(json.loads(response.output_text)) == {"name", "age"}


def test_formats_in_anthropic_words(claude: anthropic.Anthropic) -> None:
    schema: Any = {"type": "object", "required": ["age"], "properties": {"age": {"type": "integer", "maximum": 150}}}
    ask: Any = [{"role": "user", "content": "Anna is 31 years old. Her age as JSON."}]
    config: Any = {"format": {"type": "json_schema", "schema": schema}}
    message = claude.messages.create(model="demo", messages=ask, max_tokens=60, output_config=config, extra_body=GREEDY)
    assert type(json.loads(message.content[0].text)["age"]) is int  # type: ignore[union-attr]


def test_log_probabilities(client: openai.OpenAI) -> None:
    options: Any = {"logprobs": True, "top_logprobs": 3, "max_tokens": 4, "temperature": 0}
    content = client.chat.completions.create(model="demo", messages=ASK, **options).choices[0].logprobs.content
    assert len(content) == 4 and all(len(entry.top_logprobs) == 3 for entry in content)
    assert all(entry.logprob == entry.top_logprobs[0].logprob <= 0 for entry in content)
    text = client.completions.create(model="demo", prompt="The page", max_tokens=3, logprobs=2, temperature=0)
    assert len(text.choices[0].logprobs.token_logprobs) == 3  # type: ignore[union-attr,arg-type]


def test_stop_and_seed(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="demo", messages=ASK, max_tokens=40, temperature=0)
    word = (whole.choices[0].message.content or "").split()[3]
    cut = client.chat.completions.create(model="demo", messages=ASK, max_tokens=40, temperature=0, stop=word)
    assert cut.choices[0].finish_reason == "stop" and word not in (cut.choices[0].message.content or "")
    draws = [
        client.chat.completions.create(model="demo", messages=ASK, max_tokens=8, temperature=1, seed=seed)
        for seed in (1, 1, 2)
    ]
    texts = [draw.choices[0].message.content for draw in draws]
    assert texts[0] == texts[1]


def test_errors(client: openai.OpenAI, claude: anthropic.Anthropic, address: str) -> None:
    with pytest.raises(openai.NotFoundError, match="not served here"):
        client.chat.completions.create(model="gpt-9", messages=ASK)
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.chat.completions.create(model="demo", messages=ASK, temperature=9)
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{address}/v1", api_key="wrong").models.list()
    with pytest.raises(anthropic.NotFoundError):
        claude.messages.create(model="claude-9", messages=ASK, max_tokens=3)
    with pytest.raises(anthropic.BadRequestError, match="max_tokens"):
        claude.messages.create(model="demo", messages=ASK, max_tokens=0)


def test_leaving_a_stream_ends_its_generation(client: openai.OpenAI, address: str) -> None:
    import httpx

    stream = client.chat.completions.create(model="demo", messages=ASK, max_tokens=2000, stream=True, temperature=1)
    for _, _ in zip(range(3), stream, strict=False):
        pass
    stream.close()
    end = time.monotonic() + 2
    while httpx.get(f"{address}/health").json()["active"] and time.monotonic() < end:
        time.sleep(0.02)
    assert httpx.get(f"{address}/health").json()["active"] == 0


def test_a_conversation_goes_on_from_its_cache(client: openai.OpenAI) -> None:
    messages: Any = [{"role": "user", "content": "What is a page cache? " * 20}]
    other: Any = [{"role": "user", "content": "Tell me about SSDs. " * 20}]
    for history in (messages, other):
        reply = client.chat.completions.create(model="demo", messages=history, max_tokens=10, temperature=0)
        history += [
            {"role": "assistant", "content": reply.choices[0].message.content},
            {"role": "user", "content": "Why?"},
        ]
    for history in (messages, other):
        usage = client.chat.completions.create(model="demo", messages=history, max_tokens=5, temperature=0).usage
        assert usage.prompt_tokens_details.cached_tokens > 0.7 * usage.prompt_tokens  # type: ignore[union-attr]


def test_tokens_are_counted(claude: anthropic.Anthropic, model: Model) -> None:
    count = claude.messages.count_tokens(model="demo", messages=ASK, system="Be brief.")
    assert count.input_tokens == len(model.encode([{"role": "system", "content": "Be brief."}, *ASK]))
