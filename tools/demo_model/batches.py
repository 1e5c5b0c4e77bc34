"""Batches of whole conversations, grouped by length, from shards that another process may still be writing.

A shard `shard-00012.npz` holds conversations end to end: `ids` (uint16), `mask` (uint8, 1 on what the assistant says)
and `offsets` (int64, one more than there are conversations). Every batch has exactly ``tokens`` places: rows x length
is constant, so that compiled code fits all of them. Some shards form a pool; its conversations are sorted by length,
cut into batches, and the batches shuffled. All is determined by the seed and the shards.
"""

from __future__ import annotations

import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .log import LOGGER

LONGEST = 1024
PADDING, CONTEXT, ASSISTANT = 0, 1, 2


class Batch(NamedTuple):
    """Right-padded rows [rows, length]."""

    ids: np.ndarray  # int64
    targets: np.ndarray  # int64: the next token, 0 where there is none
    kinds: np.ndarray  # uint8: of the target: PADDING, CONTEXT or ASSISTANT


class Position(NamedTuple):
    """The next batch to come: its pool and its place there."""

    pool: int = 0
    batch: int = 0


class Conversations(NamedTuple):
    """Conversations end to end: ids and mask [tokens], offsets [conversations + 1]."""

    ids: np.ndarray
    mask: np.ndarray
    offsets: np.ndarray

    @classmethod
    def load(cls, paths: list[Path]) -> Conversations:
        """The conversations of all ``paths``, in order.

        Raises:
            ValueError: a shard does not hold what the module's docstring says.
        """
        ids, mask, offsets = [], [], [np.zeros(1, np.int64)]
        for path in paths:
            with np.load(path) as shard:
                part = [shard[name] for name in ("ids", "mask", "offsets")]
            if len(part[0]) != len(part[1]) or part[2][0] != 0 or part[2][-1] != len(part[0]):
                raise ValueError(
                    f"{path}: {len(part[0])} ids, {len(part[1])} mask values and offsets from {part[2][0]} to {part[2][-1]}; "
                    "expected equal numbers and offsets from 0 to that number; write the shard again"
                )
            ids.append(part[0])
            mask.append(part[1])
            offsets.append(offsets[-1][-1] + part[2][1:])
        return cls(np.concatenate(ids), np.concatenate(mask), np.concatenate(offsets))


def plan(conversations: Conversations, tokens: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Indices of the conversations of each batch; only the last batch of the shortest ones may have empty rows.

    Raises:
        ValueError: ``tokens`` is no multiple of 1,024, or a conversation is longer than 1,024 tokens.
    """
    if tokens <= 0 or tokens % LONGEST:
        raise ValueError(f"batches of {tokens} tokens; expected a positive multiple of {LONGEST}")
    lengths = np.diff(conversations.offsets)
    if lengths.max() > LONGEST:
        raise ValueError(f"a conversation has {lengths.max()} tokens, expected at most {LONGEST}; drop longer ones")
    shuffled = rng.permutation(len(lengths))
    order = shuffled[np.argsort(-lengths[shuffled], kind="stable")]
    batches, start = [], 0
    while start < len(order):
        rows = tokens // padded_length(int(lengths[order[start]]), tokens)
        batches.append(order[start : start + rows])
        start += rows
    return [batches[i] for i in rng.permutation(len(batches))]


def padded_length(length: int, tokens: int) -> int:
    """The least multiple of 64 that holds ``length`` tokens and divides ``tokens``."""
    return next(n for n in range(64, LONGEST + 1, 64) if n >= length and tokens % n == 0)


def assemble(conversations: Conversations, chosen: np.ndarray, tokens: int) -> Batch:
    """The batch of the ``chosen`` conversations; missing rows are padding."""
    starts, ends = conversations.offsets[chosen], conversations.offsets[chosen + 1]
    length = padded_length(int((ends - starts).max()), tokens)
    shape = tokens // length, length
    batch = Batch(np.zeros(shape, np.int64), np.zeros(shape, np.int64), np.full(shape, PADDING, np.uint8))
    for row, (start, end) in enumerate(zip(starts, ends, strict=True)):
        batch.ids[row, : end - start] = conversations.ids[start:end]
        batch.targets[row, : end - start - 1] = conversations.ids[start + 1 : end]
        batch.kinds[row, : end - start - 1] = np.where(conversations.mask[start + 1 : end], ASSISTANT, CONTEXT)
    return batch


def evaluation_batches(path: Path, tokens: int, limit: int) -> list[Batch]:
    """At most ``limit`` batches of the shard ``path``, the same each time."""
    conversations = Conversations.load([path])
    chosen = plan(conversations, tokens, np.random.default_rng(0))
    return [assemble(conversations, rows, tokens) for rows in chosen[:limit]]


class ShardStream:
    """Endless batches of the shards of a folder, taken in the order of their numbers, later in a new order each time.

    Args:
        tokens: places of a batch.
        shards: how many there will be; None means those that are there now.
        pool: shards whose conversations are sorted together.
        patience: seconds to wait for a shard that is not there yet. After that, others take the place of it and, without
            more waiting, of all that are late: the order is then no longer determined by the seed alone, but the device
            does not idle.
    """

    def __init__(
        self, folder: Path, tokens: int, seed: int, shards: int | None = None, pool: int = 8, patience: float = 60
    ) -> None:
        self.folder, self.tokens, self.seed, self.patience = folder, tokens, seed, patience
        self.shards = shards if shards is not None else len(list(folder.glob("shard-*.npz")))
        if self.shards < 1:
            raise ValueError(f"{folder} holds no shard-*.npz; write some, or say with --shards how many will come")
        self.pool = min(pool, self.shards)

    def batches(self, position: Position) -> Iterator[tuple[Batch, Position]]:
        """Batches from ``position`` on, each with the position after it."""
        pool, first = position
        while True:
            rng = np.random.default_rng((self.seed, pool))
            conversations = Conversations.load(self._paths(pool, rng))
            chosen = plan(conversations, self.tokens, rng)
            for i in range(first, len(chosen)):
                after = Position(pool, i + 1) if i + 1 < len(chosen) else Position(pool + 1)
                yield assemble(conversations, chosen[i], self.tokens), after
            pool, first = pool + 1, 0

    def _paths(self, pool: int, rng: np.random.Generator) -> list[Path]:
        paths = []
        for turn in range(pool * self.pool, (pool + 1) * self.pool):
            epoch, place = divmod(turn, self.shards)
            order = (
                np.random.default_rng((self.seed, epoch, 1)).permutation(self.shards) if epoch else range(self.shards)
            )
            paths.append(self._await(int(order[place]), rng))
        return paths

    def _await(self, number: int, rng: np.random.Generator) -> Path:
        path = self.folder / f"shard-{number:05d}.npz"
        deadline, told = time.monotonic() + self.patience, False
        while not _complete(path):
            late = time.monotonic() >= deadline
            others = sorted(filter(_complete, self.folder.glob("shard-*.npz"))) if late else []
            if others:
                other = others[rng.integers(len(others))]
                LOGGER.info(f"{path.name} did not come in time: {other.name} instead")
                self.patience = 0
                return other
            if not told:
                LOGGER.info(f"waiting for {path} (shard {number + 1} of {self.shards})")
                told = True
            time.sleep(0.2)
        return path


def _complete(path: Path) -> bool:
    """Whether the shard is there and whole: a zip file's directory is written last."""
    return path.exists() and zipfile.is_zipfile(path)
