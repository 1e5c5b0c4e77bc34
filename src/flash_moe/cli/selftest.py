"""The command `flash-moe selftest`: tests the kernels of this library on the user's GPU."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated

import typer

from .arguments import LOCAL_HELP, ExpertsPerToken, JsonOption, VerboseOption, experts_per_token, local_checkpoint
from .console import FAILED, print_json

if TYPE_CHECKING:
    from pathlib import Path

    from ..ops.dispatch import Case

EXAMPLES = """\b
Examples:
  flash-moe selftest                at the layer sizes of Qwen3.5-397B-A17B
  flash-moe selftest MODEL          at those of a model"""


def command(
    model: Annotated[str | None, typer.Argument(metavar="MODEL", help=LOCAL_HELP, show_default=False)] = None,
    k: ExpertsPerToken = None,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Check the GPU kernels on this machine.

    Every kernel runs on new random inputs in a separate process. Its results are compared with a float32 reference, and
    its time with that of MLX's ops. The first load of a model does the same for the kernels that it needs, and uses
    those that are right and faster. The exit code is 1 if a kernel is wrong.
    """
    from ..errors import FlashMoEError
    from ..ops.dispatch import on_gpu
    from ..proofs.process import NoAnswer, judged
    from ..proofs.prover import name_of
    from ..proofs.standard import standard_cases

    if not on_gpu():
        raise FlashMoEError(
            "found no GPU that MLX can use; kernels need Metal or CUDA, everything else runs on the CPU"
        )
    cases = list(standard_cases()) if model is None else cases_of(local_checkpoint(model), experts_per_token(k))
    if not as_json:
        print(f"{'kernel':<58} {'error':>8} {'allowed':>8} {'us':>8} {'MLX us':>8} {'faster':>7}")
    verdicts = {}
    try:
        for case, verdict in judged(cases):
            verdicts[case] = verdict
            if as_json:
                continue
            times = ""
            if verdict.right:
                faster = f"{verdict.mlx_seconds / verdict.seconds:.2f}x"
                times = f" {verdict.seconds * 1e6:>8.1f} {verdict.mlx_seconds * 1e6:>8.1f} {faster:>7}"
            result = "ok" if verdict.used else "right" if verdict.right else f"FAIL: {verdict.reason}"
            print(f"{name_of(case):<58} {verdict.error:>8.1e} {verdict.tolerance:>8.0e}{times} {result}", flush=True)
    except NoAnswer as error:
        raise FlashMoEError(f"the process that tries kernels could not be started: {error}") from error
    wrong, used = sum(not v.right for v in verdicts.values()), sum(v.used for v in verdicts.values())
    if as_json:
        kernels = [{"case": list(c)} | dataclasses.asdict(v) for c, v in verdicts.items()]
        print_json({"kernels": kernels, "passed": not wrong})
    else:
        slower = len(cases) - wrong - used
        print(f"{len(cases)} cases: {wrong} wrong, {slower} right but no faster than MLX, {used} used")
        if wrong:
            print("Kernels that fail are never used, but please report the table above.")
    if wrong:
        raise typer.Exit(FAILED)


def cases_of(folder: Path, k: int | None) -> list[Case]:
    """Returns the cases of kernels that a checkpoint could use with K experts per token; None means its own K."""
    from ..checks import resolve_experts_per_token
    from ..loading import resolve_dtype
    from ..models import open_model

    files = open_model(folder)
    used = resolve_experts_per_token(k, files.shape.experts_per_token)
    return files.kernel_cases(files.records().layouts, used, resolve_dtype(None, files))
