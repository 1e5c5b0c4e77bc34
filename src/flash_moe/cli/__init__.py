"""The command line `flash-moe`, and the only package that prints.

Modules that need MLX are imported inside the commands, so that help and usage errors appear at once.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from .. import __version__
from . import bench, chat, convert, eval, generate, hub, info, plan, report, selftest, serve, verify, worker
from .arguments import VerboseOption
from .console import Commands, log_to_stderr, open_closed_streams

_EXAMPLES = """\b
To begin:
  flash-moe generate demo "Hello"      ask the small demo model
  flash-moe plan ORG/NAME              will a model fit, and how fast is it?
  flash-moe download ORG/NAME          get it; README names good ones
  flash-moe generate ORG/NAME "Hello"  get a first answer
  flash-moe chat ORG/NAME              talk to it
  flash-moe serve ORG/NAME             let editors, agents and SDKs use it
  flash-moe convert ORG/NAME DST       pack it: experts are read fastest

`flash-moe COMMAND --help` explains a command, with examples.
Exit codes: 0 done, 1 failed, 2 usage, 130 interrupted."""

app = typer.Typer(
    cls=Commands,
    add_completion=False,
    rich_markup_mode=None,  # plain help: half as long, without imports
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"flash-moe {__version__}")
        raise typer.Exit


@app.callback(epilog=_EXAMPLES)
def _options(
    verbose: VerboseOption = False,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Run Mixture-of-Experts models far larger than memory.

    The weights that every token needs stay in memory. The experts stay on the SSD and are read when a token needs them.
    """
    log_to_stderr(verbose)


for _module in (generate, chat, serve, worker, info, plan, convert, verify, eval, selftest, report):
    app.command(_module.__name__.rpartition(".")[2], epilog=_module.EXAMPLES)(_module.command)
app.command("download", epilog=hub.DOWNLOAD_EXAMPLES)(hub.download)
app.command("list", epilog=hub.LIST_EXAMPLES)(hub.list_models)
app.command("remove", epilog=hub.REMOVE_EXAMPLES)(hub.remove)
app.add_typer(bench.app, name="bench")


def main() -> None:
    """Runs `flash-moe` on the arguments of the process."""
    open_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # the terminal's encoding may lack characters of generated text
    app(prog_name="flash-moe")
