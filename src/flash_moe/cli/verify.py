"""The command `flash-moe verify`: reads a whole checkpoint and checks it for damage."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

from .arguments import LOCAL_HELP, JsonOption, VerboseOption, local_checkpoint
from .console import print_json

EXAMPLES = """\b
Example:
  flash-moe verify ./qwen-packed && echo good"""


def command(
    path: Annotated[str, typer.Argument(metavar="PATH", help=LOCAL_HELP, show_default=False)],
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Look for damage: compare every weight with its checksum.

    It compares the experts and the other weights. config.json and tokenizer files have no checksums: it only checks that
    the weights are those of config.json's model. If a file is damaged, the exit code is 1 and the message names the first
    damaged file, or the layer and expert. Only checkpoints from `flash-moe convert` have checksums. For others, it checks
    whether all experts can be read.
    """
    from ..amounts import format_bytes
    from ..packing.verify import verify

    found = verify(local_checkpoint(path))
    if as_json:
        print_json(dataclasses.asdict(found))
    elif found.checksums:
        print(
            f"OK: {found.records:,} expert records and {found.files:,} other weight files match their checksums "
            f"({format_bytes(found.nbytes)})"
        )
    else:
        print(
            f"readable: all {found.records:,} experts ({format_bytes(found.nbytes)}). This checkpoint has no checksums, "
            "so changed bytes would go unnoticed; one written by `flash-moe convert` has them."
        )
