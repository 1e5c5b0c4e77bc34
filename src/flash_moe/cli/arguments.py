"""Parses arguments: sizes, experts per token, prompts, checkpoints."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from enum import Enum
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from ..checks import DEFAULT_EXPERTS_PER_TOKEN
from ..errors import HubError
from .console import log_to_stderr

OWN = "own"
Value = TypeVar("Value", int, str)
MODEL_HELP = "A folder, a repository on the Hugging Face hub (org/name), or demo."
LOCAL_HELP = "A folder, a hub repository (org/name) that was downloaded before, or demo."
ExpertsPerToken = Annotated[
    str | None,
    typer.Option(
        "--experts-per-token",
        "-k",
        metavar="N|own",
        help="Experts per token and layer (K). Fewer experts answer faster, but less well; 'own' takes the number that the "
        "model was trained with.  [default: 4, or 'own' if that is smaller; 'own' for families of mlx-lm]",
    ),
]


class ExpertIOChoice(str, Enum):
    """Values of --expert-io."""

    auto = "auto"
    mapped = "mapped"
    slots = "slots"
    resident = "resident"


class DtypeChoice(str, Enum):
    """Values of --dtype."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


ExpertIOOption = Annotated[
    ExpertIOChoice,
    typer.Option(
        "--expert-io",
        metavar="MODE",
        help="How experts are read: 'mapped' (used in place), 'slots' (read into a bank), 'resident' (all kept in "
        "memory) or 'auto'.",
    ),
]
DtypeOption = Annotated[
    DtypeChoice | None,
    typer.Option(
        "--dtype",
        metavar="TYPE",
        help="Type of activations: float32, bfloat16 or float16.  [default: the checkpoint's; float32 on a CPU]",
    ),
]
ThinkingOption = Annotated[
    bool | None,
    typer.Option(
        "--thinking/--no-thinking",
        help="Whether the model thinks before it answers.  [default: the model's own setting]",
    ),
]
RevisionOption = Annotated[
    str | None, typer.Option("--revision", metavar="NAME", help="Branch, tag or commit on the hub.")
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print one JSON object instead of text: sizes in bytes, times in seconds.")
]


def _verbose(wanted: bool) -> bool:
    if wanted:
        log_to_stderr(True)
    return wanted


# Its callback does the work, so commands accept it before and after their name and ignore the value.
VerboseOption = Annotated[
    bool, typer.Option("--verbose", "-v", callback=_verbose, help="Show the library's log on stderr.")
]

PrefetchOption = Annotated[
    bool,
    typer.Option(
        "--prefetch",
        help="Read the experts that the next layer will probably choose, while that is measured to be faster. Changes no "
        "token.",
    ),
]
DropColdOption = Annotated[
    float,
    typer.Option(
        "--drop-cold-below",
        metavar="W",
        help="Leave out a missing expert if its share of a token's routing weights is below W (0 to 1). Faster, less exact; "
        "0 is off.",
    ),
]
PreferCachedOption = Annotated[
    float,
    typer.Option(
        "--prefer-cached",
        metavar="R",
        help="Replace a missing expert by one in memory that is at least 1-R times as likely (0 to 1). Faster, less exact; "
        "0 is off.",
    ),
]

ExpertCacheOption = Annotated[
    str,
    typer.Option(
        "--expert-cache",
        metavar="SIZE",
        help="Memory for recently used experts, such as 2GB; 0 leaves caching to the system, which is usually best.",
    ),
]
ThreadsOption = Annotated[
    int | None,
    typer.Option(
        "--threads",
        metavar="N",
        min=1,
        help="Threads that compute, where the CPU's kernels are used.  [default: one per physical core]",
    ),
]


def experts_per_token(text: str | None, option: str = "'--experts-per-token' / '-k'") -> int | None:
    """Returns K for ``Model.load``: None for 'own', and the default for None."""
    if text is None:
        return DEFAULT_EXPERTS_PER_TOKEN
    if text == OWN:
        return None
    if not re.fullmatch(r"\d+", text) or int(text) == 0:
        raise typer.BadParameter(
            f"{text!r} is neither a number of 1 or more nor 'own' (the model's own number).",
            param_hint=option,
        )
    return int(text)


def size(text: str, option: str) -> int:
    """Returns bytes in "2GB", "1.5 GiB", "512MB" or "1000"."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", text.strip(), re.IGNORECASE | re.ASCII)
    if match is None or (match[3] and not match[2]):
        raise typer.BadParameter(f"{text!r} is no size; write it as 2GB, 512MB or 1.5GiB.", param_hint=f"'{option}'")
    count = round(float(match[1]) * (1024 if match[3] else 1000) ** " kmgt".index(match[2].lower() or " "))
    if not match[2] and 0 < count < 1000:  # surely not meant in bytes
        raise typer.BadParameter(f"{text!r} has no unit; write it as 2GB, 512MB or 1.5GiB.", param_hint=f"'{option}'")
    return count


def one_of(value: Value, allowed: Iterable[Value], option: str) -> Value:
    """Returns the value if it is allowed, and raises a usage error otherwise."""
    if value not in (allowed := tuple(allowed)):
        raise typer.BadParameter(
            f"{value} is not one of {', '.join(str(a) for a in allowed)}.", param_hint=f"'{option}'"
        )
    return value


def read_prompt(argument: str | None) -> str:
    """Returns the prompt: the argument, or all of stdin (less one final line break) for ``-`` or a pipe."""
    if argument is None and sys.stdin.isatty():
        raise _bad_prompt(
            "there is none; write it after the model, pipe it in, or talk to the model with 'flash-moe chat'."
        )
    try:
        if argument is None or argument == "-":
            text = sys.stdin.buffer.read().decode("utf-8").replace("\r\n", "\n").removesuffix("\n")
        else:
            text = argument
            text.encode("utf-8")
    except UnicodeError as error:
        raise _bad_prompt(f"it is not UTF-8 text ({error.reason}).") from error  # type: ignore[attr-defined]
    if not text:
        raise _bad_prompt("it is empty.")
    return text


def _bad_prompt(message: str) -> typer.BadParameter:
    return typer.BadParameter(message, param_hint="'PROMPT'")


def local_checkpoint(model: str, revision: str | None = None) -> Path:
    """Returns the folder of a checkpoint on this machine, without downloading it.

    Raises:
        CheckpointError: the folder does not exist.
        HubError: the repository is not in the hub's cache.
    """
    from ..checkpoint.hub import resolve

    try:
        return resolve(model, revision=revision, local_files_only=True)
    except HubError as error:
        raise HubError(
            f"{model!r} is no folder here, and not in the hub's cache; check the spelling, or download it first: "
            f"flash-moe download {model}"
        ) from error
