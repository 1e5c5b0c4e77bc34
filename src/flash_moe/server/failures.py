"""Rejections of requests, independent of the protocol."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError
from pydantic_core import from_json

from ..errors import ArgumentError, FlashMoEError, PromptError, TokenizerError

log = logging.getLogger("flash_moe.server")


class Refusal(Exception):
    """The rejection of a request, with a status other than 200.

    Attributes:
        status: HTTP status.
        message: what was found, what was expected and what to do.
        param: the invalid field of the request, if there is one.
        code: machine-readable name of the error, as in OpenAI's API.
        headers: HTTP headers of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers or {}


def refusal_of(error: Exception) -> Refusal:
    """Converts an error of the library to a rejection. Other errors get status 500 and are logged."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, (ArgumentError, PromptError, TokenizerError)):
        return Refusal(400, str(error))
    # messages about files contain paths of this machine, so they go only to the log
    log.error("a request failed", exc_info=error)
    what = "the model" if isinstance(error, FlashMoEError) else "the server"
    return Refusal(500, f"{what} failed ({type(error).__name__}); the server's log says more")


def invalid(error: ValidationError, body: bytes) -> Refusal:
    """Returns the rejection of a body that does not fit its schema. It names one invalid field.

    If a value fits no branch of a union, pydantic reports each branch. The branch that was meant has the right type, or
    accepts more of the value than the others.
    """
    errors = error.errors(include_url=False)
    best = max(errors, key=lambda entry: (not entry["type"].endswith("_type"), len(entry["loc"])))
    kind, message = best["type"], best["msg"]
    if kind == "json_invalid":
        return Refusal(400, f"the body is not JSON: {message}")
    path = _path(best["loc"], from_json(body), kind == "missing")
    where = ".".join(map(str, path))
    if kind == "extra_forbidden":
        return Refusal(400, f"{where} is not supported by this server; leave it out", where, "unsupported_parameter")
    context = best.get("ctx", {})
    given = context["tag"] if kind == "union_tag_invalid" else best["input"]
    part = path[:-1] if path[-1:] == ["type"] else path
    if kind in ("union_tag_invalid", "literal_error") and part[-2:-1] in (["content"], ["output"]):
        message = f"content of type {given!r:.80} is not supported; this server takes text"
    elif kind == "union_tag_invalid":
        message = f"the type is {given!r:.80}, expected {context['expected_tags']}"
    return Refusal(400, f"{where or 'the body'}: {message}", where or None)


def _path(location: Sequence[Any], value: Any, missing: bool) -> list[Any]:
    """Returns the location of an error in a body, without the names of pydantic's branches.

    Args:
        missing: whether the last element of the location is a field that the body lacks.
    """
    path: list[Any] = []
    for step in location:
        if (isinstance(value, dict) and step in value) or (isinstance(value, list) and isinstance(step, int)):
            path.append(step)
            value = value[step]
    return [*path, location[-1]] if missing else path
