"""The command `flash-moe plan`: predicts memory and speed of a model before it is downloaded."""

from __future__ import annotations

from typing import Annotated

import typer
from typer import BadParameter, Option

from .arguments import (
    MODEL_HELP,
    ExpertIOChoice,
    ExpertIOOption,
    ExpertsPerToken,
    JsonOption,
    RevisionOption,
    VerboseOption,
    experts_per_token,
)
from .console import print_json

EXAMPLES = """\b
Examples:
  flash-moe plan MODEL
  flash-moe plan MODEL -k own --context 32768 --prompt 8192
  flash-moe plan org/name --machine "M3 Max 48GB"
  flash-moe plan MODEL --machines 2 --latency 0.1
  flash-moe plan MODEL --json | jq .decode.expected.total"""


def command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP, show_default=False)],
    k: ExpertsPerToken = None,
    prompt: Annotated[int, Option(metavar="N", min=1, help="Tokens of the prompt whose time is predicted.")] = 1024,
    context: Annotated[int, Option(metavar="N", min=1, help="Tokens that memory must have room for.")] = 4096,
    machine: Annotated[
        str | None,
        Option(
            metavar="NAME",
            help='Predict for an Apple chip, such as "M3 Max 48GB"; without it this machine is measured.',
        ),
    ] = None,
    skew: Annotated[
        float | None,
        Option(
            metavar="S",
            help="How unevenly experts are used: the i-th most popular in proportion to i^-S. An assumption; 0 means "
            "evenly.  [default: 0.5]",
        ),
    ] = None,
    machines: Annotated[
        int, Option(metavar="N", min=1, max=64, help="Machines like this one, each with its share of the experts.")
    ] = 1,
    latency: Annotated[
        float | None,
        Option(
            metavar="MS",
            min=0,
            help="Milliseconds of a message from one machine to the next. An assumption; with --machines.  [default: 0.05]",
        ),
    ] = None,
    as_json: JsonOption = False,
    expert_io: ExpertIOOption = ExpertIOChoice.auto,
    revision: RevisionOption = None,
    verbose: VerboseOption = False,
) -> None:
    """Say whether a model will fit, and how fast it will be.

    The model is not downloaded: from a repository on the hub, the command reads only headers, a few megabytes. It times
    layers with random weights on this machine. That takes a few seconds (a minute or two on CUDA, where MLX compiles
    kernels at first use). It measures reads of experts only if the checkpoint is on this machine. The table gives times
    for no expert in memory (cold), for the expected share, and for all experts in memory (warm).
    """
    wanted = experts_per_token(k)

    from ..planning.chips import parse_machine
    from ..planning.costs import Group
    from ..planning.hit_rate import SKEW
    from ..planning.plan import plan
    from ..progress import Display, Progress
    from .plan_report import table

    if latency is not None and machines == 1:
        raise BadParameter("one machine sends no messages; pass --machines too.", param_hint="'--latency'")
    where = None if machine is None else parse_machine(machine)
    group = Group(machines) if latency is None else Group(machines, latency / 1e3)
    with Display() as show:
        show(Progress("measuring", 0, 0, "steps"))
        found = plan(
            model, experts_per_token=wanted, prompt=prompt, context=context, expert_io=expert_io.value,
            machine=where, skew=SKEW if skew is None else skew, group=group, revision=revision,
        )  # fmt: skip
    if as_json:
        print_json(found.to_dict())
    else:
        print(table(found))
