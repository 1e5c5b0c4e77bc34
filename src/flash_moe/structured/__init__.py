"""Enforces formats of replies: grammars for JSON, regular expressions, choices and tool calls."""

from .enforcer import Enforced, Enforcer
from .grammar import reply_grammar
from .matcher import GrammarConstraint, Grammars, installed, require
from .response_formats import ResponseFormat, Specification, response_format

__all__ = [
    "Enforced", "Enforcer", "GrammarConstraint", "Grammars", "ResponseFormat", "Specification", "installed",
    "reply_grammar", "require", "response_format",
]  # fmt: skip
