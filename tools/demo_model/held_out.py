"""Writes the demo model's held-out data, made of names and wordings that training never sees.

    PYTHONPATH=tools python -m demo_model.held_out models/eval

`tool_calls.jsonl`: 500 prompts, each with the calls that are right (none where no tool fits).
`conversations.jsonl`: 300 conversations of all kinds, for perplexity.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from random import Random
from typing import Any

from .data import conversation
from .data.splits import HELD_OUT
from .data.tool_calls import decision

PROMPTS, CONVERSATIONS = 500, 300


def tool_call_prompts(count: int = PROMPTS, seed: int = 0) -> list[dict[str, Any]]:
    """Prompts that end with the user's message, different from each other.

    Returns:
        Each `{"messages", "tools", "calls": [{"name", "arguments"}]}`.
    """
    rng = Random(f"tool calls/{seed}")
    prompts: dict[str, dict[str, Any]] = {}
    while len(prompts) < count:
        prompt, calls = decision(rng)
        prompts.setdefault(prompt["messages"][-1]["content"], prompt | {"calls": calls})
    return list(prompts.values())


def conversations(count: int = CONVERSATIONS, seed: int = 0) -> list[dict[str, Any]]:
    """Held-out conversations of all kinds."""
    rng = Random(f"conversations/{seed}")
    return [conversation(rng, HELD_OUT) for _ in range(count)]


def _write(file: Path, rows: Iterable[dict[str, Any]]) -> None:
    lines = [json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n" for row in rows]
    file.write_text("".join(lines), encoding="utf-8")
    print(f"{file}: {len(lines)} lines, {file.stat().st_size:,} bytes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    _write(options.folder / "tool_calls.jsonl", tool_call_prompts(seed=options.seed))
    _write(options.folder / "conversations.jsonl", conversations(seed=options.seed))


if __name__ == "__main__":
    main()
