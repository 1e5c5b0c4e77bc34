"""Replies of a model: their parts, streamed and whole; reasoning that is closed; replies that continue a beginning."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from flash_moe import ArgumentError, FormatError, Generation, Model, PromptError, ToolCallError
from flash_moe.text.reply import REASONING_CLOSED

ASK = [{"role": "user", "content": "What is the weather like in Oslo for 3 days?"}]
WEATHER = {
    "name": "get_weather",
    "description": "Returns the weather of a city for some days.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        "required": ["city"],
    },
}
TOOLS = [{"type": "function", "function": WEATHER}]
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 200}


@pytest.fixture(scope="module")
def demo() -> Iterator[Model]:
    with Model.load("demo", experts_per_token=None) as model:
        yield model


def scripted(model: Model, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """Has the model write a text, token by token, whatever its logits."""
    tokens = [*model.tokenizer.encode(text), min(model.tokenizer.eos_token_ids)]
    draw = type(model)._start

    def start(self: Model, *arguments: Any, **options: Any) -> Any:
        def push(sampler: Any) -> None:
            sampler.push(tokens)

        monkeypatch.setattr(
            "flash_moe.generation.sampling.Sampler.prepare", lambda sampler: sampler._reply or push(sampler)
        )
        return draw(self, *arguments, **options)

    monkeypatch.setattr(type(model), "_start", start)


def test_a_call_is_a_call_and_no_text(demo: Model) -> None:
    reply = demo.generate(ASK, tools=TOOLS, **GREEDY)
    (call,) = reply.tool_calls
    assert (call.name, call.arguments) == ("get_weather", {"city": "Oslo", "days": 3})
    assert (reply.text, reply.finish_reason, reply.reasoning, reply.ended_in) == ("", "tool_calls", None, "text")
    assert "<tool_call>" in reply.raw_text
    assert "calls get_weather" in repr(reply) and "\n" not in repr(reply)


def test_the_message_goes_back_to_the_model_as_it_was_written(demo: Model) -> None:
    reply = demo.generate(ASK, tools=TOOLS, **GREEDY)
    assert json.loads(json.dumps(reply.message)) == reply.message
    assert json.loads(reply.message["tool_calls"][0]["function"]["arguments"]) == {"city": "Oslo", "days": 3}
    messages = [*ASK, reply.message, {"role": "tool", "content": '{"temperature": 8}'}]
    again = demo.generate(messages, tools=TOOLS, **GREEDY)
    assert again.stats.reused_tokens == len(demo.encode(ASK, tools=TOOLS)) + len(reply.tokens) - 1
    assert again.finish_reason == "stop" and again.tool_calls == () and again.text


def test_a_stream_has_the_same_parts(demo: Model) -> None:
    reply = demo.generate(ASK, tools=TOOLS, **GREEDY)
    chunks = list(demo.stream(ASK, tools=TOOLS, **GREEDY))
    assert [len(chunk.tool_calls) for chunk in chunks if chunk.tool_calls] == [1]
    streamed = Generation.of(chunks)
    assert (streamed.text, streamed.raw_text, streamed.tokens) == (reply.text, reply.raw_text, reply.tokens)
    assert [c.arguments for c in streamed.tool_calls] == [c.arguments for c in reply.tool_calls]
    assert chunks[-1].finish_reason == "tool_calls"


def test_without_tools_markup_stays_text(demo: Model) -> None:
    reply = demo.generate(demo.encode(ASK, tools=TOOLS), **GREEDY)
    assert reply.text == reply.raw_text and "<tool_call>" in reply.text and reply.calls == ()


def test_a_malformed_call_is_an_error_when_it_is_looked_at(demo: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    good = "<tool_call>\n<function=get_weather>\n<parameter=city>\nOslo\n</parameter>\n</function>\n</tool_call>"
    written = f"Hm.\n{good}\n{good.replace('city', 'town')}"
    scripted(demo, monkeypatch, written)
    reply = demo.generate(ASK, tools=TOOLS, strict_tools=False, **GREEDY)
    with pytest.raises(ToolCallError, match="town") as caught:
        _ = reply.tool_calls
    assert [call.arguments for call in caught.value.calls] == [{"city": "Oslo"}] == [c.arguments for c in reply.calls]
    assert (reply.text, reply.finish_reason) == ("Hm.", "stop")
    assert reply.message == {"role": "assistant", "content": written}
    assert repr(reply) and reply._repr_html_()


def test_reasoning_is_known_from_the_prompt(demo: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(demo, monkeypatch, "hm <tool_call>\n</think>\n\nSunny.")
    reply = demo.generate(ASK, enable_thinking=True, tools=TOOLS, strict_tools=False, **GREEDY)
    assert (reply.reasoning, reply.text, reply.calls) == ("hm <tool_call>", "Sunny.", ())
    assert reply.message == {"role": "assistant", "content": "Sunny.", "reasoning_content": "hm <tool_call>"}
    assert "reasoning" in reply._repr_html_()
    spoken = [*ASK, {"role": "assistant", "content": "<think>"}, *ASK]
    assert demo.generate(spoken, enable_thinking=False, tools=TOOLS, strict_tools=False, **GREEDY).reasoning is None


@pytest.mark.parametrize(("inside", "where"), [("hm", "reasoning"), ("</think><tool_call>\n<func", "tool_call")])
def test_a_reply_that_is_cut_says_where(demo: Model, monkeypatch: pytest.MonkeyPatch, inside: str, where: str) -> None:
    scripted(demo, monkeypatch, inside + " and more" * 9)
    count = len(demo.tokenizer.encode(inside))
    reply = demo.generate(ASK, enable_thinking=True, tools=TOOLS, strict_tools=False, temperature=0, max_tokens=count)
    assert (reply.finish_reason, reply.ended_in, reply.text) == ("length", where, "")
    assert f"inside {where.replace('_', ' ')}" in repr(reply)
    if where == "tool_call":
        with pytest.raises(ToolCallError, match="ends inside a tool call"):
            _ = reply.tool_calls


@pytest.mark.parametrize("budget", [0, 1, 5])
def test_a_reasoning_budget_closes_reasoning_properly(
    demo: Model, monkeypatch: pytest.MonkeyPatch, budget: int
) -> None:
    reply = demo.generate(ASK, enable_thinking=True, reasoning_budget=budget, temperature=0, max_tokens=40)
    closing = demo.tokenizer.encode(REASONING_CLOSED)
    assert list(reply.tokens[budget : budget + len(closing)]) == closing
    assert reply.raw_text.count("</think>") == 1 and reply.text and reply.ended_in == "text"
    assert demo.tokenizer.decode(reply.tokens[:budget]).strip() == (reply.reasoning or "")
    prompt = [*demo.encode(ASK, enable_thinking=True), *reply.tokens[: budget + len(closing)]]
    free = demo.generate(prompt, temperature=0, max_tokens=40 - budget - len(closing))
    assert reply.tokens[budget + len(closing) :] == free.tokens


def test_a_budget_that_is_not_used_up_changes_nothing(demo: Model) -> None:
    free = demo.generate(ASK, temperature=0, max_tokens=20)
    assert demo.generate(ASK, reasoning_budget=0, temperature=0, max_tokens=20).tokens == free.tokens
    for budget in (-1, 1.5, "3"):
        with pytest.raises(ArgumentError, match="reasoning_budget"):
            demo.stream(ASK, reasoning_budget=budget)  # type: ignore[arg-type]


def test_a_reply_continues_its_beginning(demo: Model) -> None:
    prompt = demo.encode(ASK)
    reply = demo.generate(ASK, prefill="The weather in", temperature=0, max_tokens=8)
    assert reply.tokens == demo.generate([*prompt, *demo.tokenizer.encode("The weather in")], **GREEDY).tokens[:8]
    assert not reply.text.startswith("The weather") and reply.message["content"] == "The weather in" + reply.text
    assert demo.encode(ASK, prefill="")


def test_a_beginning_and_reasoning(demo: Model) -> None:
    text = demo.tokenizer.decode(demo.encode(ASK, enable_thinking=True, prefill="So"))
    assert text.endswith("<think>\n\n</think>\n\nSo")
    thinking = demo.encode(ASK, enable_thinking=True, prefill="<think>\nFirst")
    assert demo.tokenizer.decode(thinking).endswith("assistant\n<think>\nFirst")
    reply = demo.generate(ASK, enable_thinking=True, prefill="<think>\nFirst", temperature=0, max_tokens=4)
    assert reply.ended_in == "reasoning" and reply.message["reasoning_content"].startswith("First")
    with pytest.raises(PromptError, match="prefill"):
        demo.encode(ASK, prefill=3)  # type: ignore[arg-type]


def test_template_variables_reach_the_template(demo: Model) -> None:
    thinking = demo.encode(ASK, enable_thinking=True)
    with pytest.raises(PromptError, match="enable_thinking"):
        demo.encode(ASK, template_variables={"enable_thinking": True})
    assert demo.encode(ASK, template_variables={"preserve_thinking": True}, enable_thinking=True) == thinking


@pytest.mark.parametrize("prefill", ["\n\n", " ", "<", "<th", "Sure. ", "A list: <", "x <function="])
@pytest.mark.parametrize("tools", [None, TOOLS], ids=["no tools", "tools"])
def test_a_beginning_that_may_be_markup_stands_once(demo: Model, prefill: str, tools: Any) -> None:
    reply = demo.generate("What is K?", tools=tools, strict_tools=False, prefill=prefill, temperature=0, max_tokens=8)
    assert not reply.calls
    assert reply.text.rstrip() == reply.raw_text.rstrip()
    assert reply.message["content"] == prefill + reply.text


@pytest.mark.parametrize("strict", [None, True, False])
def test_a_beginning_that_opens_a_call(demo: Model, strict: bool | None) -> None:
    reply = demo.generate(ASK, tools=TOOLS, strict_tools=strict, prefill="I look. <tool_call>\n", **GREEDY)
    (call,) = reply.tool_calls
    assert call.name == "get_weather" and "city" in call.arguments and "<tool_call>" not in reply.raw_text
    assert reply.message["content"] == "I look."
    if strict is None:
        chosen = demo.generate(ASK, tools=TOOLS, tool_choice="get_weather", prefill="<tool_call>\n", **GREEDY)
        assert len(chosen.tool_calls) == 1 and chosen.message["content"] == ""


@pytest.mark.parametrize("before", ["", "<think>\nshort\n</think>\n\n"], ids=["text", "reasoning"])
@pytest.mark.parametrize(
    ("wanted", "begun", "expected"),
    [
        ({"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}, '{"a":', {"a"}),
        (["yes", "no"], "y", "yes"),
    ],
    ids=["json", "choices"],
)
def test_a_beginning_and_a_format(demo: Model, wanted: Any, begun: str, expected: Any, before: str) -> None:
    reply = demo.generate(ASK, response_format=wanted, prefill=before + begun, **GREEDY)
    assert reply.parsed == expected or reply.parsed.keys() == expected
    reply = demo.generate(ASK, response_format=wanted, prefill=before, **GREEDY)
    assert reply.parsed is not None
    with pytest.raises(ArgumentError, match="the prefill 'x' does not fit the format of the reply"):
        demo.generate(ASK, response_format=wanted, prefill=before + "x", **GREEDY)


def test_json_that_a_stop_string_cuts(demo: Model) -> None:
    wanted = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    reply = demo.generate(ASK, response_format=wanted, stop='{"city"', **GREEDY)
    with pytest.raises(FormatError, match=r"not complete JSON \(.*\); a stop string may have cut it"):
        _ = reply.parsed
