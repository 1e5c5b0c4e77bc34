"""Replies in a format that is asked for: grammars of JSON, regular expressions, choices and tool calls."""

from .formats import ResponseFormat, response_format
from .matcher import GrammarConstraint, Grammars, installed, require
from .reply import reply_grammar

__all__ = [
    "GrammarConstraint", "Grammars", "ResponseFormat", "installed", "reply_grammar", "require", "response_format",
]  # fmt: skip
