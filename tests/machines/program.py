"""What the ranks of a group run in tests: cases one after the other, each a model and what is generated with it.

program.py CASES.json      every rank runs it; rank N writes what it found to CASES.json.N
"""

from __future__ import annotations

import json
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from flash_moe import ArgumentError, FlashMoEError, Model

VOCABULARY = 256
TIMEOUT = 120  # seconds: a busy machine is slow, and nothing is meant to get stuck here


def prompt(length: int) -> list[int]:
    return np.random.default_rng(length).integers(0, VOCABULARY, length).tolist()


def greedy(model: Model, tokens: list[int], count: int = 8, **options: Any) -> list[int]:
    return list(model.generate(tokens, max_tokens=count, **({"temperature": 0.0} | options)).tokens)


def interleaved(model: Model) -> list[list[int]]:
    """Two streams, a token of each in turn; a third is left early."""
    next(iter(left := model.stream(prompt(5), max_tokens=5, temperature=0.0)))
    streams = [model.stream(prompt(n), max_tokens=6, temperature=0.0) for n in (6, 9)]
    found: list[list[int]] = [[], []]
    for chunks in zip(*streams, strict=True):
        for tokens, chunk in zip(found, chunks, strict=True):
            tokens.append(chunk.token)
    left.close()
    return found


def threads(model: Model) -> list[list[int]]:
    found: dict[int, list[int]] = {}

    def generate(n: int) -> None:
        found[n] = greedy(model, prompt(n), 6)

    running = [threading.Thread(target=generate, args=(n,)) for n in (11, 12, 13)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    return [found[n] for n in sorted(found)]


def continued(model: Model) -> list[list[int]]:
    """A prompt that goes on behind a reply, one that parts from it, and the first again."""
    start = prompt(30)
    reply = greedy(model, start, 5)
    longer, other = [*start, *reply, 7, 8, 9], [*start[:25], 1, 2, 3]
    return [reply, *(greedy(model, tokens, 5) for tokens in (longer, other, start, longer))]


def together(model: Model) -> list[list[int]]:
    replies = model.generate([prompt(n) for n in (4, 8)], max_tokens=5, temperature=0.0)
    return [list(reply.tokens) for reply in replies]


def saved(model: Model) -> list[list[int]]:
    """A conversation, and its copy out of a file, go on alike."""
    chat = model.chat(max_tokens=4, temperature=0.0)
    replies = [chat.send("Hello")]
    with tempfile.TemporaryDirectory() as folder:
        chat.save(Path(folder) / "talk")
        opened = model.open_chat(Path(folder) / "talk")
    replies += [chat.send("More"), opened.send("More")]
    return [list(reply.tokens) for reply in replies]


WORK = {"interleaved": interleaved, "threads": threads, "continued": continued, "together": together, "saved": saved}


def refused(case: dict[str, Any], rank: int, group: mx.distributed.Group) -> dict[str, Any]:
    """The error of a case that cannot be loaded; arguments differ by rank."""
    path, options = case["refused"][rank]
    try:
        Model.load(path, progress=False, group=group, **options)
    except FlashMoEError as error:
        return {"error": type(error).__name__, "message": str(error)}
    return {"error": "none"}


def run(case: dict[str, Any], rank: int, group: mx.distributed.Group | None) -> dict[str, Any]:
    """What one case gives; ranks that follow only count."""
    if group is not None and "refused" in case:
        return refused(case, rank, group)
    path = case["path"].format(rank=rank)
    with Model.load(path, progress=False, group=group, group_timeout=TIMEOUT, **case["options"]) as model:
        store, found = model.expert_store, {"rank": model.rank}
        if model.rank:
            found["alone"] = ""
            for tokens in ("text", [1, 2, 3]):
                try:
                    model.generate(tokens, max_tokens=1)
                except ArgumentError as error:
                    found["alone"] += str(error)
        if not model.follow():
            model.tokenizer.eos_token_ids = frozenset()
            found["greedy"] = [greedy(model, prompt(n)) for n in case["prompts"]]
            found["sampled"] = greedy(model, prompt(20), temperature=1.0, seed=3)
            found["logits"] = np.array(model.logits(prompt(20))).tolist()
            for name in case["work"]:
                found[name] = WORK[name](model)
        found["bytes_requested"] = store.stats.bytes_requested
        found["bytes_loaded"] = store.stats.bytes_loaded
    return found


def main(file: Path) -> None:
    sys.modules["torch"] = None  # type: ignore[assignment]  # transformers would import it: 2 s in every rank
    group = mx.distributed.init()
    cases = json.loads(file.read_text())
    found = {}
    for name, case in cases.items():
        start = time.monotonic()
        found[name] = run(case, group.rank(), group)
        print(f"{name}: {time.monotonic() - start:.2f} s", flush=True)
    file.with_name(f"{file.name}.{group.rank()}").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
