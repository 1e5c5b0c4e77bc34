"""Texts that can stand in a tool call written as text."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

# What follows "<" in a tag of a call. A value holds none, so that no parser takes a part of it for the rest of the call.
_TAGS = ("parameter=", "/parameter", "function=", "/function", "tool_call", "/tool_call", "think>", "/think>")


# What the parser of calls takes for a value of another type, where a string is not all that a parameter may be. For
# arrays and objects it reads Python literals too, whose parts may be tuples without brackets, named strings and words.
_WORDS = {"null": ("null", "none"), "boolean": ("true", "false")}
_LITERALS = ("null", "none", "true", "false", "u'", 'u"', "r'", 'r"')
_DATA = r"\[\{\(\-0-9+.'\"#\\"
_FIRSTS = {"integer": r"\-0-9", "number": r"\-0-9", "array": _DATA, "object": _DATA}


def tagless(most: int) -> str:
    """Returns a pattern of texts of at most about `most` characters without a tag of a call.

    It is spelled without a complement: the automaton of a complement has a state per character, and is searched through.
    """
    return f"{_unit()}{{0,{most}}}(?:{_begun()}){{0,{most}}}"


def tagless_beside(others: Collection[str], most: int) -> str:
    """Returns such a pattern of texts that do not read as a value of another JSON type: ``null``, ``3``, ``[1]``."""
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
    """One character, or what begins like a tag and is none."""
    return f"(?:[^<]|{_tag_like()})"


def _tag_like() -> str:
    return f"(?:{_begun()})*<{_leaving(_trie(_TAGS))}"


def _begun() -> str:
    return f"<{_beginning(_trie(_TAGS))}"


def has_tag(text: str) -> bool:
    """Returns whether a text holds a tag of a call."""
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
    """Matches the beginning of a word, perhaps nothing of it, and a character with which no word goes on."""
    deeper = [f"[{letters(letter)}]{_leaving(child, letters, space)}" for letter, child in node.items() if child]
    other = f"[^<{chr(92) + 's' if space else ''}{''.join(map(letters, node))}]"
    return f"(?:{'|'.join([other, *deeper])})"


def _beginning(node: Mapping[str, Any], letters: Callable[[str], str] = re.escape) -> str:
    """Matches the beginning of a word, perhaps nothing of it, but not all."""
    deeper = [f"[{letters(letter)}]{_beginning(child, letters)}" for letter, child in node.items() if child]
    return f"(?:{'|'.join(deeper)})?" if deeper else ""
