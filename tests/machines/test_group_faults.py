"""Ranks of which one fails: never a wrong token, never a wait beyond the timeout, and right tokens afterwards."""

from __future__ import annotations

import json
import random
import signal
import time
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import faulty
import pytest
from ranks import Ranks

from flash_moe import Model

TIMEOUT = 3.0
PATIENT = 20.0  # where nothing gets stuck, but a busy machine may
KINDS = ("eio", "ctrl-c", "interrupt", "nan", "disagree")
OPTIONS = {"expert_io": "slots", "kernels": False}


class Expected:
    """The tokens of every round, by one process."""

    def __init__(self, model: Model) -> None:
        self._round = cache(partial(faulty.generate, model))

    def __getitem__(self, number: int) -> list[int]:
        return self._round(number)


@pytest.fixture(scope="module")
def expected(packed_checkpoint: Path) -> Iterator[Expected]:
    with Model.load(packed_checkpoint, **OPTIONS) as model:
        model.tokenizer.eos_token_ids = frozenset()
        yield Expected(model)


def run(
    folder: Path, checkpoint: Path, size: int, rounds: list[dict[str, Any]], timeout: float = PATIENT
) -> tuple[list[dict[str, Any]], Ranks]:
    """What rank 0 said of each round, and the ranks, which have ended or are killed."""
    folder.mkdir(exist_ok=True)
    plan = {"path": str(checkpoint), "timeout": timeout, "options": OPTIONS, "rounds": rounds}
    (folder / "plan.json").write_text(json.dumps(plan))
    with Ranks(folder, size, [faulty.__file__, str(folder / "plan.json")]) as ranks:
        ended_alone = [rank for rank in range(size) if rounds[-1]["kind"] != "stop" or rank != rounds[-1]["rank"]]
        deadline = time.monotonic() + 300 + len(rounds)
        while any(ranks.processes[rank].poll() is None for rank in ended_alone):
            assert time.monotonic() < deadline, ranks.said()
            time.sleep(0.02)
    said = [json.loads(line) for line in (folder / "0.out").read_text().splitlines()]
    return said, ranks


def check(said: list[dict[str, Any]], rounds: list[dict[str, Any]], expected: Expected, ranks: Ranks) -> None:
    """No wrong token, and what follows a fault that the group survives is right."""
    assert len(said) == len(rounds), ranks.said()
    assert [process.returncode for process in ranks.processes] == [0] * len(ranks.processes), ranks.said()
    for number, found in enumerate(said):
        assert found.get("tokens", expected[number]) == expected[number], found
        assert found["next"].get("tokens") == expected[number + 1], (found, ranks.said())
        assert found["seconds"] < PATIENT + 60, found
        if "error" in found and found["error"] != "KeyboardInterrupt":
            assert "layer" in found["message"] or "produced NaN logits" in found["message"], found
    kinds = {found["kind"] for found in said if "error" in found}
    assert kinds == {fault["kind"] for fault in rounds}, "each kind of fault must show at least once"


def random_rounds(rng: random.Random, count: int, size: int) -> list[dict[str, Any]]:
    rounds = []
    for number in range(count):
        kind = KINDS[number % len(KINDS)]
        rank = rng.randrange(size) if kind in ("eio", "nan", "disagree") else 0
        after = rng.randrange(60) if kind == "ctrl-c" else rng.randrange(1, 14)
        rounds.append({"kind": kind, "rank": rank, "after": after})
    return rounds


def test_faults_that_the_group_survives(packed_checkpoint: Path, expected: Expected, tmp_path: Path) -> None:
    rounds = random_rounds(random.Random(1), 15, 2)
    said, ranks = run(tmp_path, packed_checkpoint, 2, rounds)
    check(said, rounds, expected, ranks)
    eio = next(found for found in said if found["kind"] == "eio" and found["rank"] == 1 and "error" in found)
    assert eio["error"] == "PeerError"
    assert "rank 1: ExpertReadError" in eio["message"]
    assert "Input/output error" in eio["message"]
    assert all("chose different experts" in found["message"] for found in said if found["kind"] == "disagree")


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
def test_a_hundred_faults_that_the_group_survives(
    size: int, packed_checkpoint: Path, expected: Expected, tmp_path: Path
) -> None:
    rounds = random_rounds(random.Random(size), 100, size)
    said, ranks = run(tmp_path, packed_checkpoint, size, rounds)
    check(said, rounds, expected, ranks)


FATAL = [("stop", 1), *(pytest.param(kind, 1, marks=pytest.mark.slow) for kind in ("kill", "stuck", "ring"))]


@pytest.mark.parametrize(("kind", "rank"), FATAL)
def test_faults_that_end_the_group(kind: str, rank: int, packed_checkpoint: Path, tmp_path: Path) -> None:
    fatal(kind, rank, 2, 3, packed_checkpoint, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(24))
def test_faults_that_end_the_group_at_random(seed: int, packed_checkpoint: Path, tmp_path: Path) -> None:
    rng = random.Random(seed)
    size = rng.choice([2, 3])
    kind = ("kill", "stop", "stuck", "ring")[seed % 4]
    rank = rng.randrange(size)
    fatal(kind, rank, size, rng.randrange(1, 9), packed_checkpoint, tmp_path)


def fatal(kind: str, rank: int, size: int, after: int, checkpoint: Path, folder: Path) -> None:
    """The generation ends with an error that names rank, layer and cause; the other ranks end, too."""
    said, ranks = run(folder, checkpoint, size, [{"kind": kind, "rank": rank, "after": after}], TIMEOUT)
    codes = [process.returncode for process in ranks.processes]
    if rank == 0 and kind not in ("stuck", "ring"):
        assert said == []
        assert 0 not in codes, ranks.said()
        assert all("rank 0" in (folder / f"{other}.err").read_text() for other in range(1, size)), ranks.said()
        return
    (found,) = said
    assert found.get("error") == "PeerError", (found, ranks.said())
    cause = {"kill": "is gone", "stop": "has been silent", "stuck": "makes no progress", "ring": "the sum failed"}[kind]
    assert (cause if kind == "ring" else f"rank {rank} {cause}") in found["message"], found
    assert "layer" in found["message"], found
    assert found["seconds"] < TIMEOUT + 5, found
    assert codes[0] == 7, ranks.said()
    assert codes[rank] == (-signal.SIGKILL if kind in ("kill", "stop") else codes[rank])
    assert all(code not in (0, None) for code in codes), ranks.said()
