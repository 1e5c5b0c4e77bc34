"""What keeping a reply to its format costs per token, with a vocabulary as large as Qwen3.5's.

    python benchmarks/format_cost.py [--vocabulary 248320] [--replies 60]

The tokenizer is the demo model's with made-up merges. Its expected replies of models/eval are followed token by token, as a
model that never errs would write them; that a draw is refused, and a mask is needed, is measured by itself.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
from tokenizers import Tokenizer as Backend

from flash_moe.evaluation import read_tool_call_cases
from flash_moe.generation.sampling import Sampler, Sampling
from flash_moe.structured import Grammars, reply_grammar
from flash_moe.text import Tokenizer

ROOT = Path(__file__).parent.parent
DEMO, CALLS = ROOT / "models" / "demo", ROOT / "models" / "eval" / "tool_calls.jsonl"


def enlarged(size: int) -> Tokenizer:
    """The demo model's tokenizer with merges of random pairs of its tokens, up to 14 characters."""
    data, rng = json.loads((DEMO / "tokenizer.json").read_text()), random.Random(0)
    model, added = data["model"], {token["content"] for token in data["added_tokens"]}
    vocabulary = model["vocab"]
    texts = [text for text in vocabulary if text not in added]
    short, free = texts[:4000], 1 + max(*vocabulary.values(), *(token["id"] for token in data["added_tokens"]))
    while free < size:
        a, b = rng.choice(texts), rng.choice(short)
        if len(a + b) <= 14 and "Ġ" not in b and a + b not in vocabulary:
            vocabulary[a + b], free = free, free + 1
            model["merges"].append([a, b])
            texts.append(a + b)
    original = Tokenizer.load(DEMO)
    return Tokenizer(
        Backend.from_str(json.dumps(data)), eos_token_ids=original.eos_token_ids, chat_template=original.chat_template
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--vocabulary", type=int, default=248_320)
    parser.add_argument("--replies", type=int, default=60)
    options = parser.parse_args()
    tokenizer, size = enlarged(options.vocabulary), options.vocabulary
    tags = tokenizer.token_id("<tool_call>"), tokenizer.token_id("</tool_call>")
    assert tags[0] is not None and tags[1] is not None
    grammars, start = Grammars(tokenizer, size), time.perf_counter()
    grammars.constraint(reply_grammar([{"name": "f"}], "auto", "text", tags, None)).prepare()
    print(f"tables of {size:,} tokens: {time.perf_counter() - start:.1f} s, beside the prompt, once per model")

    cases = [case for case in read_tool_call_cases(CALLS) if case.calls and case.tools][: options.replies]
    compiling, asking, forcing, drawing, masking, forced, total = [], [], [], [], [], 0, 0
    rng = np.random.default_rng(0)
    for case in cases:
        start = time.perf_counter()
        grammar = reply_grammar(case.tools or (), "auto", "text", tags, None)
        grammars.constraint(grammar).prepare()
        compiling.append(time.perf_counter() - start)
        calls = [{"type": "function", "function": call} for call in case.calls]
        prompt = tokenizer.apply_chat_template(case.messages)
        message = {"role": "assistant", "content": "", "tool_calls": calls}
        whole = tokenizer.apply_chat_template([*case.messages, message], add_generation_prompt=False)
        tokens = tokenizer.encode(whole[len(prompt) :].removesuffix("<|im_end|>\n"))
        asked, looked = grammars.constraint(grammar), grammars.constraint(grammar)
        sampler = Sampler(Sampling(temperature=0.6, top_k=20, top_p=0.95), constraint=grammars.constraint(grammar))
        plain, skip = Sampler(Sampling(temperature=0.6, top_k=20, top_p=0.95)), 0
        for token in tokens:
            start = time.perf_counter()
            assert asked.allows(token)
            asked.accept(token)
            asking.append(time.perf_counter() - start)
            start = time.perf_counter()
            following = asked.forced()
            forcing.append(time.perf_counter() - start)
            total += 1
            forced += skip > 0
            skip = max(skip - 1, 0) or len(following)
            logits = rng.standard_normal(size, dtype=np.float32)
            logits[token] = 40
            ours, theirs = mx.array(logits), mx.array(logits)
            mx.eval(ours, theirs)
            start = time.perf_counter()
            plain(theirs)
            between = time.perf_counter()
            assert sampler(ours) == token
            drawing.append(time.perf_counter() - between - (between - start))
            start = time.perf_counter()
            looked.allowed()
            masking.append(time.perf_counter() - start)
            looked.accept(token)

    def line(name: str, seconds: list[float]) -> str:
        ordered = sorted(seconds)
        mean, median, high = statistics.mean(ordered), ordered[len(ordered) // 2], ordered[int(0.99 * len(ordered))]
        return f"{name}: mean {1e6 * mean:.0f} µs, median {1e6 * median:.0f} µs, 99% below {1e6 * high:.0f} µs"

    print(f"{len(cases)} replies, {total:,} tokens, of which the grammar forces {forced / total:.0%}")
    print(line("compiling a grammar, beside the prompt", compiling))
    print(line("asking about a token that is taken (greedy, or no filter)", asking))
    print(line("looking for forced tokens", forcing))
    print(line("drawing with top_k=20, top_p=0.95, beyond what a free draw takes, unlikely tokens at random", drawing))
    print(line("a mask of all tokens, needed where a draw is refused", masking))


if __name__ == "__main__":
    main()
