"""What bits and K cost in quality, on a small float checkpoint such as that of tools/demo_model.

    python benchmarks/quality.py MASTER RESULTS.jsonl [--cases 500] [--processes 2]

Every recipe is made from the float checkpoint MASTER and measured at every K: perplexity and divergence (from the master at the
model's own K) on held-out conversations, tool calls by greedy decoding. Results are appended to RESULTS.jsonl as they
come; what is there already is not measured again. Prints the table.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import multiprocessing
import platform
import tempfile
from pathlib import Path
from typing import Any

MODELS = Path(__file__).parent.parent / "models"
CHATS, CALLS = MODELS / "eval" / "conversations.jsonl", MODELS / "eval" / "tool_calls.jsonl"
KS = (10, 6, 4, 2)
MAX_TOKENS = 160  # the longest call of the cases has fewer

# Recipe: what it is made from, and the options of convert.
RECIPES: dict[str, tuple[str, dict[str, Any]] | None] = {
    "float (bf16)": None,
    "8 bits": ("float (bf16)", {"bits": 8}),
    "4 bits": ("float (bf16)", {"bits": 4}),
    "3 bits": ("float (bf16)", {"bits": 3}),
    "2 bits, naive, from 4 bits": ("4 bits", {"bits": 2}),
    "2 bits, naive, from float": ("float (bf16)", {"bits": 2}),
}


def make(master: Path, folder: Path) -> dict[str, Path]:
    """Makes all recipes in ``folder``; returns where each is."""
    from flash_moe.packing.convert import convert

    places = {}
    for number, (name, recipe) in enumerate(RECIPES.items()):
        if recipe is None:
            places[name] = master
            continue
        source, options = recipe
        places[name] = folder / str(number)
        convert(places[source], places[name], **options)
    return places


def measure(task: tuple[str, Path, int, Path, int]) -> dict[str, Any]:
    """One recipe at one K."""
    from flash_moe import Model
    from flash_moe.evaluation import (
        LayerwiseModel,
        divergence,
        greedy,
        perplexity,
        read_sequences,
        read_tool_call_cases,
        token_scores,
        tool_call_score,
    )
    from flash_moe.packing.info import describe

    name, folder, k, master, cases = task
    model, reference = (LayerwiseModel.open(path, experts_per_token=n) for path, n in ((folder, k), (master, None)))
    scores = token_scores(model, read_sequences(CHATS, model.tokenizer), reference)
    with Model.load(folder, experts_per_token=k, expert_io="resident") as loaded:
        calls = tool_call_score(read_tool_call_cases(CALLS, cases), greedy(loaded, MAX_TOKENS, False))
    return {
        "recipe": name,
        "k": k,
        "bytes_per_token": describe(folder, k).bytes_per_token,
        "perplexity": dataclasses.asdict(perplexity(scores)),
        "divergence": dataclasses.asdict(divergence(scores)),
        "tool_calls": dataclasses.asdict(calls),
    }


def table(results: list[dict[str, Any]]) -> str:
    """The results as Markdown, in the order of recipes and K."""

    def percent(estimate: dict[str, float]) -> str:
        return f"{100 * estimate['value']:.1f} ± {100 * estimate['standard_error']:.1f}"

    lines = [
        "| experts | K | kB per token | perplexity | KL, 10⁻³ nats | same top token, % | calls parse, % | calls right, % |",
        "|---|---|---|---|---|---|---|---|",
    ]
    found = {(r["recipe"], r["k"]): r for r in results}
    for name, k in ((name, k) for name in RECIPES for k in KS if (name, k) in found):
        r = found[name, k]
        kl, ppl = r["divergence"]["kl"], r["perplexity"]["perplexity"]
        lines.append(
            f"| {name} | {k} | {r['bytes_per_token'] / 1000:.0f} | {ppl['value']:.3f} | "
            f"{1000 * kl['value']:.1f} ± {1000 * kl['standard_error']:.1f} | {percent(r['divergence']['same_top'])} | "
            f"{percent(r['tool_calls']['parsed'])} | {percent(r['tool_calls']['right'])} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("master", type=Path)
    parser.add_argument("results", type=Path)
    parser.add_argument("--cases", type=int, default=500)
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    results = (
        [json.loads(line) for line in arguments.results.read_text().splitlines()] if arguments.results.exists() else []
    )
    done = {(r["recipe"], r["k"]) for r in results}
    with tempfile.TemporaryDirectory() as folder:
        places = make(arguments.master, Path(folder))
        tasks = [
            (name, places[name], k, arguments.master, arguments.cases)
            for name in RECIPES
            for k in KS
            if (name, k) not in done
        ]
        with multiprocessing.get_context("spawn").Pool(arguments.processes) as pool:
            for result in pool.imap(measure, tasks):
                results.append(result)
                with arguments.results.open("a") as file:
                    file.write(json.dumps(result) + "\n")
                print(f"{result['recipe']}, K={result['k']}: done", flush=True)
    print(f"\n{datetime.date.today()}, {platform.machine()}, {arguments.cases} tool-call cases\n\n{table(results)}")


if __name__ == "__main__":
    main()
