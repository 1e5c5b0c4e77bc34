"""Decoding on the CPU by bits and group size, against mlx-lm in float32 on the same checkpoint.

    python benchmarks/bits.py FOLDER [--formats 4/64 8/64 4/32] [--runs 3]

FOLDER gets a float model with random weights, 4 layers of 2,048, and an MLX checkpoint of it for each format; those that
are there are used again. Figures are medians over runs that take turns; a token of mlx-lm takes half a second.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import io
import logging
import shlex
import sys
import time
import warnings
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

warnings.simplefilter("ignore")
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "benchmarks")]

import mlx.core as mx  # noqa: E402
from llama_cpp import SIZES, processor  # noqa: E402
from random_checkpoint import write_checkpoint  # noqa: E402
from turns import medians  # noqa: E402

from flash_moe import Model  # noqa: E402

TEXT: dict[str, Any] = SIZES | {"num_hidden_layers": 4, "num_experts": 16, "vocab_size": 4096}
FORMATS = ("4/64", "4/32", "4/128", "8/64", "2/64", "3/64", "5/64", "6/64", "3/32", "8/32")


def make(folder: Path, fmt: str) -> Path:
    """An MLX checkpoint of these bits and this group size."""
    from mlx_lm import convert

    source, target = folder / "float", folder / fmt.replace("/", "-")
    if not source.exists():
        write_checkpoint(source, TEXT)
    if not target.exists():
        bits, group = map(int, fmt.split("/"))
        with contextlib.redirect_stdout(io.StringIO()):  # it reports on stdout
            convert(str(source), str(target), quantize=True, q_bits=bits, q_group_size=group, dtype="bfloat16")
    return target


def seconds(stream: Any, tokens: int) -> float:
    """Of a token, after the first two."""
    for _ in islice(stream, 2):
        pass
    start = time.perf_counter()
    for _ in islice(stream, tokens):
        pass
    return (time.perf_counter() - start) / tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--formats", nargs="+", default=FORMATS, help="bits/group size")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--make", action="store_true", help="only write the checkpoints")
    arguments = parser.parse_args()
    logging.disable(logging.INFO)
    folders = {fmt: make(arguments.folder, fmt) for fmt in arguments.formats}
    if arguments.make:
        return
    from mlx_lm.generate import generate_step
    from mlx_lm.utils import load_model

    print(f"{datetime.datetime.now():%Y-%m-%d %H:%M}, {processor()}, mlx {mx.__version__}")
    print(f"python {shlex.join(sys.argv)}")
    print("\n| bits/group | flash_moe, ms a token | mlx-lm in float32 | ratio |\n|---|---|---|---|")
    for fmt, folder in folders.items():
        theirs, _ = load_model(folder)
        theirs.set_dtype(mx.float32)
        with Model.load(folder, experts_per_token=None, expert_io="resident") as ours:
            ours.tokenizer.eos_token_ids = frozenset()
            tasks: dict[str, Callable[[], float]] = {
                "flash_moe": lambda: seconds(ours.stream([1], max_tokens=40, temperature=0), 36),
                "mlx-lm": lambda: seconds(generate_step(mx.array([1]), theirs, max_tokens=8), 4),  # noqa: B023
            }
            found = medians(arguments.runs, tasks)
        own, other = found["flash_moe"], found["mlx-lm"]
        print(f"| {fmt} | {1e3 * own:.1f} | {1e3 * other:.0f} | {own / other:.3f} |", flush=True)


if __name__ == "__main__":
    main()
