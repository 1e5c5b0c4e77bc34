"""Greedy answers of a trained model to tool-call prompts, and the share that is right.

    PYTHONPATH=tools python -m demo_model.sample EXPORT models/eval/tool_calls.jsonl
    PYTHONPATH=tools python -m demo_model.sample RUN/checkpoint.pt models/eval/tool_calls.jsonl --tokenizer FOLDER

Each line of the file holds "messages", "tools" and the expected "calls" (none when no tool fits). Without a KV cache:
every token runs the whole batch again, which is simple, right for recurrent layers, and on a large GPU fast enough.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from .delta_rule import CHUNK
from .export import load
from .network import Network
from .tool_calls import right

TOGETHER = 131072  # places of a forward pass


@torch.no_grad()
def greedy(
    network: Network, prompts: list[list[int]], stop: int, new: int, top_k: int | None, device: str
) -> list[list[int]]:
    """The tokens that follow each prompt: at most ``new``, without the ``stop`` token."""
    sequences = [list(prompt) for prompt in prompts]
    going = list(range(len(prompts)))
    for _ in range(new):
        going.sort(key=lambda i: len(sequences[i]))
        tokens = torch.cat(
            [_next(network, [sequences[i] for i in rows], top_k, device) for rows in _groups(going, sequences)]
        )
        for i, token in zip(going, tokens.tolist(), strict=True):
            sequences[i].append(token)
        going = [i for i in going if sequences[i][-1] != stop]
        if not going:
            break
    answers = (sequence[len(prompt) :] for sequence, prompt in zip(sequences, prompts, strict=True))
    return [answer[:-1] if answer and answer[-1] == stop else answer for answer in answers]


def _groups(order: list[int], sequences: list[list[int]]) -> list[list[int]]:
    """``order``, which goes from short to long, cut where a padded group would exceed ``TOGETHER`` places."""
    groups: list[list[int]] = [[]]
    for i in order:
        if (len(groups[-1]) + 1) * _padded(len(sequences[i])) > TOGETHER and groups[-1]:
            groups.append([])
        groups[-1].append(i)
    return groups


def _next(network: Network, rows: list[list[int]], top_k: int | None, device: str) -> Tensor:
    """The most probable token [rows] after each row."""
    ids = torch.zeros(len(rows), _padded(max(map(len, rows))), dtype=torch.int64)
    for place, row in zip(ids, rows, strict=True):
        place[: len(row)] = torch.tensor(row)
    last = torch.tensor([len(row) - 1 for row in rows])
    return network.logits(ids.to(device), top_k, at=last.to(device)).argmax(-1).cpu()


def _padded(length: int) -> int:
    return -(-length // CHUNK) * CHUNK


def load_cases(file: Path, limit: int | None = None) -> list[dict[str, Any]]:
    """The first ``limit`` prompts of a file, or all of them, each with "messages", "tools" and "calls"."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()][:limit]


class Answerer:
    """A trained model with its tokenizer.

    Args:
        model: checkpoint.pt or an exported folder.
        tokenizer: folder of the tokenizer's files.
    """

    def __init__(self, model: Path, tokenizer: Path, device: str) -> None:
        self.tokenizer: Any = AutoTokenizer.from_pretrained(tokenizer)
        self.network = Network(load(model).to(device), torch.bfloat16 if device == "cuda" else torch.float32)
        self.device = device

    def answers(self, cases: list[dict[str, Any]], new: int, top_k: int | None = None) -> list[str]:
        """What the model says to each prompt, at most ``new`` tokens, with ``top_k`` experts per token (None: its own)."""
        texts = [
            self.tokenizer.apply_chat_template(
                case["messages"], tools=case["tools"], add_generation_prompt=True, tokenize=False
            )
            for case in cases
        ]
        prompts = [self.tokenizer.encode(text, add_special_tokens=False) for text in texts]
        answers = greedy(self.network, prompts, self.tokenizer.eos_token_id, new, top_k, self.device)
        return [self.tokenizer.decode(answer, skip_special_tokens=False) for answer in answers]


def wrong(cases: list[dict[str, Any]], answers: list[str]) -> list[int]:
    """Places of the answers that do not make exactly the expected calls."""
    pairs = enumerate(zip(cases, answers, strict=True))
    return [i for i, (case, said) in pairs if not right(said, case["tools"] or [], case["calls"])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="an exported folder, or checkpoint.pt")
    parser.add_argument("prompts", type=Path)
    parser.add_argument("--tokenizer", type=Path, help="folder (default: the exported one)")
    parser.add_argument("--limit", type=int, help="only the first prompts")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--experts-per-token", type=int, nargs="*", default=[10], help="score each of these K")
    parser.add_argument("--show", type=int, default=5, help="wrong answers to print for the first K")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    if not options.tokenizer and not options.model.is_dir():
        parser.error(f"{options.model} is no folder with a tokenizer in it; name one with --tokenizer")
    answerer = Answerer(options.model, options.tokenizer or options.model, options.device)
    cases = load_cases(options.prompts, options.limit)
    for k in options.experts_per_token:
        answers = answerer.answers(cases, options.max_tokens, k)
        failed = wrong(cases, answers)
        for i in failed[: options.show] if k == options.experts_per_token[0] else []:
            asked, expected = cases[i]["messages"][-1]["content"], json.dumps(cases[i]["calls"])
            print(f"asked: {asked}\nexpected: {expected}\nsaid: {answers[i]}\n")
        good = len(cases) - len(failed)
        print(f"K={k}: {good} of {len(cases)} right, {good / len(cases):.1%}", flush=True)


if __name__ == "__main__":
    main()
