"""What the ranks run in tests of faults: rank 0 generates, and in every round something goes wrong on some rank.

    faulty.py PLAN.json     {"path", "timeout", "expected", "rounds": [{"kind", "rank", "after"}, ...]}

A fault comes with the ``after``-th fetch of its rank in its round. Rank 0 prints a line of JSON for each round: what was
generated, right or not, or the error; then, unless the fault ends the group, whether the next generation is right.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from flash_moe import Model
from flash_moe.experts import reader
from flash_moe.experts.store import ExpertStore
from flash_moe.machines.ring import end_connections, host_addresses
from flash_moe.machines.sums import Sums

FATAL = ("kill", "stop", "stuck", "ring")
SECONDS_STUCK = 60


class Faults:
    """Lets what the current round says go wrong; rounds begin with what rank 0 writes to a file."""

    def __init__(self, file: Path, rank: int) -> None:
        self.file, self.rank = file, rank
        self.round: dict[str, Any] = {}
        self.left, self.failing = 0, False
        self.preadv, self.arrivals, self.add = os.preadv, ExpertStore._arrivals, Sums.add
        faults = self

        def arrivals(store: ExpertStore, *arguments: Any) -> Any:
            faults.fetch(store)
            return faults.arrivals(store, *arguments)

        def add(sums: Sums, part: mx.array, layer: int, chosen: np.ndarray) -> mx.array:
            kind = faults.round["kind"] if faults.failing else ""
            if kind == "nan":
                faults.failing, part = False, part * float("nan")
            elif kind == "disagree":
                faults.failing, chosen = False, chosen + 1
            return faults.add(sums, part, layer, chosen)

        os.preadv, ExpertStore._arrivals, Sums.add = self.read, arrivals, add

    def begin(self, kind: str = "none", rank: int = 0, after: int = 0) -> None:
        """Rank 0 begins a round."""
        other = self.file.with_suffix(".new")
        other.write_text(json.dumps({"kind": kind, "rank": rank, "after": after, "at": time.monotonic()}))
        other.replace(self.file)

    def fetch(self, store: ExpertStore) -> None:
        found = json.loads(self.file.read_text())
        if found != self.round:
            self.round, self.left, self.failing = found, found["after"], False
        if found["rank"] != self.rank:
            return
        self.left -= 1
        if self.left != 0:
            return
        self.failing = True
        if found["kind"] in ("eio", "stuck"):
            store._evict(False)  # so that this fetch reads
        match found["kind"]:
            case "interrupt":
                os.kill(os.getpid(), signal.SIGINT)
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            case "ring":  # the control connection stays
                end_connections(host_addresses())

    def read(self, fd: int, buffers: Any, offset: int) -> int:
        if self.failing and self.round["kind"] == "eio":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        if self.failing and self.round["kind"] == "stuck":
            time.sleep(SECONDS_STUCK)
        return self.preadv(fd, buffers, offset)


def prompt(number: int) -> list[int]:
    """Some begin like others, so that caches are continued and cut back."""
    return [10, 20, 30, 40, 50, 60][: 3 + number % 3] + [number % 7] * (number % 5)


def generate(model: Model, number: int) -> list[int]:
    return list(model.generate(prompt(number), max_tokens=4, temperature=0.0).tokens)


def later(seconds: float) -> threading.Timer:
    """Ctrl-C at any moment, in a pass or not."""
    timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    return timer


def attempt(model: Model, number: int, timer: threading.Timer | None = None) -> dict[str, Any]:
    start = time.monotonic()
    try:
        found: dict[str, Any] = {"tokens": generate(model, number)}
        while timer is not None:  # Ctrl-C comes within this block
            time.sleep(0.01)
    except BaseException as error:
        found = {"error": type(error).__name__, "message": str(error)}
    return found | {"seconds": time.monotonic() - start}


def main(file: Path) -> None:
    plan = json.loads(file.read_text())
    rank = int(os.environ["MLX_RANK"])
    reader.INLINE = 0  # small reads by threads, too, as large ones are
    faults = Faults(file.with_name("round.json"), rank)
    if rank == 0:
        faults.begin()
    model = Model.load(plan["path"], progress=False, group="auto", group_timeout=plan["timeout"], **plan["options"])
    if model.follow():
        return
    with model:
        model.tokenizer.eos_token_ids = frozenset()
        generate(model, 0)
        for number, fault in enumerate(plan["rounds"]):
            kind = fault["kind"]
            faults.begin(**fault)
            timer = later(fault["after"] / 1000) if kind == "ctrl-c" else None
            done = attempt(model, number, timer)
            if kind not in FATAL:
                faults.begin()
                done["next"] = attempt(model, number + 1)
            print(json.dumps({"round": number, **fault, **done}), flush=True)
            if kind in FATAL:
                sys.exit(7)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
