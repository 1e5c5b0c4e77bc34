"""Where a reply is in its grammar; tables and grammars that are made beside the caller."""

from __future__ import annotations

import sys
import threading
from typing import Any

import numpy as np
import pytest

from flash_moe import ArgumentError
from flash_moe.errors import FormatError
from flash_moe.structured import Grammars, installed, reply_grammar, require, response_format
from flash_moe.text import Tokenizer


def grammar(wanted: Any) -> str:
    return reply_grammar((), "auto", "text", None, response_format(wanted))


def test_a_reply_may_end_where_its_format_does(tokenizer: Tokenizer, grammars: Grammars) -> None:
    constraint = grammars.constraint(grammar(["yes", "yes, please"]))
    first, *rest = tokenizer.encode("yes")
    end = min(tokenizer.eos_token_ids)
    assert not constraint.allows(end) and not constraint.allowed()[end]
    constraint.accept(first)
    for token in rest:
        constraint.accept(token)
    assert all(constraint.allows(end) and constraint.allowed()[end] for end in tokenizer.eos_token_ids)
    assert constraint.forced() == []
    constraint.accept(end)
    done = grammars.constraint(grammar(["yes"]))  # nothing but the end can follow
    for token in tokenizer.encode("yes"):
        done.accept(token)
    assert all(done.allows(end) for end in tokenizer.eos_token_ids)
    assert set(np.flatnonzero(done.allowed())) == set(tokenizer.eos_token_ids)


def test_forced_tokens_are_those_the_tokenizer_makes(tokenizer: Tokenizer, grammars: Grammars) -> None:
    schema = {"type": "object", "properties": {"temperature": {"type": "integer"}}, "required": ["temperature"]}
    constraint = grammars.constraint(grammar([f"The answer is {x}" for x in ("four", "five")]))
    forced = constraint.forced()
    assert forced == tokenizer.encode("The answer is four")[: len(forced)] and len(forced) >= 3
    done = grammars.constraint(grammar(schema))
    for token in tokenizer.encode('{"temperature": 3}'):
        done.accept(token)
    assert done.forced() == []  # which of several ends is up to the model
    done.end = max(tokenizer.eos_token_ids)
    assert done.forced() == [done.end]  # or known from the prompt: then no pass of the network is needed


def test_padding_of_the_logits_is_never_allowed(tokenizer: Tokenizer) -> None:
    padded = Grammars(tokenizer, tokenizer.vocab_size + 77)
    mask = padded.constraint(grammar("json")).allowed()
    assert mask.size == tokenizer.vocab_size + 77 and mask.any() and not mask[tokenizer.vocab_size :].any()


def test_tables_of_bytes_equal_those_of_the_file(tokenizer: Tokenizer, grammars: Grammars, monkeypatch: Any) -> None:
    monkeypatch.setattr(Tokenizer, "token_bytes", lambda self, size: None)  # as of tokenizers that are not byte-level
    other = Grammars(tokenizer, tokenizer.vocab_size)
    text = grammar({"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]})
    ours, theirs = grammars.constraint(text), other.constraint(text)
    for token in tokenizer.encode('{"a": "Grüße, 東京 <b>"}'):
        np.testing.assert_array_equal(ours.allowed(), theirs.allowed())
        ours.accept(token)
        theirs.accept(token)


def test_the_caller_does_not_wait_for_the_tables(tokenizer: Tokenizer, monkeypatch: Any) -> None:
    ready, asked = threading.Event(), threading.Event()
    original = Tokenizer.token_bytes

    def slow(self: Tokenizer, size: int) -> Any:
        asked.set()
        assert ready.wait(30)
        return original(self, size)

    monkeypatch.setattr(Tokenizer, "token_bytes", slow)
    grammars = Grammars(tokenizer, tokenizer.vocab_size)
    constraint = grammars.constraint(grammar(["yes", "no"]))
    assert asked.wait(30)  # in another thread: this one is here
    ready.set()
    assert constraint.allows(tokenizer.encode("yes")[0])


def test_a_failure_beside_the_caller_reaches_the_reply(tokenizer: Tokenizer, monkeypatch: Any) -> None:
    def broken(self: Tokenizer, size: int) -> Any:
        raise MemoryError("tables")

    monkeypatch.setattr(Tokenizer, "token_bytes", broken)
    constraint = Grammars(tokenizer, tokenizer.vocab_size).constraint(grammar("json"))
    with pytest.raises(MemoryError, match="tables"):
        constraint.allows(0)


def test_grammars_are_compiled_once(grammars: Grammars, monkeypatch: Any) -> None:
    import llguidance

    grammars.constraint(grammar(["once"])).allows(0)
    monkeypatch.setattr(llguidance, "LLMatcher", None)
    monkeypatch.setitem(sys.modules, "llguidance", None)
    assert not grammars.constraint(grammar(["once"])).allows(0)


def test_a_reply_that_cannot_go_on_is_an_error(tokenizer: Tokenizer, grammars: Grammars) -> None:
    constraint = grammars.constraint(grammar(["yes"]))
    with pytest.raises(FormatError, match="kept to its format"):
        constraint.accept(tokenizer.encode("no")[0])


def test_without_llguidance(monkeypatch: Any) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert not installed()
    with pytest.raises(ArgumentError, match=r"response_format needs llguidance.*flash-moe\[structured\]"):
        require("response_format")


@pytest.mark.parametrize(
    "wanted",
    [{"const": "a<think>"}, {"enum": ["<|im_end|>"]}, ["</tool_call>"], {"type": "string", "pattern": "^<think>$"}],
    ids=str,
)
def test_forced_text_has_no_special_tokens(wanted: Any, tokenizer: Tokenizer, grammars: Grammars) -> None:
    constraint, tokens = grammars.constraint(grammar(wanted)), []
    while not constraint.allows(min(tokenizer.eos_token_ids)):
        forced = constraint.forced() or [int(np.flatnonzero(constraint.allowed())[0])]
        for token in forced:
            assert constraint.allows(token)
            constraint.accept(token)
        tokens += forced
    text = wanted[0] if isinstance(wanted, list) else wanted.get("const", wanted.get("enum", ["<think>"])[0])
    assert tokenizer.decode(tokens) == (text if isinstance(wanted, list) else f'"{text}"')
