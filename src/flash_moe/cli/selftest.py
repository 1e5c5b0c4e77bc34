"""`flash-moe selftest`: this library's kernels on the user's own GPU."""

from __future__ import annotations

import dataclasses

import typer

from .arguments import JsonOption, VerboseOption
from .console import FAILED, print_json

EXAMPLES = """\b
Example:
  flash-moe selftest && export FLASH_MOE_KERNELS=on"""


def command(as_json: JsonOption = False, verbose: VerboseOption = False) -> None:
    """Check the GPU kernels on this machine.

    Every kernel runs on fresh random inputs and is compared with a reference in MLX's own operations: error, and speed
    beside MLX. Ends with exit code 1 if one fails. Where all pass, FLASH_MOE_KERNELS=on uses them all.
    """
    from ..selftest import run

    failed, results = 0, []
    for number, result in enumerate(run()):
        results.append(dataclasses.asdict(result) | {"passed": result.passed})
        failed += not result.passed
        if as_json:
            continue
        if number == 0:
            print(f"{'kernel':<18} {'dtype':<9} {'error':>8} {'allowed':>8} {'us':>8} {'MLX us':>8} {'faster':>7}")
        faster = f"{result.mlx_seconds / result.seconds:.2f}x"
        print(
            f"{result.name:<18} {result.dtype:<9} {result.error:>8.1e} {result.tolerance:>8.0e} "
            f"{result.seconds * 1e6:>8.1f} {result.mlx_seconds * 1e6:>8.1f} {faster:>7} "
            f"{'ok' if result.passed else 'FAIL'}"
        )
    if as_json:
        print_json({"kernels": results, "passed": not failed})
    elif failed:
        print(f"{failed} failed: keep FLASH_MOE_KERNELS=off, and please report the table above")
    else:
        print("all passed")
    if failed:
        raise typer.Exit(FAILED)
