"""`flash-moe convert`: writes the packed form of a checkpoint."""

from __future__ import annotations

import os
import shlex
import time
from datetime import timedelta
from pathlib import Path
from typing import Annotated

import typer

from ..record import GROUP_SIZES, QUANTIZED_BITS
from .arguments import MODEL_HELP, one_of
from .console import say, warn
from .progress import Bar

EXAMPLES = """\b
Examples:
  flash-moe convert Qwen/Qwen3.5-397B-A17B qwen-packed
  flash-moe convert ./qwen-mlx-4bit ./qwen-packed
  flash-moe convert ./qwen-bf16 ./qwen-2bit --bits 2 --group-size 32"""


def command(
    src: Annotated[str, typer.Argument(metavar="SRC", help=MODEL_HELP, show_default=False)],
    dst: Annotated[Path, typer.Argument(metavar="DST", help="Folder to make; must not exist.", show_default=False)],
    bits: Annotated[
        int | None,
        typer.Option(
            metavar="|".join(map(str, QUANTIZED_BITS)),
            help="Bits of the experts' weights. Default: quantised experts stay as they are, others become 4-bit.",
        ),
    ] = None,
    group_size: Annotated[
        int,
        typer.Option(metavar="|".join(map(str, GROUP_SIZES)), help="Weights per scale where something is quantised."),
    ] = 64,
    revision: Annotated[str | None, typer.Option(metavar="NAME", help="Branch, tag or commit on the hub.")] = None,
) -> None:
    """Pack a checkpoint, so that experts are read fastest.

    Takes float checkpoints as released (their experts are quantised) and checkpoints already quantised for MLX (copied
    as they are). It can be stopped at any time: the same command continues where it was. DST appears when it is
    complete; until then the work is in DST.partial.
    """
    if bits is not None:
        one_of(bits, QUANTIZED_BITS, "--bits")
    one_of(group_size, GROUP_SIZES, "--group-size")

    from ..checkpoint.hub import resolve
    from ..generation.result import format_bytes
    from ..packing.convert import convert

    source = resolve(src, revision=revision)
    destination = Path(os.path.abspath(dst.expanduser()))  # noqa: PTH100 (links stay as they were typed)
    partial = destination.with_name(destination.name + ".partial")
    resumed, start = partial.exists(), time.monotonic()
    announced = not resumed
    try:
        with Bar("converting", lines=True, resumed=resumed) as bar:

            def progress(done: int, total: int) -> None:
                nonlocal announced
                if not announced:
                    say(f"continuing in {partial}, left by an earlier run")
                    announced = True
                bar.bytes(done, total)

            warnings = convert(source, destination, bits=bits, group_size=group_size, progress=progress)
    except KeyboardInterrupt:
        if partial.exists():
            say("interrupted; run the same command again to continue")
        raise
    for warning in warnings:
        warn(warning)
    nbytes = sum(file.stat().st_size for file in destination.iterdir())
    seconds = time.monotonic() - start
    took = f"{seconds:.1f} s" if seconds < 60 else str(timedelta(seconds=round(seconds)))
    print(f"wrote {dst}: {format_bytes(nbytes)} in {took}")
    print(f'run it: flash-moe generate {shlex.quote(str(dst))} "Why is the sky blue?"')
