"""The speed of parallel reads by request size and number of threads: the limit of what a store can reach."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..errors import CheckpointError
from ..experts.host_memory import read_buffer
from ..experts.mapped_file import MappedFile

THREADS = (1, 2, 4, 8, 16)
_ALIGNMENT = 16384  # of requests, as records have it
_FASTEST = 40e9  # bytes per second; a disk that is faster reads all that was chosen for it before time runs out
_FEWEST = 64  # requests to choose


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
        missing: share of the bytes that were missing in the page cache when the cold reads began; 1 is truly cold.
    """

    threads: int
    request_bytes: int
    cold: float
    warm: float
    missing: float


def raw_speed(files: Sequence[MappedFile], threads: int, request_bytes: int, seconds: float) -> RawSpeed:
    """Reads random places, no place twice, until time runs out: cold for half of it, then the same again.

    Raises:
        CheckpointError: no file is as long as a request.
    """
    requests = _requests(files, request_bytes, max(_FEWEST, int(_FASTEST * seconds / request_bytes)))
    for file in files:
        file.evict()
    pages = [request.file.missing_pages(request.offset, request.nbytes) for request in requests]
    missing = sum(int(np.count_nonzero(found)) for found in pages) / sum(found.size for found in pages)
    with ThreadPoolExecutor(threads) as pool:
        shares = [requests[number::threads] for number in range(threads)]
        cold, served = _read(pool, shares, request_bytes, seconds / 2)
        warm, _ = _read(pool, served, request_bytes, seconds / 2)
    return RawSpeed(threads, request_bytes, cold, warm, missing)


def open_files(paths: Sequence[Path]) -> list[MappedFile]:
    """Opens the files and writes their recent changes to the disk; until then these stay in memory."""
    files = [MappedFile(path) for path in paths]
    for file in files:
        file.evict(flush=True)
    return files


def _requests(files: Sequence[MappedFile], nbytes: int, most: int) -> list[Request]:
    """Returns up to ``most`` different places in a random order."""
    step = -(-nbytes // _ALIGNMENT) * _ALIGNMENT
    ends = np.cumsum([max(0, (file.size - nbytes) // step + 1) for file in files])
    if not ends[-1]:
        longest = max(file.size for file in files)
        raise CheckpointError(f"the longest file has {longest} bytes, expected {nbytes} or more; choose a larger file")
    picked = np.random.default_rng(0).choice(ends[-1], min(most, ends[-1]), replace=False)
    owners = np.searchsorted(ends, picked, side="right")
    places = picked - np.concatenate([[0], ends])[owners]
    return [
        Request(files[owner], place * step, nbytes)
        for owner, place in zip(owners.tolist(), places.tolist(), strict=True)
    ]


def _read(
    pool: ThreadPoolExecutor, shares: list[list[Request]], nbytes: int, limit: float
) -> tuple[float, list[list[Request]]]:
    """Returns bytes per second of one thread for each share, and what they had read when time ran out."""
    buffers = [read_buffer(nbytes) for _ in shares]
    for buffer in buffers:
        buffer.fill(1)  # memory that was touched already
    start = time.perf_counter()
    deadline = start + limit

    def work(requests: list[Request], buffer: np.ndarray) -> list[Request]:
        for done, request in enumerate(requests, start=1):
            request.file.read_into(buffer, request.offset)
            if time.perf_counter() > deadline:
                return requests[:done]
        return requests

    served = list(pool.map(work, shares, buffers))
    return sum(map(len, served)) * nbytes / (time.perf_counter() - start), served
