"""The command `flash-moe worker`: runs a rank other than 0 of a group of machines."""

from __future__ import annotations

from typing import Annotated

import typer

from ..errors import ArgumentError
from .arguments import MODEL_HELP, ExpertsPerToken
from .loading import Loader, loads

EXAMPLES = """\b
Examples, on the second of two machines:
  MLX_HOSTFILE=ranks.json MLX_RANK=1 flash-moe worker ./qwen-1 -k own
and on the first:
  MLX_HOSTFILE=ranks.json MLX_RANK=0 flash-moe chat ./qwen-0 -k own
ranks.json is the same on all machines and names the addresses of each rank:
  [ ["10.0.0.1:5000"], ["10.0.0.2:5000"] ]"""


@loads
def command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP, show_default=False)],
    k: ExpertsPerToken = None,
    *,
    loading: Loader,
) -> None:
    """Run a share of a model's experts for another machine.

    Every rank of a group except rank 0 runs this command, until the command on rank 0 ends. The model and the options
    must be those of rank 0. The folder may contain only the share of this rank (`flash-moe convert --share`). See
    docs/machines.md.
    """
    with loading(model, k):
        raise ArgumentError(
            "this is rank 0, or no group: start a worker as rank 1 or higher, with mlx.launch or with MLX_RANK and "
            "MLX_HOSTFILE set"
        )
