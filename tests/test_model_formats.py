"""Formats, strict tools, biases and log probabilities through the public API, with the demo model."""

from __future__ import annotations

import json
import math
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from pydantic import BaseModel, Field

from flash_moe import ArgumentError, Model
from flash_moe.errors import FormatError
from flash_moe.evaluation import ToolCallCase, greedy, tool_call_score
from flash_moe.text.tool_calls import parse_tool_calls

WEATHER = {
    "name": "get_weather",
    "description": "Returns the weather of a city.",
    "parameters": {
        "type": "object",
        "properties": {
            "city": {"type": "string", "maxLength": 20},
            "days": {"type": "integer", "minimum": 1, "maximum": 9},
        },
        "required": ["city"],
    },
}
TIME = {
    "name": "get_time",
    "parameters": {"type": "object", "properties": {"zone": {"enum": ["UTC", "CET"]}}, "required": ["zone"]},
}
QUESTION = "What is the weather in Oslo?"


class City(BaseModel):
    name: str = Field(max_length=20)
    population: int = Field(ge=0, le=10**7)


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    pytest.importorskip("llguidance")
    with Model.load("demo", expert_io="resident") as model:
        yield model


def calls(reply: Any, tools: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return parse_tool_calls(reply.raw_text, tools)[0]


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_a_class(model: Model, temperature: float) -> None:
    for seed in range(3):
        reply = model.generate(
            "Kim lives in Oslo. Give me the city as JSON.", response_format=City, temperature=temperature, seed=seed
        )
        assert isinstance(reply.parsed, City) and reply.enforced == "json" and reply.finish_reason == "stop"
        assert json.loads(reply.text) == reply.parsed.model_dump()


def test_choices_regular_expressions_and_json(model: Model) -> None:
    assert model.generate("Is Oslo a city?", response_format=["indeed", "never"]).parsed in ("indeed", "never")
    match = model.generate("A date?", response_format=re.compile(r"(?P<year>\d{4})-\d\d"), temperature=1.0).parsed
    assert int(match["year"]) >= 0
    call = "Tilda Vargas called. The phone number is 555-9607.\n\nGive me who (name) and flee (phone) as JSON."
    assert model.generate(call, response_format="json").parsed == {"who": "Tilda Vargas", "flee": "555-9607"}


def test_a_reply_ends_as_the_messages_before_it(model: Model) -> None:
    enforced = model._enforcer.enforce(None, "auto", None, ["indeed", "never"])
    prompt = model.encode("Is Oslo a city?")
    model._enforcer.constraint(enforced, prompt)
    assert enforced.grammar is not None and len(model.tokenizer.eos_token_ids) > 1
    assert enforced.grammar.end == model.tokenizer.token_id("<|im_end|>")
    model._enforcer.constraint(enforced, model.tokenizer.encode("no message"))
    assert enforced.grammar.end is None


def test_no_format_is_no_format(model: Model) -> None:
    reply = model.generate("Hello", max_tokens=4)
    assert reply.parsed is None and reply.enforced == "" and reply.logprobs is None


def test_a_reply_that_was_cut_has_no_value(model: Model) -> None:
    reply = model.generate("Hello", response_format=City, max_tokens=3)
    assert reply.finish_reason == "length" and reply.text
    with pytest.raises(FormatError, match="max_tokens"):
        _ = reply.parsed


def test_reasoning_stays_free(model: Model) -> None:
    """The model is made to think a token that no format allows, and to stop thinking behind it."""
    open_mark, close = (model.tokenizer.token_id(text) for text in ("<think>", "</think>"))
    word = model.tokenizer.encode("weather")[0]
    script = [word, word, close]

    def think(tokens: mx.array, logits: mx.array) -> mx.array:
        behind = tokens.tolist()
        done = behind[::-1].index(open_mark) - 1  # the template writes a line break behind <think>
        return mx.where(mx.arange(logits.shape[1]) == script[done], 1e4, logits) if done < len(script) else logits

    reply = model.generate(QUESTION, response_format=["yes", "no"], enable_thinking=True, logits_processors=[think])
    assert list(reply.tokens[:3]) == script and reply.parsed in ("yes", "no")


def test_required_and_named_calls(model: Model) -> None:
    tools = [WEATHER, TIME]
    for choice, names in (("required", {"get_weather", "get_time"}), ("get_time", {"get_time"})):
        reply = model.generate(QUESTION, tools=tools, tool_choice=choice)
        assert {call["name"] for call in calls(reply, tools)} <= names and calls(reply, tools)
        assert reply.enforced == "tools"


def test_no_call_where_none_is_wanted(model: Model) -> None:
    assert calls(model.generate(QUESTION, tools=[WEATHER]), [WEATHER])
    reply = model.generate(QUESTION, tools=[WEATHER], tool_choice="none", max_tokens=40)
    assert model.tokenizer.token_id("<tool_call>") not in reply.tokens and reply.enforced == ""


def test_a_format_or_calls(model: Model) -> None:
    reply = model.generate(QUESTION, tools=[WEATHER], response_format=City)
    assert reply.enforced == "tools or json"
    assert (reply.parsed is None) == bool(calls(reply, [WEATHER]))


def test_strict_tools_by_default_where_they_can_be(model: Model, monkeypatch: Any, caplog: Any) -> None:
    odd = {"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}}
    ask = {"prompt": QUESTION, "max_tokens": 2}
    assert model.generate(**ask, tools=[WEATHER]).enforced == "tools"
    assert model.generate(**ask, tools=[WEATHER], strict_tools=False).enforced == ""
    for _ in range(2):
        assert model.generate(**ask, tools=[odd]).enforced == ""
    assert caplog.text.count("uniqueItems") == 1
    with pytest.raises(ArgumentError, match="uniqueItems"):
        model.generate(**ask, tools=[odd], strict_tools=True)
    monkeypatch.setattr("flash_moe.structured.matcher.installed", lambda: False)
    monkeypatch.setattr("flash_moe.structured.enforcer.installed", lambda: False)
    assert model.generate(**ask, tools=[WEATHER]).enforced == ""
    for options in ({"strict_tools": True}, {"tool_choice": "required"}, {"response_format": "json"}):
        with pytest.raises(ArgumentError, match=r"needs llguidance.*structured"):
            model.generate(**ask, tools=[WEATHER], **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tool_choice": "required"}, "pass tools"),
        ({"tools": [WEATHER], "tool_choice": "other"}, r"one of \['get_weather'\]"),
        ({"tools": [WEATHER], "tool_choice": "required", "strict_tools": False}, "switches off"),
        ({"tools": [WEATHER], "response_format": "json", "strict_tools": False}, "switches off"),
        ({"response_format": {"type": "integer", "minimum": 2, "maximum": 1}}, "cannot be enforced"),
        ({"logit_bias": {10**6: 1.0}}, "token id of logit_bias"),
        ({"logprobs": -1}, "logprobs"),
        ({"presence_penalty": "high"}, "presence_penalty"),
    ],
    ids=str,
)
def test_what_cannot_be_obeyed_is_an_error_before_the_first_token(model: Model, options: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        model.stream("Hello", **options)


def test_forced_tokens_run_together_and_change_nothing(model: Model, monkeypatch: Any) -> None:
    passes: list[int] = []
    forward = type(model._engine)._run

    def counted(self: Any, tokens: Any, *rest: Any) -> Any:
        passes.append(len(tokens))
        return forward(self, tokens, *rest)

    monkeypatch.setattr(type(model._engine), "_run", counted)
    replies, steps = [], []
    for logprobs in (None, 0):  # a report of every token keeps them apart
        model.forget()
        passes.clear()
        replies.append(model.generate(QUESTION, tools=[WEATHER], logprobs=logprobs))
        steps.append(passes[1:])
    assert replies[0].tokens == replies[1].tokens and set(steps[1]) == {1}
    assert max(steps[0]) > 1 and len(steps[0]) < 0.7 * len(steps[1])


def test_logprobs_are_those_of_the_logits(model: Model) -> None:
    prompt = model.encode("Hello")
    reply = model.generate(prompt, max_tokens=5, logprobs=3)
    logits = np.array(model.logits([*prompt, *reply.tokens[:-1]], last=len(reply.tokens)), np.float64)
    expected = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    assert reply.logprobs is not None and len(reply.logprobs) == len(reply.tokens)
    for row, token, found in zip(expected, reply.tokens, reply.logprobs, strict=True):
        assert found.token == token and found.top[0][0] == token  # greedy
        np.testing.assert_allclose(found.logprob, row[token], atol=1e-3)
        np.testing.assert_allclose([p for _, p in found.top], np.sort(row)[::-1][:3], atol=1e-3)


def test_biases_and_penalties_change_replies(model: Model) -> None:
    plain = model.generate("Hello", max_tokens=12)
    banned = model.generate("Hello", max_tokens=12, logit_bias={plain.tokens[0]: -math.inf})
    assert banned.tokens[0] != plain.tokens[0]
    varied = model.generate("Hello", max_tokens=12, frequency_penalty=50.0)
    assert len(set(varied.tokens)) == len(varied.tokens)


def test_a_plain_reply_waits_for_no_table(model: Model, monkeypatch: Any) -> None:
    """Another thread's reply in a format waits for its tables; a plain one passes it."""
    ready = threading.Event()
    with Model.load(Path(model.path), expert_io="resident") as fresh:
        make = fresh._enforcer._grammars._make_tables
        monkeypatch.setattr(fresh._enforcer._grammars, "_make_tables", lambda: ready.wait(60) and make())
        found: list[Any] = []
        thread = threading.Thread(target=lambda: found.append(fresh.generate("Hello", response_format=["yes", "no"])))
        thread.start()
        assert fresh.generate("Hello", max_tokens=3).tokens
        assert not found
        ready.set()
        thread.join(60)
        assert found[0].parsed in ("yes", "no")


@pytest.mark.parametrize("strict", [False, True])
def test_calls_of_decoded_replies_are_scored(model: Model, strict: bool, monkeypatch: Any) -> None:
    monkeypatch.setattr("flash_moe.evaluation.replies.expected_reply", lambda *_: [])
    case = ToolCallCase([{"role": "user", "content": QUESTION}], [WEATHER], [{"name": "get_weather", "arguments": {}}])
    score = tool_call_score([case], greedy(model, 100, False, strict))
    assert (score.parsed.value, score.right_functions.value) == (1, 1)
