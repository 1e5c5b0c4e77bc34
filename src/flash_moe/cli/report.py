"""`flash-moe report`: what the library does on this machine, as Markdown to paste into an issue."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer
from typer import Option

from .arguments import LOCAL_HELP, ExpertsPerToken, VerboseOption, experts_per_token, local_checkpoint
from .console import warn

EXAMPLES = """\b
Examples:
  flash-moe report                    the machine and the demo model
  flash-moe report MODEL -k own       a model too
  flash-moe report MODEL > report.md"""


def command(
    model: Annotated[str | None, typer.Argument(metavar="MODEL", help=LOCAL_HELP, show_default=False)] = None,
    k: ExpertsPerToken = None,
    prompt_tokens: Annotated[int, Option(metavar="N", min=1, help="Tokens of the prompt.")] = 256,
    tokens: Annotated[int, Option(metavar="N", min=1, help="Tokens to decode, cold and warm each.")] = 32,
    seconds: Annotated[float, Option(metavar="S", min=0.1, max=600, help="How long to measure reading, about.")] = 6.0,
    verbose: VerboseOption = False,
) -> None:
    """Measure this machine and print a report to share.

    A block of Markdown: machine and versions, the trial of every GPU kernel, how fast experts are read, and the speed of
    the demo model, and of MODEL, beside what `flash-moe plan` says. It holds no paths, names of files, models or users,
    and no serial numbers. A part that cannot be measured is left out with the kind of its error; what the error says goes
    to stderr. Reports are collected in docs/hardware.md.
    """
    from . import report_sections as sections

    wanted = experts_per_token(k)
    folder = None if model is None else local_checkpoint(model)
    parts: dict[str, Callable[[], str]] = {
        "Machine": sections.machine,
        "Kernels": lambda: sections.kernels(folder, wanted),
        "Demo model": lambda: sections.model(local_checkpoint("demo"), None, prompt_tokens, tokens, seconds),
    }
    if folder is not None:
        parts["Model"] = lambda: sections.model(folder, wanted, prompt_tokens, tokens, seconds)
    for title, part in parts.items():
        print(f"#### {title}\n\n{_text(title, part)}\n", flush=True)


def _text(title: str, part: Callable[[], str]) -> str:
    """Returns what a part says, or the kind of error that kept it from being measured, which hides no other part."""
    try:
        return part()
    except Exception as error:
        warn(f"{title}: {type(error).__name__}: {error}")
        return f"Not measured: {type(error).__name__}."
