"""Measures parallel reads by request size and number of threads, which is the limit for every store."""

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
_ALIGNMENT = 16384  # alignment of requests, as for records
_FASTEST = 40e9  # assumed maximum bytes per second, which determines the number of requests
_FEWEST = 64  # maximum number of requests


class Request(NamedTuple):
    """A range of a file."""

    file: MappedFile
    offset: int
    nbytes: int


@dataclass(frozen=True)
class RawSpeed:
    """The bytes per second of reads into memory that is reused.

    Attributes:
        cold: speed after the page cache was emptied. warm: speed of the same requests again.
        missing: share of the bytes that were missing from the page cache when the cold reads began; 1 means completely
            cold.
    """

    threads: int
    request_bytes: int
    cold: float
    warm: float
    missing: float


def raw_speed(files: Sequence[MappedFile], threads: int, request_bytes: int, seconds: float) -> RawSpeed:
    """Reads random places, each once, for half of the time, and then the same places again from the page cache.

    Raises:
        CheckpointError: all files are shorter than a request.
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
    """Opens the files and writes their recent changes to the disk, because unwritten pages cannot be dropped from
    memory.
    """
    files = [MappedFile(path) for path in paths]
    for file in files:
        file.evict(flush=True)
    return files


def _requests(files: Sequence[MappedFile], nbytes: int, most: int) -> list[Request]:
    """Returns up to ``most`` different places in random order."""
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
    """Reads with one thread per share.

    Returns the bytes per second, and the requests completed within the time limit.
    """
    buffers = [read_buffer(nbytes) for _ in shares]
    for buffer in buffers:
        buffer.fill(1)  # memory whose pages are already allocated
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
