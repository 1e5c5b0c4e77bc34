"""Greedy replies are what decoding gives, whether they are decoded or recognised."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flash_moe import ArgumentError, Model
from flash_moe.evaluation import ToolCallCase, greedy, tool_call_score
from flash_moe.evaluation.replies import Recognized, expected_reply
from flash_moe.generation.engine import Engine
from flash_moe.generation.prefixes import boundaries
from flash_moe.text.chat_template import ChatTemplate

MESSAGES = [{"role": "user", "content": "Which experts does a token use?"}]
CALL = {"name": "light", "arguments": {"on": True}}
WITH_CALLS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}={{ c.function.arguments | tojson }}{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def model(packed_checkpoint: Path) -> Iterator[Model]:
    with Model.load(packed_checkpoint) as model:
        model._defaults = {"temperature": 1.0, "repetition_penalty": 1.5}  # a checkpoint may recommend sampling
        yield model


def decoded(model: Model, max_tokens: int = 12) -> Any:
    model.forget()
    return model.generate(MESSAGES, max_tokens=max_tokens, temperature=0, repetition_penalty=1)


@pytest.fixture
def said(model: Model) -> list[int]:
    """The tokens of a greedy reply that ends by itself."""
    model.tokenizer.eos_token_ids = frozenset()
    tokens = list(decoded(model).tokens)
    last = next(i for i in range(len(tokens) - 1, 0, -1) if tokens[i] not in tokens[:i])
    model.tokenizer.eos_token_ids = frozenset({tokens[last]})
    return tokens[: last + 1]


def expecting(monkeypatch: pytest.MonkeyPatch, tokens: list[int]) -> ToolCallCase:
    monkeypatch.setattr("flash_moe.evaluation.replies.expected_reply", lambda *_: tokens)
    return ToolCallCase(MESSAGES, None, [CALL])


def test_the_expected_reply_is_recognised(model: Model, said: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    found = greedy(model, len(said))(expecting(monkeypatch, said))
    assert isinstance(found, Recognized)
    truth = decoded(model)
    assert (found.raw_text, found.finish_reason) == (truth.raw_text, truth.finish_reason)
    assert list(truth.tokens) == said


@pytest.mark.parametrize("place", [0, 1, -1])
def test_any_other_reply_is_decoded(model: Model, said: list[int], place: int, monkeypatch: pytest.MonkeyPatch) -> None:
    other = list(said)
    other[place] = (other[place] + 1) % 256
    found = greedy(model, 12)(expecting(monkeypatch, other))
    truth = decoded(model)
    assert (found.raw_text, found.tokens, found.finish_reason) == (truth.raw_text, truth.tokens, truth.finish_reason)


def test_a_reply_that_goes_on_is_not_the_expected_one(
    model: Model, said: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    end = next(iter(model.tokenizer.eos_token_ids))
    found = greedy(model, 12)(expecting(monkeypatch, [*said[:-2], end]))
    assert found.tokens == decoded(model).tokens


def test_a_limit_of_tokens_cuts_as_in_decoding(model: Model, said: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    limit = len(said) - 1
    found = greedy(model, limit)(expecting(monkeypatch, said))
    assert (found.raw_text, found.finish_reason) == (decoded(model, limit).raw_text, "length")


def test_single_tokens_that_are_run_otherwise_are_decoded(
    packed_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Model.load(packed_checkpoint, drop_cold_below=0.1) as model:
        monkeypatch.setattr(Model, "logits", None)
        assert greedy(model, 3)(expecting(monkeypatch, [1])).tokens


def test_what_was_run_is_continued(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    found = greedy(model, 12)(expecting(monkeypatch, [0, 1]))
    assert found.stats.reused_tokens == boundaries(model.encode(MESSAGES), model.tokenizer.eos_token_ids)[-1] > 0


def test_a_case_without_calls_is_decoded(model: Model) -> None:
    found = greedy(model, 12)(ToolCallCase(MESSAGES, None, []))
    assert found.raw_text == decoded(model).raw_text
    assert tool_call_score([ToolCallCase(MESSAGES, None, [])], greedy(model, 12)).parsed.value == 1


def test_the_expected_reply_is_what_the_template_writes(model: Model) -> None:
    tokenizer = model.tokenizer
    assert expected_reply(tokenizer, ToolCallCase(MESSAGES, None, []), {}) == []
    tokenizer.chat_template = ChatTemplate(WITH_CALLS)
    found = expected_reply(tokenizer, ToolCallCase(MESSAGES, None, [CALL]), {})
    assert tokenizer.decode(found) == 'light={"on": true}<|im_end|>'
    thinks = WITH_CALLS.replace("assistant\n{% endif", "assistant\n<think>{% endif")
    tokenizer.chat_template = ChatTemplate(thinks)  # the prompt ends otherwise than the conversation goes on
    assert expected_reply(tokenizer, ToolCallCase(MESSAGES, None, [CALL]), {}) == []
    no_calls = "{% if messages[-1].role == 'assistant' %}{{ raise_exception('no calls') }}{% endif %}"
    tokenizer.chat_template = ChatTemplate(no_calls + WITH_CALLS)
    assert expected_reply(tokenizer, ToolCallCase(MESSAGES, None, [CALL]), {}) == []


def test_logits_of_the_last_positions(model: Model) -> None:
    tokens = [(7 * i + 3) % 200 for i in range(70)]
    expected = np.array(model.logits(tokens))
    for last in (1, 13, 70):
        for _ in range(2):  # the second continues from the first
            np.testing.assert_allclose(np.array(model.logits(tokens, last=last)), expected[-last:], atol=1e-4)
    engine = Engine(model._decoder, prefill_chunk=16)
    found = engine.last_logits(tokens, 20, model._decoder.new_cache())
    np.testing.assert_allclose(np.array(found), expected[-20:], atol=1e-4)
    for wrong in (0, 71):
        with pytest.raises(ArgumentError, match=f"last is {wrong}, expected 1 to 70"):
            model.logits(tokens, last=wrong)
