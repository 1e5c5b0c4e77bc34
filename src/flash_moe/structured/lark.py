"""Pieces of grammars in llguidance's dialect of Lark."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from .schema import enforceable

HEADER = "%llguidance {}"
# White space of JSON is bounded: a model that is unsure may write nothing else.
_JSON_OPTIONS = {"whitespace_pattern": r" |\n {0,16}"}


def quoted(text: str) -> str:
    """Returns a literal."""
    return json.dumps(text, ensure_ascii=False)


def regex(pattern: str) -> str:
    """Returns a terminal of a pattern in the syntax of Rust's regex crate, which has to match as a whole."""
    return "/" + re.sub(r"\\.|/|\n", lambda m: {"/": r"\/", "\n": r"\n"}.get(m[0], m[0]), pattern, flags=re.S) + "/"


def token(id: int) -> str:
    """Returns a single token of the vocabulary."""
    return f"<[{id}]>"


def json_rule(schema: Mapping[str, Any], where: str, in_call: bool = False) -> str:
    """Returns a rule for JSON that fits a schema.

    Raises:
        ArgumentError: the schema cannot be enforced.
    """
    return "%json " + json.dumps({**enforceable(schema, where, in_call), "x-guidance": _JSON_OPTIONS})
