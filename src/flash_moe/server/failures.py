"""Rejections of requests, independent of the protocol."""

from __future__ import annotations

import logging

from pydantic import ValidationError

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


def invalid(error: ValidationError) -> Refusal:
    """Returns the rejection of a body that does not fit its schema. It names the first invalid field."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "json_invalid":
        return Refusal(400, f"the body is not JSON: {first['msg']}")
    if first["type"] == "extra_forbidden":
        return Refusal(400, f"{where} is not supported by this server; leave it out", where, "unsupported_parameter")
    return Refusal(400, f"{where or 'the body'}: {first['msg']}", where or None)
