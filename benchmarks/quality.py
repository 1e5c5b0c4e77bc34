"""What bits and K cost in quality, on a small float checkpoint such as that of tools/demo_model.

    python benchmarks/quality.py MASTER FOLDER [--texts 300] [--cases 500] [--fewer-cases 250] [--k 10 4 6 2] [--processes 2]

Every recipe is made from the float checkpoint MASTER and measured at every K: perplexity and divergence (from the
master at its own K) on the replies in held-out conversations, tool calls by greedy decoding. FOLDER keeps the recipes,
the text they are calibrated on, which is drawn from what the demo model is trained on, and the results: the same
command continues what was interrupted, and prints the table of what is there.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tools"))
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # processes are parallel already

import mlx.core as mx  # noqa: E402
import numpy as np  # noqa: E402
from demo_model.data import conversation  # noqa: E402
from demo_model.data.splits import TRAIN  # noqa: E402
from quality_table import summary, table  # noqa: E402

from flash_moe import Model  # noqa: E402
from flash_moe.evaluation import (  # noqa: E402
    LayerwiseModel,
    calibration_tokens,
    divergence,
    greedy,
    perplexity,
    read_sequences,
    read_tool_call_cases,
    token_scores,
    tool_call_score,
)
from flash_moe.packing.convert import convert  # noqa: E402
from flash_moe.packing.info import describe  # noqa: E402
from flash_moe.text import Tokenizer  # noqa: E402

CHATS, CALLS = (ROOT / "models" / "eval" / name for name in ("conversations.jsonl", "tool_calls.jsonl"))
OWN_K = 10  # of the demo model
KS = (OWN_K, 4, 6, 2)  # what is wanted first comes first
MAX_TOKENS = 160  # the longest call of the cases has fewer
CALIBRATION, CALIBRATION_SEED = 400, 0  # conversations


@dataclass(frozen=True)
class Recipe:
    """How a checkpoint is made.

    Attributes:
        source: the recipe it is made from; None for the master.
        options: of convert.
        calibrated: whether experts are quantised for the calibration text.
    """

    source: str | None = None
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    calibrated: bool = False


FLOAT, NAIVE = "float (bf16)", "2 bits, naive, from 4 bits"
RECIPES = {
    FLOAT: Recipe(),
    "8 bits": Recipe(FLOAT, {"bits": 8}),
    "4 bits": Recipe(FLOAT, {"bits": 4}),
    "3 bits": Recipe(FLOAT, {"bits": 3}),
    NAIVE: Recipe("4 bits", {"bits": 2, "rounding": "nearest"}),
    "2 bits, naive, from float": Recipe(FLOAT, {"bits": 2, "rounding": "nearest"}),
    "2 bits, calibrated, rest 8": Recipe(FLOAT, {"bits": 8, "expert_bits": 2}, calibrated=True),
    "2 bits, calibrated, rest 4": Recipe(FLOAT, {"bits": 4, "expert_bits": 2}, calibrated=True),
    "2 bits, search, rest 8": Recipe(FLOAT, {"bits": 8, "expert_bits": 2}),
}


@dataclass(frozen=True)
class Remembered(LayerwiseModel):
    """A checkpoint whose hidden states of the only texts it is asked for lie in a file, [all tokens, H] float32."""

    states: Path = Path()

    def final_states(self, sequences: Sequence[Sequence[int]], progress: Any = None) -> list[mx.array]:
        ends = np.cumsum([len(tokens) for tokens in sequences])
        return [mx.array(part) for part in np.split(np.load(self.states), ends[:-1])]


@dataclass(frozen=True)
class Task:
    """One cell of the table: a recipe's checkpoint at one K, against the master and what it says of the texts."""

    recipe: str
    checkpoint: Path
    k: int
    master: Path
    states: Path
    texts: int
    cases: int


def remember(master: Path, file: Path, texts: int) -> None:
    """Writes what the master at its own K makes of the held-out conversations, once for all cells."""
    if file.exists():
        return
    model = LayerwiseModel.open(master, experts_per_token=None)
    states = model.final_states([sequence.tokens for sequence in read_sequences(CHATS, model.tokenizer, limit=texts)])
    partial = file.with_name(f"partial-{file.name}")
    np.save(partial, np.concatenate([np.array(state.astype(mx.float32)) for state in states]))
    partial.replace(file)


def write_calibration(master: Path, file: Path) -> list[list[int]]:
    """Writes conversations of the kind that the demo model is trained on; returns their tokens."""
    rng = Random(f"calibration/{CALIBRATION_SEED}")
    file.write_text("".join(json.dumps(conversation(rng, TRAIN)) + "\n" for _ in range(CALIBRATION)))
    return calibration_tokens(file, Tokenizer.load(master), sys.maxsize)


def make(name: str, source: Path, place: Path, tokens: list[list[int]]) -> None:
    """Makes one recipe, unless it is there."""
    if place.exists():
        return
    start, recipe = time.monotonic(), RECIPES[name]
    convert(source, place, calibration=tokens if recipe.calibrated else None, **recipe.options)
    print(f"made {name!r} in {time.monotonic() - start:.0f} s", flush=True)


def prepare(pool: Any, master: Path, folder: Path, states: Path, texts: int) -> dict[str, Path]:
    """Makes the recipes and the reference's states, as far as they are missing; returns where the recipes are."""
    tokens = write_calibration(master, folder / "calibration.jsonl")
    places = {name: folder / name.replace(",", "").replace(" ", "-") for name in RECIPES} | {FLOAT: master}
    waiting = [pool.apply_async(remember, (master, states, texts))]
    for first in (True, False):  # what is made from the master, then what is made from that
        for name, recipe in RECIPES.items():
            if recipe.source is not None and (recipe.source == FLOAT) is first:
                waiting.append(pool.apply_async(make, (name, places[recipe.source], places[name], tokens)))
        while waiting:
            waiting.pop().get()
    return places


def measure(task: Task) -> dict[str, Any]:
    """One cell."""
    start = time.monotonic()
    model = LayerwiseModel.open(task.checkpoint, experts_per_token=task.k)
    reference = Remembered.open(task.master, experts_per_token=None, states=task.states)
    scores = token_scores(model, read_sequences(CHATS, model.tokenizer, limit=task.texts), reference)
    scored = time.monotonic()
    with Model.load(task.checkpoint, experts_per_token=task.k, expert_io="resident") as loaded:
        calls = tool_call_score(read_tool_call_cases(CALLS, task.cases), greedy(loaded, MAX_TOKENS, False))
    info, replies = describe(task.checkpoint, task.k), scores.of_assistant()
    assert replies is not None, f"no reply in {CHATS}"
    return {
        "recipe": task.recipe,
        "k": task.k,
        "bits_per_weight": info.bits_per_weight,
        "bytes_per_token": info.bytes_per_token,
        "perplexity": dataclasses.asdict(perplexity(replies)),
        "divergence": dataclasses.asdict(divergence(replies)),
        "divergence_everywhere": dataclasses.asdict(divergence(scores)),
        "tool_calls": dataclasses.asdict(calls),
        "seconds": {"texts": scored - start, "tool_calls": time.monotonic() - scored},
    }


def begin(master: Path, folder: Path, texts: int, cases: dict[int, int]) -> None:
    """Makes ``folder`` for results of this checkpoint, or checks that it is."""
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted(filter(Path.is_file, master.iterdir())):
        digest.update(file.read_bytes())
    run = {"master": digest.hexdigest(), "texts": texts, "cases": {str(k): count for k, count in cases.items()}}
    folder.mkdir(parents=True, exist_ok=True)
    described = folder / "run.json"
    if not described.exists():
        described.write_text(json.dumps(run))
    if (found := json.loads(described.read_text())) != run:
        raise SystemExit(f"{folder} holds results of {found}, expected {run}; name another folder")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("master", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--texts", type=int, default=300, help="conversations per cell")
    parser.add_argument("--k", type=int, nargs="+", default=KS, choices=KS, help="measure these K, in this order")
    parser.add_argument("--cases", type=int, default=500, help="tool-call prompts per cell at the master's own K")
    parser.add_argument("--fewer-cases", type=int, default=250, help="the same at other K")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    master, folder = options.master, options.folder
    cases = dict.fromkeys(KS, options.fewer_cases) | {OWN_K: options.cases}
    begin(master, folder, options.texts, cases)
    file, states, start = folder / "results.jsonl", folder / "reference.npy", time.monotonic()
    results = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    done = {(r["recipe"], r["k"]) for r in results}
    cells = [(name, k) for k in options.k for name in RECIPES if (name, k) not in done]
    with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
        places = prepare(pool, master, folder, states, options.texts)
        print(f"the recipes and the reference are there after {time.monotonic() - start:.0f} s", flush=True)
        tasks = [Task(name, places[name], k, master, states, options.texts, cases[k]) for name, k in cells]
        for count, result in enumerate(pool.imap_unordered(measure, tasks), start=1):
            results.append(result)
            with file.open("a") as stream:
                stream.write(json.dumps(result) + "\n")
            parts = ", ".join(
                f"{part.replace('_', ' ')} {seconds:.0f} s" for part, seconds in result["seconds"].items()
            )
            print(
                f"{count} of {len(tasks)} cells, {(time.monotonic() - start) / 60:.1f} minutes: "
                f"{result['recipe']}, K={result['k']} ({parts})",
                flush=True,
            )
    command = (
        f"python benchmarks/quality.py {master} {folder} --texts {options.texts} --cases {options.cases} "
        f"--fewer-cases {options.fewer_cases}"
    )
    print(f"\n`{command}`\n\n{table(results, list(RECIPES))}\n\n{summary(results, FLOAT, NAIVE)}")


if __name__ == "__main__":
    main()
