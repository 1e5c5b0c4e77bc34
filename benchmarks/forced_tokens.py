"""Whether it pays to run forced tokens of tool calls through the network as one chunk.

    python benchmarks/forced_tokens.py [MODEL] [--cases 12] [--store resident]

The same replies, greedily, with chunks and token by token, in turn; seconds and passes of decoding alone.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from flash_moe import Model
from flash_moe.evaluation import read_tool_call_cases
from flash_moe.generation.sampling import Sampler

CALLS = Path(__file__).parent.parent / "models" / "eval" / "tool_calls.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--cases", type=int, default=12)
    parser.add_argument("--store", default="resident", choices=["resident", "slots", "mapped"])
    parser.add_argument("--experts-per-token", type=int)
    options = parser.parse_args()
    chunks = Sampler.forced
    seconds, passes, same, tokens = {True: 0.0, False: 0.0}, {True: 0, False: 0}, 0, 0
    with Model.load(options.model, expert_io=options.store, experts_per_token=options.experts_per_token) as model:
        forward = type(model._engine)._run
        counted: list[int] = []

        def counting(*arguments: Any) -> Any:
            counted.append(len(arguments[1]))
            return forward(*arguments)

        type(model._engine)._run = counting  # type: ignore[method-assign]
        cases = [case for case in read_tool_call_cases(CALLS) if case.calls][: options.cases]
        for number, case in enumerate(cases):
            replies = {}
            for together in (True, False) if number % 2 else (False, True):
                Sampler.forced = chunks if together else lambda self: []  # type: ignore[method-assign, assignment]
                prompt = model.encode(case.messages, tools=case.tools, enable_thinking=False)
                model.forget()
                stream = model.stream(prompt, tools=case.tools, strict_tools=True, temperature=0, max_tokens=200)
                reply = [next(stream).token]
                counted.clear()
                start = time.perf_counter()
                reply += [chunk.token for chunk in stream]
                seconds[together] += time.perf_counter() - start
                passes[together] += len(counted)
                replies[together] = reply
            same, tokens = same + (replies[True] == replies[False]), tokens + len(replies[True])
    print(
        f"{len(cases)} replies of {tokens} tokens, {same} the same both ways, {options.store}, K={options.experts_per_token}"
    )
    print(f"token by token: {passes[False]} passes, {seconds[False]:.2f} s")
    print(
        f"forced ones together: {passes[True]} passes, {seconds[True]:.2f} s, {seconds[True] / seconds[False]:.2f} of it"
    )


if __name__ == "__main__":
    main()
