"""How fast files can be read in parallel, by size of the requests and number of threads: what a store could reach."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..errors import CheckpointError
from ..experts.files import MappedFile

THREADS = (1, 2, 4, 8, 16)
_ALIGNMENT = 16384  # of requests, as records have it


class Request(NamedTuple):
    """A range of a file."""

    file: MappedFile
    offset: int
    nbytes: int


@dataclass(frozen=True)
class RawSpeed:
    """Bytes per second of reads into memory that is used over and over.

    Attributes:
        cold: after the page cache was emptied; warm: the same requests again.
        absent: share of the bytes that were really absent when the cold reads began; 1 is truly cold.
    """

    threads: int
    request_bytes: int
    cold: float
    warm: float
    absent: float


def raw_speed(files: Sequence[MappedFile], threads: int, request_bytes: int, seconds: float, seed: int = 0) -> RawSpeed:
    """Reads random places, no place twice, until time runs out: cold for half of it, then the same again.

    Raises:
        CheckpointError: no file is as long as a request.
    """
    requests = _requests(files, request_bytes, seed)
    pages = [request.file.absent(request.offset, request.nbytes) for request in _evicted(files, requests)]
    absent = sum(int(np.count_nonzero(found)) for found in pages) / sum(found.size for found in pages)
    with ThreadPoolExecutor(threads) as pool:
        buffers = [np.zeros(request_bytes, np.uint8) for _ in range(threads)]
        cold, done = _read(pool, buffers, requests, seconds / 2)
        warm, _ = _read(pool, buffers, requests[:done], seconds / 2)
    return RawSpeed(threads, request_bytes, cold, warm, absent)


def open_files(paths: Sequence[Path]) -> list[MappedFile]:
    """Opens the files and brings what was written to them lately to the disk, without which it stays in memory."""
    files = [MappedFile(path) for path in paths]
    for file in files:
        file.evict(flush=True)
    return files


def _requests(files: Sequence[MappedFile], nbytes: int, seed: int) -> list[Request]:
    step = -(-nbytes // _ALIGNMENT) * _ALIGNMENT
    found = [Request(file, at, nbytes) for file in files for at in range(0, file.pages.size - nbytes + 1, step)]
    if not found:
        longest = max((file.pages.size for file in files), default=0)
        raise CheckpointError(f"the longest file has {longest} bytes, expected {nbytes} or more; choose a larger file")
    return [found[i] for i in np.random.default_rng(seed).permutation(len(found))]


def _evicted(files: Sequence[MappedFile], requests: list[Request]) -> list[Request]:
    """Empties the page cache of the files; returns the requests by which to see whether that worked."""
    for file in files:
        file.evict()
    return requests[:64]


def _read(
    pool: ThreadPoolExecutor, buffers: list[np.ndarray], requests: list[Request], limit: float
) -> tuple[float, int]:
    """Bytes per second, and how many requests were served, in their order: one thread's share is every n-th."""
    start = time.perf_counter()
    deadline = start + limit

    def work(number: int) -> int:
        served = 0
        for request in requests[number :: len(buffers)]:
            request.file.read_into(buffers[number], request.offset)
            served += 1
            if time.perf_counter() > deadline:
                break
        return served

    shares = list(pool.map(work, range(len(buffers))))
    nbytes = sum(shares) * buffers[0].size
    return nbytes / (time.perf_counter() - start), max(shares) * len(buffers)
