"""The command `flash-moe convert`: converts a checkpoint to the packed form."""

from __future__ import annotations

import os
import shlex
import time
from datetime import timedelta
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from ..formats import GROUP_SIZES, MODES, QUANTIZED_BITS
from .arguments import MODEL_HELP, JsonOption, RevisionOption, VerboseOption, one_of
from .console import print_json, say, warn

_CALIBRATION_TOKENS = 16384
_BITS = "|".join(map(str, QUANTIZED_BITS))
EXAMPLES = """\b
Examples:
  flash-moe convert Qwen/Qwen3.5-397B-A17B qwen-packed
  flash-moe convert ./qwen-mlx-4bit ./qwen-packed
  flash-moe convert ./qwen ./qwen-2bit --expert-bits 2 --calibrate chats.jsonl
  flash-moe convert ./qwen ./qwen-mixed --expert-bits 2 --down-bits 3
  flash-moe convert ./qwen ./qwen-0 --share 0/2      for one of two machines"""


class RoundingChoice(str, Enum):
    """Values of --rounding."""

    search = "search"
    nearest = "nearest"


def command(
    src: Annotated[str, typer.Argument(metavar="SRC", help=MODEL_HELP, show_default=False)],
    dst: Annotated[Path, typer.Argument(metavar="DST", help="Folder to make; must not exist.", show_default=False)],
    bits: Annotated[
        int | None,
        typer.Option(
            metavar=_BITS,
            help="Bits of weights; resident weights never get fewer than 4. Default: quantised weights stay as "
            "they are, others become 4-bit.",
        ),
    ] = None,
    expert_bits: Annotated[
        int | None, typer.Option(metavar=_BITS, help="Bits of the experts' weights.  [default: --bits]")
    ] = None,
    down_bits: Annotated[
        int | None,
        typer.Option(
            metavar=_BITS, help="Bits of the experts' down projections, which matter most.  [default: --expert-bits]"
        ),
    ] = None,
    group_size: Annotated[
        int,
        typer.Option(metavar="|".join(map(str, GROUP_SIZES)), help="Weights per scale where something is quantised."),
    ] = 64,
    mode: Annotated[
        str | None,
        typer.Option(
            metavar="|".join(MODES),
            help="Quantise in a mode whose bits and groups are fixed, instead of affinely with --bits.",
        ),
    ] = None,
    rounding: Annotated[
        RoundingChoice,
        typer.Option(
            metavar="search|nearest",
            help="How weights are quantised: with the scales that lose least, or as MLX does it, which is faster.",
        ),
    ] = RoundingChoice.search,
    calibrate: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            exists=True,
            dir_okay=False,
            help="Quantise each expert for its inputs in this text, which is as in `flash-moe eval --text`. Takes "
            "longer, and loses far less below 4 bits.",
        ),
    ] = None,
    calibrate_tokens: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help=f"Tokens of the text to use, from its beginning.  [default: {_CALIBRATION_TOKENS}]"
        ),
    ] = None,
    share: Annotated[
        str | None,
        typer.Option(
            metavar="I/N",
            help="Write only the experts of rank I (from 0) in a group of N machines; see docs/machines.md.",
        ),
    ] = None,
    keep: Annotated[
        bool,
        typer.Option(
            "--keep",
            help="Keep the downloaded repository in the hub's cache. By default, it is converted shard by shard, "
            "with at most two of its files on the disk.",
        ),
    ] = False,
    revision: RevisionOption = None,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Pack a checkpoint, so that experts are read fastest.

    It quantises float checkpoints, and copies weights that are already quantised for MLX. You can stop it at any time
    and run the same command again to continue. DST appears when it is complete; until then, the work is in DST.partial.
    """
    for value, option in ((bits, "--bits"), (expert_bits, "--expert-bits"), (down_bits, "--down-bits")):
        if value is not None:
            one_of(value, QUANTIZED_BITS, option)
    one_of(group_size, GROUP_SIZES, "--group-size")
    if mode is not None:
        one_of(mode, tuple(MODES), "--mode")
        if bits is not None or expert_bits is not None or down_bits is not None:
            raise typer.BadParameter(f"{mode} has bits of its own; leave --bits out.", param_hint="'--mode'")
    if calibrate is None and calibrate_tokens is not None:
        raise typer.BadParameter(
            "it says how much of a text is used; pass --calibrate too.", param_hint="'--calibrate-tokens'"
        )

    from ..amounts import format_bytes
    from ..checkpoint.hub import resolve
    from ..packing.convert import convert
    from ..packing.info import describe
    from ..progress import Display, Progress

    calibration = None
    if calibrate is not None:
        folder = resolve(src, revision=revision)
        calibration = _calibration(folder, calibrate, calibrate_tokens or _CALIBRATION_TOKENS)
    destination = Path(os.path.abspath(dst.expanduser()))  # noqa: PTH100 (links stay as they were typed)
    partial = destination.with_name(destination.name + ".partial")
    announced, start = not partial.exists(), time.monotonic()
    try:
        with Display() as show:

            def progress(done: Progress) -> None:
                nonlocal announced
                if not announced:
                    say(f"continuing in {partial}, left by an earlier run")
                    announced = True
                show(done)

            warnings = convert(
                src,
                destination,
                bits=bits,
                expert_bits=expert_bits,
                down_bits=down_bits,
                group_size=group_size,
                mode=mode,  # type: ignore[arg-type]
                rounding=rounding.value,
                calibration=calibration,
                share=share,
                keep=keep,
                revision=revision,
                progress=progress,
            )
    except KeyboardInterrupt:
        if partial.exists():
            say("interrupted; run the same command again to continue")
        raise
    for warning in warnings:
        warn(warning)
    nbytes = sum(file.stat().st_size for file in destination.iterdir())
    seconds = time.monotonic() - start
    width = describe(destination).bits_per_weight
    if as_json:
        print_json(
            {"path": str(destination), "bytes": nbytes, "seconds": seconds, "expert_bits": width, "warnings": warnings}
        )
        return
    took = f"{seconds:.1f} s" if seconds < 60 else str(timedelta(seconds=round(seconds)))
    print(f"wrote {dst}: {format_bytes(nbytes)} in {took}")
    print(f"experts: {width:.2f} bits per weight with their scales")
    if share is None:
        print(f'run it: flash-moe generate {shlex.quote(str(dst))} "Why is the sky blue?"')


def _calibration(source: Path, file: Path, count: int) -> list[list[int]]:
    from ..evaluation import calibration_tokens
    from ..text import Tokenizer

    return calibration_tokens(file, Tokenizer.load(source), count)
