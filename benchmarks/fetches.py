"""Fetches of a few records by the stores, beside plain parallel reads of the same records.

    python benchmarks/fetches.py [--records 4] [--rounds 20] [--folder MODEL]

A plain read gives the ranges of the same records to threads that wait, and ends when the last byte is there, as a fetch
must; what is asked for is prepared before its time begins. In each round the page cache is emptied and all records are read
three times, cold, warm, and once more; the contenders take turns from one set of records to the next, in an order that is
always another, so that none always comes after the same. A last row reads single records without ever pausing. Without
--folder a packed checkpoint of 397B expert sizes is made, 2.7 GB in 4 files.
"""

from __future__ import annotations

import argparse
import datetime
import os
import random
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, median

import mlx.core as mx
from memory_limit import make

from flash_moe.bench.fetches import bring
from flash_moe.bench.raw_reads import open_files, raw_speed
from flash_moe.checkpoint.records import RecordTable
from flash_moe.experts.host_memory import read_buffer
from flash_moe.experts.mapped import MappedStore
from flash_moe.experts.mapped_file import MappedFile
from flash_moe.experts.reader import IN_FLIGHT, RecordReader
from flash_moe.experts.slots import SlotStore
from flash_moe.experts.store import ExpertStore
from flash_moe.models import open_model

Set = tuple[int, list[int]]  # a layer and experts of it
Contender = Callable[[Set], float]  # reads a set; seconds


def sets_of(table: RecordTable, records: int) -> list[Set]:
    """Every record at most once, neighbouring sets of different layers."""
    return [
        (layer, list(range(first, first + records)))
        for first in range(0, table.num_experts - records + 1, records)
        for layer in table.layouts
    ]


def fetching(store: ExpertStore) -> Contender:
    """A fetch into the device's view, of records that are not in the store's own memory."""

    def fetch(wanted: Set) -> float:
        start = time.perf_counter()
        bring(store.fetch(*wanted))
        end = time.perf_counter()
        assert store.stats.bytes_loaded == store.stats.bytes_requested
        return end - start

    return fetch


def plain(reader: RecordReader, records: int, threads: int, request: int) -> Contender:
    """Parallel reads of ``request`` bytes; two sets of buffers take turns, as slots do."""
    buffers = [read_buffer(reader.table.max_stride) for _ in range(2 * records)]
    for buffer in buffers:
        buffer.fill(1)  # memory that was touched already
    pool = ThreadPoolExecutor(threads)

    def read(wanted: Set) -> float:
        buffers.reverse()
        ranges = []
        for expert, buffer in zip(wanted[1], buffers, strict=False):
            for file, extent in reader.locate(wanted[0], expert).parts:
                for start in range(0, extent.nbytes, request):
                    part = buffer[extent.at + start : extent.at + min(start + request, extent.nbytes)]
                    ranges.append((file, part, extent.offset + start))
        shares = [ranges[number::threads] for number in range(threads)]

        def work(share: list[tuple[MappedFile, object, int]]) -> None:
            for file, part, offset in share:
                file.read_into(part, offset)

        start = time.perf_counter()
        list(pool.map(work, shares))
        return time.perf_counter() - start

    return read


def measure(folder: Path, records: int, rounds: int) -> None:
    table = open_model(folder).records()
    reader = RecordReader(table)
    contenders = {"slots": fetching(SlotStore(reader, records)), "mapped": fetching(MappedStore(reader, records))}
    for threads in sorted({min(os.cpu_count() or IN_FLIGHT, IN_FLIGHT), IN_FLIGHT, 2 * IN_FLIGHT}):
        for request in (1 << 20, 2 << 20, table.max_stride):
            name = f"plain, {threads} threads, {request / (1 << 20):.3g} MiB"
            contenders[name] = plain(reader, records, threads, request)
    names = list(contenders)
    sets = sets_of(table, records)[: 6 * len(names)]
    if len(sets) < 3 * len(names):
        raise SystemExit(f"{folder} has too few records: slots would still hold what they read before")
    spent = {name: ([], [], []) for name in names}  # seconds of each set: cold, warm, once more
    without_end, rng = [], random.Random(0)
    files = open_files(table.files)
    for number in range(rounds):
        reader.evict(flush=True)
        turns = [name for _ in sets[:: len(names)] for name in rng.sample(names, len(names))]
        for times in range(3):
            for name, wanted in zip(turns, sets, strict=False):
                spent[name][times].append(contenders[name](wanted))
        if number % 5 == 0:
            raw = raw_speed(files, IN_FLIGHT, table.max_stride, 2.0)
            without_end.append((raw.cold, raw.warm))
    nbytes = records * table.max_stride
    speeds = {name: [nbytes / mean(seconds) / 1e9 for seconds in columns] for name, columns in spent.items()}
    best = [max(speed[times] for name, speed in speeds.items() if name.startswith("plain")) for times in range(3)]
    print(
        "| | cold GB/s | of the best | warm GB/s | of the best | once more GB/s | of the best |\n|---|---|---|---|---|---|---|"
    )
    for name, speed in speeds.items():
        print(
            f"| {name} | "
            + " | ".join(f"{mine:.2f} | {mine / other:.2f}" for mine, other in zip(speed, best, strict=True)),
            "|",
        )
    cold, warm = (median(column) / 1e9 for column in zip(*without_end, strict=True))
    print(f"| single records without a pause, {IN_FLIGHT} threads | {cold:.2f} | | {warm:.2f} | | | |")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--records", type=int, default=4, help="of a fetch")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--folder", type=Path, help="a packed checkpoint")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.folder
        if folder is None:
            folder = make(Path(scratch) / "model", argparse.Namespace(hidden=4096, layers=4, experts=96, bits=4))
        print(f"{datetime.date.today()}, {os.cpu_count()} cores, mlx {mx.__version__} on {mx.default_device()}, "
              f"{arguments.records} records a fetch, {arguments.rounds} rounds\n")  # fmt: skip
        measure(folder, arguments.records, arguments.rounds)


if __name__ == "__main__":
    main()
