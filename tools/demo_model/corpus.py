"""Writes training data: shards of tokenised conversations, made in parallel.

    PYTHONPATH=tools python -m demo_model.corpus FOLDER --tokenizer tokenizer.json --shards 100 --conversations 8000

A shard depends on the seed and its number alone, and appears under its name when it is complete; those that are there
already are not made again.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
from tokenizers import Tokenizer

from .data import conversation
from .data.splits import HELD_OUT, TRAIN
from .render import encode

LONGEST = 1024  # tokens
_BATCH = 256  # conversations tokenised together


@dataclass(frozen=True)
class Shard:
    """What was written: conversations and tokens, those that the assistant produces, and how many were too long."""

    path: Path
    conversations: int
    tokens: int
    produced: int
    dropped: int


def write_shard(
    folder: Path, tokenizer_file: Path, seed: int, shard: int, conversations: int, split: str = TRAIN
) -> Shard:
    """Writes `shard-00012.npz` with n conversations of at most 1,024 tokens; longer ones are left out.

    Its arrays: `ids` [tokens] uint16, all conversations after each other; `offsets` [n + 1] int64, where each begins;
    `mask` [tokens] uint8, 1 where the assistant produces the token.

    Args:
        conversations: number to generate, those that turn out too long included.
    """
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    rng = Random(f"{split}/{seed}/{shard}")
    ids: list[np.ndarray] = []
    mask: list[np.ndarray] = []
    for start in range(0, conversations, _BATCH):
        batch = [conversation(rng, split) for _ in range(min(_BATCH, conversations - start))]
        for tokens, produced in encode(batch, tokenizer):
            if len(tokens) <= LONGEST:
                ids.append(np.array(tokens, np.uint16))
                mask.append(np.array(produced, np.uint8))
    offsets = np.zeros(len(ids) + 1, np.int64)
    np.cumsum([len(one) for one in ids], out=offsets[1:])
    arrays = {"ids": np.concatenate(ids), "offsets": offsets, "mask": np.concatenate(mask)}
    folder.mkdir(parents=True, exist_ok=True)
    path = shard_path(folder, shard)
    partial = folder / f".{path.name}.{os.getpid()}.partial"
    with partial.open("wb") as stream:
        np.savez(stream, **arrays)
    partial.replace(path)
    return Shard(path, len(ids), int(offsets[-1]), int(arrays["mask"].sum()), conversations - len(ids))


def write_shards(
    folder: Path, tokenizer_file: Path, seed: int, shards: int, conversations: int, processes: int, split: str = TRAIN
) -> Iterator[Shard]:
    """Writes those of the first ``shards`` shards that ``folder`` lacks, in order, ``processes`` at a time."""
    jobs = [
        (folder, tokenizer_file, seed, shard, conversations, split)
        for shard in range(shards)
        if not shard_path(folder, shard).exists()
    ]
    if not jobs:
        return
    # Processes are parallel already; the tokenizer's threads would only get in their way.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with multiprocessing.get_context("spawn").Pool(min(processes, len(jobs))) as pool:
        yield from pool.imap(_write, jobs)


def shard_path(folder: Path, shard: int) -> Path:
    return folder / f"shard-{shard:05d}.npz"


def _write(job: tuple) -> Shard:
    return write_shard(*job)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True, help="tokenizer.json")
    parser.add_argument("--shards", type=int, default=100)
    parser.add_argument("--conversations", type=int, default=8000, help="per shard")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--split", choices=(TRAIN, HELD_OUT), default=TRAIN)
    options = parser.parse_args()
    start, tokens, produced, dropped = time.monotonic(), 0, 0, 0
    for done in write_shards(
        options.folder,
        options.tokenizer,
        options.seed,
        options.shards,
        options.conversations,
        options.processes,
        options.split,
    ):
        tokens, produced, dropped = tokens + done.tokens, produced + done.produced, dropped + done.dropped
        speed = tokens / (time.monotonic() - start)
        print(
            f"{done.path.name}: {done.conversations:,} conversations, {tokens / 1e6:.1f}M tokens so far "
            f"({produced / tokens:.0%} produced), {dropped} too long, {speed:,.0f} tokens/s",
            flush=True,
        )


if __name__ == "__main__":
    main()
