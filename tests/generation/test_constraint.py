"""Reasoning stays free, and the format begins behind it."""

from __future__ import annotations

import numpy as np
import pytest

from flash_moe.generation.constraint import AfterReasoning

SIZE, END, OPEN, CLOSE, GAP, A, B = 10, 0, 1, 2, 3, 4, 5


class Spelled:
    """A format whose only reply is one sequence of tokens."""

    def __init__(self, *tokens: int) -> None:
        self.rest, self.prepared = [*tokens, END], 0

    def prepare(self) -> None:
        self.prepared += 1

    def allows(self, token: int) -> bool:
        return token == self.rest[0]

    def allowed(self) -> np.ndarray:
        return np.arange(SIZE) == self.rest[0]

    def accept(self, token: int) -> None:
        assert token == self.rest.pop(0)

    def forced(self) -> list[int]:
        return self.rest[:]


def reply(inside: bool, opening: int | None = OPEN) -> AfterReasoning:
    return AfterReasoning(Spelled(A, B), opening, CLOSE, [GAP], [END], SIZE, inside)


def follow(constraint: AfterReasoning, tokens: list[int]) -> bool:
    """Whether all tokens are allowed, one after the other; both ways of asking agree."""
    for token in tokens:
        mask = constraint.allowed()
        assert [constraint.allows(t) for t in range(SIZE)] == mask.tolist()
        if not mask[token]:
            return False
        constraint.accept(token)
    return True


@pytest.mark.parametrize(
    ("inside", "tokens", "taken"),
    [
        (True, [7, A, OPEN, CLOSE, A, B, END], True),
        (True, [CLOSE, GAP, A, B, END], True),
        (True, [CLOSE, GAP, GAP], False),
        (True, [7, END], False),  # a reply of reasoning alone lacks its format
        (True, [CLOSE, B], False),
        (False, [A, B, END], True),
        (False, [OPEN, 7, CLOSE, GAP, A, B, END], True),
        (False, [A, OPEN], False),
        (False, [GAP], False),
        (False, [CLOSE], False),
    ],
)
def test_replies(inside: bool, tokens: list[int], taken: bool) -> None:
    assert follow(reply(inside), tokens) is taken


def test_a_prompt_that_closed_reasoning_opens_no_other() -> None:
    assert not follow(reply(False, opening=None), [OPEN])


def test_nothing_is_forced_where_reasoning_or_a_gap_may_come() -> None:
    constraint = reply(True)
    assert constraint.forced() == []
    constraint.accept(CLOSE)
    assert constraint.forced() == []
    constraint.accept(GAP)
    assert constraint.forced() == [A, B, END]
    assert reply(False).forced() == [] and reply(False, opening=None).forced() == [A, B, END]


def test_reasoning_waits_for_no_grammar() -> None:
    inner = Spelled(A)
    constraint = AfterReasoning(inner, OPEN, CLOSE, [GAP], [END], SIZE, True)
    for token in (7, 7, CLOSE):
        constraint.prepare()
        constraint.accept(token)
    assert inner.prepared == 0
    constraint.prepare()
    assert inner.prepared == 1
