"""The command `flash-moe report`: measures this machine and prints Markdown for an issue."""

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
    seconds: Annotated[
        float, Option(metavar="S", min=0.1, max=600, help="Approximate seconds of measuring reads.")
    ] = 6.0,
    verbose: VerboseOption = False,
) -> None:
    """Measure this machine and print a report to share.

    It prints a block of Markdown with the machine, the versions, the trial of every GPU kernel and the speed of expert
    reads. It also gives the speed of the demo model and of MODEL, beside the prediction of `flash-moe plan`. The report
    contains no paths, no names of files, models or users, and no serial numbers. If a part cannot be measured, the
    report gives the kind of error, and the message goes to stderr. docs/hardware.md collects the reports.
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
    """Returns the text of a part, or the kind of its error, so that an error does not affect other parts."""
    try:
        return part()
    except Exception as error:
        warn(f"{title}: {type(error).__name__}: {error}")
        return f"Not measured: {type(error).__name__}."
