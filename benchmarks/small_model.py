"""Small models on this machine, against mlx-lm on the same checkpoint: `make bench`.

    python benchmarks/small_model.py [--runs 5] [--tokens 150]

Decode, prefill, import and start-up. Every figure is a median over runs that take turns with what they are compared to.
The overhead of a token is its time without what MLX's own thread computed and without waiting for experts (Linux, on the
CPU: from the processor time of threads).
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import io
import logging
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

warnings.simplefilter("ignore")
sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))

import mlx.core as mx  # noqa: E402
from random_checkpoint import text_config, write_checkpoint  # noqa: E402
from turns import in_turns, medians  # noqa: E402

from flash_moe import Model  # noqa: E402
from flash_moe.packing.convert import convert  # noqa: E402

SIZES: dict[str, dict[str, Any]] = {
    "64 wide, 4 of 32 experts": {"hidden_size": 64, "num_experts": 32, "num_experts_per_tok": 4},
    "256 wide, 10 of 64 experts": {
        "hidden_size": 256, "num_experts": 64, "num_experts_per_tok": 10,
        "moe_intermediate_size": 128, "shared_expert_intermediate_size": 128,
    },
}  # fmt: skip
PROMPT = [(7 * i) % 256 for i in range(16)]
WARM_UP = 20


def make(folder: Path, text: dict[str, Any]) -> tuple[Path, Path]:
    """A 4-bit MLX checkpoint with bfloat16 scales, as released ones have, and its packed form."""
    from mlx_lm import convert as mlx_convert

    logging.disable(logging.INFO)
    write_checkpoint(folder / "float", text)
    with contextlib.redirect_stdout(io.StringIO()):  # it reports on stdout
        mlx_convert(
            str(folder / "float"), str(folder / "mlx"), quantize=True, q_bits=4, q_group_size=64, dtype="bfloat16"
        )
    convert(folder / "mlx", folder / "packed")
    return folder / "mlx", folder / "packed"


class Token(NamedTuple):
    """Seconds per token."""

    all: float
    overhead: float


def thread_seconds() -> dict[str, float]:
    """Processor time of every other thread of this process; nothing where it is not known or not theirs that computes."""
    tasks = Path("/proc/self/task")
    found = {}
    for task in tasks.iterdir() if tasks.exists() and mx.default_device() == mx.cpu else ():
        with contextlib.suppress(FileNotFoundError):  # it has just ended
            found[task.name] = int((task / "schedstat").read_text().split()[0]) * 1e-9
    found.pop(str(os.getpid()), None)
    return found


def timed(stream: Iterator[Any], tokens: int, waited: Callable[[Any], float]) -> Token:
    """Times what a stream of tokens does after :data:`WARM_UP` of them.

    Args:
        waited: seconds up to a token in which its maker waited for experts.
    """
    for _ in range(WARM_UP - 1):
        next(stream)
    before, threads, start = waited(next(stream)), thread_seconds(), time.perf_counter()
    for _ in range(tokens):
        last = next(stream)
    seconds = time.perf_counter() - start
    computing = max((busy - threads.get(name, 0.0) for name, busy in thread_seconds().items()), default=math.nan)
    return Token(seconds / tokens, (seconds - computing - waited(last) + before) / tokens)


def mlx_lm_decoder(folder: Path, float32: bool) -> Callable[[int], Token]:
    """Times mlx-lm, as loaded (bfloat16) or in float32."""
    from mlx_lm.generate import generate_step
    from mlx_lm.utils import load_model

    model, _ = load_model(folder)
    if float32:
        model.set_dtype(mx.float32)

    def run(tokens: int) -> Token:
        stream = generate_step(mx.array(PROMPT), model, max_tokens=tokens + WARM_UP)
        return timed(stream, tokens, lambda found: 0.0)

    return run


def our_decoder(folder: Path, expert_io: Any) -> Callable[[int], Token]:
    """Times flash_moe."""
    model = Model.load(folder, experts_per_token=None, expert_io=expert_io)
    model.tokenizer.eos_token_ids = frozenset()

    def run(tokens: int) -> Token:
        stream = model.stream(PROMPT, max_tokens=tokens + WARM_UP, temperature=0)
        return timed(stream, tokens, lambda chunk: chunk.stats.fetch_seconds)

    return run


def decode(folder: Path, runs: int, tokens: int) -> None:
    columns = (
        "ms per token",
        "of mlx-lm as loaded",
        "of mlx-lm in float32",
        "overhead, ms",
        "of mlx-lm's token as loaded",
    )
    print(f"\n| decode | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 1)}")
    for size, changes in SIZES.items():
        mlx, packed = make(folder / size.split()[0], text_config(num_hidden_layers=8, **changes))
        decoders = {
            "mlx-lm, as loaded (bfloat16)": mlx_lm_decoder(mlx, False),
            "mlx-lm, float32": mlx_lm_decoder(mlx, True),
            "flash_moe, packed, slots": our_decoder(packed, "slots"),
            "flash_moe, packed, mapped": our_decoder(packed, "mapped"),
            "flash_moe, resident": our_decoder(packed, "resident"),
        }
        found = in_turns(runs, {name: (lambda run=run: run(tokens)) for name, run in decoders.items()})
        tokens_of = {
            name: Token(*map(statistics.median, zip(*runs_of, strict=True))) for name, runs_of in found.items()
        }
        loaded, float32 = (token.all for token in list(tokens_of.values())[:2])
        for name, (seconds, overhead) in tokens_of.items():
            print(
                f"| {size}: {name} | {seconds * 1e3:.2f} | {seconds / loaded:.2f} | {seconds / float32:.2f} "
                f"| {overhead * 1e3:.2f} | {overhead / loaded:.2f} |"
            )


def prefill(folder: Path, runs: int) -> None:
    print(
        "\n| 2,048-token prompt | ms | token by token: ms | times faster | fetches per touched expert |\n|---|---|---|---|---|"
    )
    prompt = [(7 * i) % 256 for i in range(2048)]
    for size in SIZES:
        model = Model.load(folder / size.split()[0] / "packed", experts_per_token=None)
        touched: list[set[int]] = [set() for _ in range(model.config.num_hidden_layers)]
        fetch, asked = model._store.fetch, 0

        def counting(layer: int, experts: Sequence[int], fetch: Any = fetch, touched: Any = touched) -> Any:
            nonlocal asked
            asked += len(experts)
            touched[layer].update(experts)
            return fetch(layer, experts)

        with patch.object(model._store, "fetch", counting):
            model.generate(prompt, max_tokens=1, temperature=0)
        each = asked / sum(map(len, touched))

        def together(model: Model = model) -> float:
            model.forget()
            return model.generate(prompt, max_tokens=1, temperature=0).stats.prompt_seconds

        def one_by_one(model: Model = model) -> float:
            cache, start = model._decoder.new_cache(), time.perf_counter()
            for length in range(1, len(prompt) + 1):
                model._engine.prefill(prompt[:length], cache)
            return time.perf_counter() - start

        found = medians(max(2, runs // 2), {"together": together, "one by one": one_by_one})
        fast, slow = found["together"], found["one by one"]
        print(f"| {size} | {fast * 1e3:.0f} | {slow * 1e3:.0f} | {slow / fast:.1f} | {each:.2f} |")


def start_up(folder: Path, runs: int) -> None:
    model = folder / next(iter(SIZES)).split()[0] / "packed"
    generate = [sys.executable, "-m", "flash_moe", "generate", str(model), "Hi", "--max-tokens", "1"]

    def spawn(command: list[str]) -> Callable[[], float]:
        def run() -> float:
            start = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True)
            return time.perf_counter() - start

        return run

    found = medians(
        runs,
        {
            "python starts": spawn([sys.executable, "-c", "pass"]),
            "import flash_moe": spawn([sys.executable, "-c", "import flash_moe"]),
            "flash-moe generate to its first token": spawn(generate),
        },
    )
    print("\n| from start of the process | s |\n|---|---|")
    for name, seconds in found.items():
        print(f"| {name} | {seconds:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=150)
    arguments = parser.parse_args()
    machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    print(f"{datetime.date.today()}, {machine}, mlx {mx.__version__} on {mx.default_device()}")
    with tempfile.TemporaryDirectory() as folder:
        decode(Path(folder), arguments.runs, arguments.tokens)
        prefill(Path(folder), arguments.runs)
        start_up(Path(folder), arguments.runs)


if __name__ == "__main__":
    main()
