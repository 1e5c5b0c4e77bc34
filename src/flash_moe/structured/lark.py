"""Builds parts of grammars in llguidance's dialect of Lark."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from .schema import enforceable

HEADER = "%llguidance {}"
# White space in JSON is bounded, because an unsure model might write white space without end.
_JSON_OPTIONS = {"whitespace_pattern": r" |\n {0,16}"}


def quoted(text: str) -> str:
    """Returns a text as a literal of the grammar."""
    return json.dumps(text, ensure_ascii=False)


def regex(pattern: str) -> str:
    """Returns a terminal for a pattern in the syntax of Rust's regex crate. The pattern must match the whole text."""
    return "/" + re.sub(r"\\.|/|\n", lambda m: {"/": r"\/", "\n": r"\n"}.get(m[0], m[0]), pattern, flags=re.S) + "/"


def token(id: int) -> str:
    """Returns a reference to a single token of the vocabulary."""
    return f"<[{id}]>"


def json_rule(schema: Mapping[str, Any], where: str, in_call: bool = False) -> str:
    """Returns a rule for JSON data that fits a schema.

    Raises:
        ArgumentError: the schema cannot be enforced.
    """
    return "%json " + json.dumps({**enforceable(schema, where, in_call), "x-guidance": _JSON_OPTIONS})
