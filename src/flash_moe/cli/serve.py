"""The command `flash-moe serve`: a server for the protocols of OpenAI and Anthropic, with a web page."""

from __future__ import annotations

from typing import Annotated

from typer import Argument, Option

from ..errors import ArgumentError
from .arguments import (
    MODEL_HELP,
    ExpertsPerToken,
    size,
)
from .console import say
from .loading import Loader, loads

EXAMPLES = """\b
Examples:
  flash-moe serve MODEL                     then open http://127.0.0.1:8080/
  flash-moe serve MODEL -k own --port 9000
  flash-moe serve MODEL --name claude-x     a name that a client insists on
  flash-moe serve MODEL --host 0.0.0.0 --api-key SECRET"""


@loads
def command(
    model: Annotated[str, Argument(metavar="MODEL", help=MODEL_HELP, show_default=False)],
    host: Annotated[str, Option(metavar="ADDRESS", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, Option(metavar="N", min=0, max=65535, help="0 chooses a free port.")] = 8080,
    api_key: Annotated[
        str | None,
        Option(
            metavar="KEY",
            envvar="FLASH_MOE_API_KEY",
            help="Key that requests must send; required if other machines can reach the address.",
        ),
    ] = None,
    name: Annotated[
        list[str] | None,
        Option(metavar="NAME", help="A name of the model in requests; may be repeated.  [default: its folder's]"),
    ] = None,
    parallel: Annotated[
        int, Option(metavar="N", min=1, help="Maximum number of replies that run at the same time.")
    ] = 4,
    queue: Annotated[
        int, Option(metavar="N", min=0, help="Maximum number of waiting requests; others get status 429.")
    ] = 64,
    max_body: Annotated[str, Option(metavar="SIZE", help="Maximum size of a request body.")] = "16MB",
    max_prompt: Annotated[
        int | None,
        Option(metavar="N", min=1, help="Maximum number of tokens of a prompt.  [default: the model's context]"),
    ] = None,
    allow_origin: Annotated[
        list[str] | None, Option(metavar="URL", help="An origin whose web pages may use the server; may be repeated.")
    ] = None,
    k: ExpertsPerToken = None,
    *,
    loading: Loader,
) -> None:
    """Serve a model to editors, agents, chat pages and SDKs.

    The OpenAI protocol is at /v1 (chat completions, completions, responses), Anthropic's at /v1/messages; metrics for
    Prometheus are at /metrics. Prompts and replies are never logged. Ctrl-C ends the server.
    """
    try:
        from ..server.listening import listener, serve
    except ModuleNotFoundError as error:
        raise ArgumentError(f"the server needs {error.name}; install it: pip install 'flash-moe[server]'") from error
    from ..server.app import Limits

    limits = Limits(body_bytes=size(max_body, "--max-body"))
    with listener(host, port, api_key) as socket, loading(model, k) as loaded:
        address = f"http://{'[' + host + ']' if ':' in host else host}:{socket.getsockname()[1]}"
        say(f"{loaded!r}")
        say(
            f"listening on {address}; a page to chat: {address}/, OpenAI: {address}/v1, Anthropic: {address}; Ctrl-C ends it"
        )
        serve(
            loaded, socket, host=host, api_key=api_key, names=name, parallel=parallel, queue=queue, limits=limits,
            prompt_limit=max_prompt, allowed_origins=allow_origin,
        )  # fmt: skip
