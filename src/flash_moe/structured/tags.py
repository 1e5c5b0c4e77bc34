"""Patterns of texts that a tool call in text form can contain."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

# The text after "<" in each tag of a call. Values contain no tags, so that no parser takes a part of them for the call.
_TAGS = ("parameter=", "/parameter", "function=", "/function", "tool_call", "/tool_call", "think>", "/think>")


# Texts that the parser of calls reads as another type, if a parameter allows other types besides strings. For arrays
# and objects, it also reads Python literals, whose parts can be tuples without brackets, prefixed strings and words.
_WORDS = {"null": ("null", "none"), "boolean": ("true", "false")}
_LITERALS = ("null", "none", "true", "false", "u'", 'u"', "r'", 'r"')
_DATA = r"\[\{\(\-0-9+.'\"#\\"
_FIRSTS = {"integer": r"\-0-9", "number": r"\-0-9", "array": _DATA, "object": _DATA}


def tagless(most: int | None) -> str:
    """Returns a pattern for texts without tags of a call, with at most about `most` characters; None for any number.

    The pattern uses no complement, because the automaton of a complement has a state per character and is slow.
    """
    times = "*" if most is None else f"{{0,{most}}}"
    return f"{_unit()}{times}(?:{_begun()}){times}"


def tagless_beside(others: Collection[str], most: int) -> str:
    """Returns the pattern of :func:`tagless` without texts that read as another JSON type: ``null``, ``3``, ``[1]``."""
    data = bool({"array", "object"} & set(others))
    spelled = [word for kind in others for word in _WORDS.get(kind, ())]
    words = _trie(_LITERALS if data else spelled)
    firsts = "".join(sorted({_FIRSTS[kind] for kind in others if kind in _FIRSTS}))
    first = f"[^\\s<{firsts}{''.join(map(_either_case, words))}]"
    whole = [] if data else [f"{_spelled(word)}\\s{{0,16}}[^\\s<]" for word in spelled]
    left = [f"[{_either_case(letter)}]{_leaving(node, _either_case, space=True)}" for letter, node in words.items()]
    begins = "|".join([first, _tag_like(), *left, *whole])
    alone = _beginning(words, _either_case)
    return f"\\s{{0,16}}(?:(?:{begins}){tagless(most)}|{alone})"


def _unit() -> str:
    """Returns a pattern for one character, or for a text that begins like a tag but is not a tag."""
    return f"(?:[^<]|{_tag_like()})"


def _tag_like() -> str:
    return f"(?:{_begun()})*<{_leaving(_trie(_TAGS))}"


def _begun() -> str:
    return f"<{_beginning(_trie(_TAGS))}"


def has_tag(text: str) -> bool:
    """Returns whether a text contains a tag of a call."""
    return any(f"<{tag}" in text for tag in _TAGS)


def _trie(words: Iterable[str]) -> dict[str, Any]:
    root: dict[str, Any] = {}
    for word in words:
        node = root
        for letter in word:
            node = node.setdefault(letter, {})
    return root


def _either_case(letter: str) -> str:
    return letter + letter.upper()


def _spelled(word: str) -> str:
    return "".join(f"[{_either_case(letter)}]" for letter in word)


def _leaving(node: Mapping[str, Any], letters: Callable[[str], str] = re.escape, space: bool = False) -> str:
    """Returns a pattern for a prefix of a word, possibly empty, followed by a character that continues no word."""
    deeper = [f"[{letters(letter)}]{_leaving(child, letters, space)}" for letter, child in node.items() if child]
    other = f"[^<{chr(92) + 's' if space else ''}{''.join(map(letters, node))}]"
    return f"(?:{'|'.join([other, *deeper])})"


def _beginning(node: Mapping[str, Any], letters: Callable[[str], str] = re.escape) -> str:
    """Returns a pattern for a proper prefix of a word, possibly empty."""
    deeper = [f"[{letters(letter)}]{_beginning(child, letters)}" for letter, child in node.items() if child]
    return f"(?:{'|'.join(deeper)})?" if deeper else ""
