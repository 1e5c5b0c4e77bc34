"""The command `flash-moe bench`: measures the speed of a model and of expert reads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option
from typer.core import TyperGroup

from .arguments import (
    MODEL_HELP,
    DtypeOption,
    ExpertIOChoice,
    ExpertIOOption,
    ExpertsPerToken,
    JsonOption,
    RevisionOption,
    ThreadsOption,
    VerboseOption,
    experts_per_token,
)
from .console import print_json

_EXAMPLES = """\b
Examples:
  flash-moe bench MODEL
  flash-moe bench MODEL -k own --tokens 64 --plot layers.png
  flash-moe bench MODEL --json | jq '.phases[].token_seconds'"""
_IO_EXAMPLES = """\b
Examples:
  flash-moe bench io MODEL --seconds 10
  flash-moe bench io FILE           any large file"""


class _ModelIfNotNamed(TyperGroup):
    """Treats ``bench MODEL`` as ``bench model MODEL``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in (*self.commands, *ctx.help_option_names):
            args = ["model", *args]
        return super().parse_args(ctx, args or ["--help"])


app = typer.Typer(cls=_ModelIfNotNamed, rich_markup_mode=None)


@app.callback(epilog=f"{_EXAMPLES}\n  flash-moe bench io MODEL --seconds 10")
def _group() -> None:
    """Measure speed: of a model, or of reading its experts.

    `flash-moe bench MODEL` is short for `flash-moe bench model MODEL`. `flash-moe plan` predicts the speed of a model
    beforehand.
    """


@app.command("model", epilog=_EXAMPLES)
def model(
    model: Annotated[str, Argument(metavar="MODEL", help=MODEL_HELP, show_default=False)],
    k: ExpertsPerToken = None,
    prompt_tokens: Annotated[int, Option(metavar="N", min=1, help="Tokens of the prompt.")] = 256,
    tokens: Annotated[int, Option(metavar="N", min=1, help="Tokens to decode, cold and warm each.")] = 32,
    runs: Annotated[int, Option(metavar="N", min=1, help="Runs of the prompt, cold and warm each.")] = 1,
    plot_file: Annotated[
        Path | None,
        Option("--plot", metavar="FILE", help="Write a plot of all layers; needs flash-moe[plot]."),
    ] = None,
    expert_io: ExpertIOOption = ExpertIOChoice.auto,
    dtype: DtypeOption = None,
    threads: ThreadsOption = None,
    revision: RevisionOption = None,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Measure a model: prefill and decoding, cold and warm.

    Cold means that no expert is in memory: experts are dropped from the page cache before the prompt and before every
    decoded token. Warm means that the page cache keeps the experts of earlier work; if all of them fit into free
    memory, they are read first. The prompt is the source text of this library.
    """
    load_options = {
        "experts_per_token": experts_per_token(k),
        "expert_io": expert_io.value,
        "dtype": None if dtype is None else dtype.value,
        "threads": threads,
    }
    from ..bench.phases import bench, sample_prompt
    from ..bench.plot import plot, require_matplotlib
    from ..progress import Display, Progress
    from .bench_report import model_table
    from .loading import load

    if plot_file is not None:
        require_matplotlib()  # before minutes of measuring
    with load(model, revision, load_options) as loaded, Display() as show:
        prompt = sample_prompt(loaded, prompt_tokens)
        report = bench(
            loaded,
            prompt,
            tokens,
            runs=runs,
            progress=lambda stage, done, total: show(Progress(stage, done, total, "steps")),
        )
    if plot_file is not None:
        plot(report, plot_file)
    if as_json:
        print_json(report.to_dict())
    else:
        print(model_table(report))


@app.command("io", epilog=_IO_EXAMPLES)
def io(
    path: Annotated[
        str, Argument(metavar="PATH", help="A checkpoint's folder, or any large file.", show_default=False)
    ],
    k: ExpertsPerToken = None,
    seconds: Annotated[float, Option(metavar="S", min=0.1, max=600, help="Approximate seconds of measuring.")] = 6.0,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Measure reading: cold from the disk, warm from memory.

    First, it measures plain reads by size and number of threads, which show the limit of the disk. Then it measures the
    two streaming stores of the library. Nothing is written.
    """
    from ..bench.io import bench_io
    from ..progress import Display, Progress
    from .arguments import local_checkpoint
    from .bench_report import io_table

    file = Path(path)
    with Display() as show:
        target = file if file.is_file() else local_checkpoint(path)
        found = bench_io(
            target, experts_per_token(k), seconds, lambda done, total: show(Progress("measuring", done, total, "steps"))
        )
    if as_json:
        print_json(found.to_dict())
    else:
        print(io_table(found))
