"""`StopStrings` against a naive search of the whole text, for every way of cutting it."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from flash_moe.errors import ArgumentError
from flash_moe.generation.stopping import StopStrings


def naive(text: str, stops: list[str]) -> tuple[str, bool]:
    for end in range(len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)], True
    return text, False


def run(pieces: list[str], stops: list[str]) -> tuple[str, bool]:
    matcher = StopStrings(stops)
    shown, stopped = "", False
    for piece in pieces:
        text, stopped = matcher.feed(piece)
        shown += text
        assert (matcher.found is not None) == stopped
        if stopped:
            break
    assert matcher.found is None or "".join(pieces).startswith(shown + matcher.found)
    return shown + matcher.flush(), stopped


def cut(text: str, at: list[int]) -> list[str]:
    edges = [0, *sorted(a % (len(text) + 1) for a in at), len(text)]
    return [text[a:b] for a, b in pairwise(edges)]


@given(
    text=st.text("ab", max_size=30),
    stops=st.lists(st.text("ab", min_size=1, max_size=5), max_size=4),
    at=st.lists(st.integers(0, 30), max_size=10),
)
@example(text="aaabaaab", stops=["aaaba", "ab"], at=list(range(9)))
@example(text="abab", stops=["abb", "bab", "b"], at=[1, 2, 3])
def test_equals_the_naive_search(text, stops, at):
    expected = naive(text, stops)
    assert run(cut(text, at), stops) == expected
    assert run(list(text), stops) == expected
    assert run([text], stops) == expected


@given(
    text=st.text("ab", max_size=30),
    stops=st.lists(st.text("ab", min_size=1, max_size=5), max_size=4),
)
def test_holds_back_no_more_than_it_must(text, stops):
    matcher, shown = StopStrings(stops), ""
    for end, character in enumerate(text, 1):
        emitted, stopped = matcher.feed(character)
        shown += emitted
        if stopped:
            break
        held = text[len(shown) : end]
        assert not held or any(stop.startswith(held) and stop != held for stop in stops)


def test_without_stops_everything_passes():
    matcher = StopStrings([])
    assert matcher.feed("anything") == ("anything", False)
    assert matcher.flush() == ""


def test_across_pieces():
    matcher = StopStrings(["<|end|>", "\n\n"])
    assert [matcher.feed(piece) for piece in ("Hi\n", "there<|", "e", "nd", "|>, more")] == [
        ("Hi", False),
        ("\nthere", False),
        ("", False),
        ("", False),
        ("", True),
    ]
    assert matcher.feed("ignored") == ("", True) and matcher.found == "<|end|>"
    assert matcher.flush() == ""


def test_flush_returns_the_rest_once():
    matcher = StopStrings(["stop"])
    assert matcher.feed("non-st") == ("non-", False)
    assert matcher.flush() == "st"
    assert matcher.flush() == ""


def test_the_stop_completed_first_counts():
    assert run(["abcd"], ["abcd", "bc"]) == ("a", True)
    assert run(["xabc"], ["bc", "abc"]) == ("x", True)


def test_a_single_string_is_one_stop():
    assert run(["a end b"], "end") == ("a ", True)


@pytest.mark.parametrize("stops", ["", ["a", ""], [3]], ids=repr)
def test_empty_or_strange_stops(stops):
    with pytest.raises(ArgumentError, match="expected non-empty strings"):
        StopStrings(stops)
