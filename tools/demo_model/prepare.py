"""Makes everything that training reads, in the order in which it is needed; what is there already stays.

    PYTHONPATH=tools python -m demo_model.prepare OUT --shards 400

OUT/tokenizer, OUT/held-out/shard-00000.npz and OUT/shards/shard-*.npz. It yields its cores to other processes: the
host threads of a GPU and its compilers come first.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType

from . import corpus, tokenizer
from .data.splits import HELD_OUT
from .log import LOGGER, configure

NICE = 10
TOLD = 10  # how often progress is told


def tokenizer_folder(out: Path) -> Path:
    return out / "tokenizer"


def held_out(out: Path) -> Path:
    return corpus.shard_path(out / "held-out", 0)


def shards(out: Path) -> Path:
    return out / "shards"


def prepare(out: Path, seed: int, count: int, conversations: int, processes: int) -> None:
    """Writes what ``out`` lacks.

    Args:
        seed: of the shards; the tokenizer and the held-out shard are always the same.
        count, conversations: shards, and conversations in each.
    """
    folder = tokenizer_folder(out)
    if not folder.exists():
        new = out / f"tokenizer.{os.getpid()}"
        tokenizer.write(tokenizer.train(), new)
        new.rename(folder)
        LOGGER.info("tokenizer made")
    vocabulary = folder / "tokenizer.json"
    if not held_out(out).exists():
        made = corpus.write_shard(held_out(out).parent, vocabulary, 0, 0, conversations, HELD_OUT)
        LOGGER.info(f"held-out data: {made.conversations:,} conversations, {made.tokens / 1e6:.1f}M tokens")
    start, tokens = time.monotonic(), 0
    for done in corpus.write_shards(shards(out), vocabulary, seed, count, conversations, processes):
        tokens += done.tokens
        number = int(done.path.stem.split("-")[1]) + 1
        if number % max(1, count // TOLD) == 0:
            speed = tokens / (time.monotonic() - start)
            LOGGER.info(f"{number} of {count} shards, {tokens / 1e6:.0f}M tokens, {speed / 1e3:,.0f}k tokens/s")


class Preparation:
    """`prepare` in a process of its own, which ends with the ``with`` block."""

    def __init__(self, out: Path, seed: int, count: int, conversations: int, processes: int) -> None:
        numbers = {"seed": seed, "shards": count, "conversations": conversations, "processes": processes}
        words = [word for name, value in numbers.items() for word in (f"--{name}", str(value))]
        self._command = [sys.executable, "-m", __name__, str(out), *words]

    def __enter__(self) -> Preparation:
        tools = str(Path(__file__).parents[1])
        path = os.pathsep.join(filter(None, (tools, os.environ.get("PYTHONPATH"))))
        self._process = subprocess.Popen(self._command, env=os.environ | {"PYTHONPATH": path})
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._process.poll() is None:
            self._process.terminate()
            self._process.wait()
        elif self._process.returncode:
            LOGGER.info(f"data was not complete: the process ended with {self._process.returncode}")

    def wait_for(self, path: Path) -> None:
        """Waits until ``path`` is there.

        Raises:
            RuntimeError: the process ended without it.
        """
        while not path.exists():
            code = self._process.poll()
            if code is not None and not path.exists():
                raise RuntimeError(
                    f"{' '.join(self._command)} ended with {code} before it wrote {path}; its error stands above"
                )
            time.sleep(0.1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    add_arguments(parser)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    os.nice(NICE)
    configure(options.out / "log.txt")
    prepare(options.out, options.seed, options.shards, options.conversations, options.processes)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """How much data, and made by how many processes."""
    spare = max(1, (os.cpu_count() or 1) - 2)
    parser.add_argument("--shards", type=int, default=400)
    parser.add_argument("--conversations", type=int, default=8000, help="per shard")
    parser.add_argument("--processes", type=int, default=spare, help="that make shards (default: all cores but two)")


if __name__ == "__main__":
    main()
