"""The demo model's tokenizer, its grammars, and a model of the worst kind: one that draws at random."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest

from flash_moe.shipped import shipped
from flash_moe.structured import GrammarConstraint, Grammars
from flash_moe.text import Tokenizer

MOST_TOKENS = 4000
CLOSING = set('"}]</>\n,:')


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(shipped("models/demo"))


@pytest.fixture(scope="session")
def grammars(tokenizer: Tokenizer) -> Grammars:
    pytest.importorskip("llguidance")
    return Grammars(tokenizer, tokenizer.vocab_size)


@pytest.fixture(scope="session")
def tags(tokenizer: Tokenizer) -> tuple[int, int]:
    opening, closing = (tokenizer.token_id(text) for text in ("<tool_call>", "</tool_call>"))
    assert opening is not None and closing is not None
    return opening, closing


@pytest.fixture(scope="session")
def takes(tokenizer: Tokenizer, grammars: Grammars) -> Callable[[str, str], bool]:
    """Whether a grammar takes a text as a whole reply."""

    def check(grammar: str, text: str) -> bool:
        constraint = grammars.constraint(grammar)
        for token in tokenizer.encode(text):
            if not constraint.allows(token):
                assert not constraint.allowed()[token]
                return False
            constraint.accept(token)
        return constraint.allows(min(tokenizer.eos_token_ids))

    return check


@pytest.fixture(scope="session")
def wander(tokenizer: Tokenizer, grammars: Grammars) -> Callable[[str, int], str]:
    """The text of a reply that is drawn at random from what a grammar allows, closing characters more often."""
    texts = [tokenizer.decode([id]) for id in range(tokenizer.vocab_size)]
    closing = np.array([bool(CLOSING & set(text)) for text in texts])

    def draw(grammar: str, seed: int) -> str:
        rng, constraint = random.Random(seed), grammars.constraint(grammar)
        tokens: list[int] = []
        for _ in range(MOST_TOKENS):
            mask = constraint.allowed()
            likely = np.flatnonzero(mask & closing) if rng.random() < 0.6 else np.flatnonzero(mask)
            token = int(rng.choice(likely if likely.size else np.flatnonzero(mask)))
            assert_consistent(constraint, mask, token, rng)
            constraint.accept(token)
            if token in tokenizer.eos_token_ids:
                return tokenizer.decode(tokens)
            tokens.append(token)
        raise AssertionError(f"no end after {MOST_TOKENS} tokens: {tokenizer.decode(tokens)[-200:]!r}")

    return draw


def assert_consistent(constraint: GrammarConstraint, mask: np.ndarray, token: int, rng: random.Random) -> None:
    """The mask, the question about single tokens and forced tokens agree."""
    assert constraint.allows(token)
    other = rng.randrange(mask.size)
    assert constraint.allows(other) == bool(mask[other])
    forced = constraint.forced()
    assert not forced or mask[forced[0]]
