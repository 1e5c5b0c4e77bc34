"""Replies in a format that is asked for: grammars of JSON, regular expressions, choices and tool calls."""

from .grammar import reply_grammar
from .matcher import GrammarConstraint, Grammars, installed, require
from .response_formats import ResponseFormat, response_format

__all__ = [
    "GrammarConstraint", "Grammars", "ResponseFormat", "installed", "reply_grammar", "require", "response_format",
]  # fmt: skip
