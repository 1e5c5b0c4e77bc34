"""What several prompts gain from running together, against one after the other, in turns.

python benchmarks/together.py [MODEL] [--prompts 8] [--tokens 48] [--rounds 3] [--kernels on|off|auto] [--io auto] [--profile]

The prompts are questions about one text: the same task. Replies are greedy and of a given length; where they differ, it
says so. The rate is that of all generated tokens over all seconds, prompts included.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import statistics
import time

from flash_moe import Generation, Model

TEXT = (
    "A model of experts keeps most of its weights on the disk. For every token a router chooses a few experts of each layer, "
    "and only those are read. What was read before is often still in memory, in the page cache of the system. "
)
ASKED = (
    "Where do most weights lie?", "What chooses the experts?", "When are experts read?", "What is a page cache?",
    "How many experts does a token use?", "Why can the model be larger than memory?", "What does a router do?",
    "Which part of the text is about memory?",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kernels", choices=("on", "off", "auto"), default="auto")
    parser.add_argument("--io", default="auto")
    parser.add_argument("--profile", action="store_true", help="say where the time of a batch goes")
    options = parser.parse_args()
    kernels = {"on": True, "off": False, "auto": None}[options.kernels]
    prompts = [f"{TEXT}\n\n{ASKED[i % len(ASKED)]}" for i in range(options.prompts)]
    with Model.load(options.model, expert_io=options.io, kernels=kernels) as model:
        model.tokenizer.eos_token_ids = frozenset()
        sampling = {"max_tokens": options.tokens, "temperature": 0, "enable_thinking": False, "progress": False}

        def alone() -> list[Generation]:
            return [model.generate(prompt, **sampling) for prompt in prompts]

        def together() -> list[Generation]:
            return model.generate(prompts, **sampling)

        model.generate(prompts[0], max_tokens=2)
        rates: dict[str, list[float]] = {"alone": [], "together": []}
        tokens: dict[str, list[tuple[int, ...]]] = {}
        for _ in range(options.rounds):
            for name, work in (("alone", alone), ("together", together)):
                model.forget()
                start = time.perf_counter()
                replies = work()
                rates[name].append(sum(len(r.tokens) for r in replies) / (time.perf_counter() - start))
                tokens[name] = [reply.tokens for reply in replies]
                decoding = statistics.mean(r.stats.decode_seconds for r in replies)
                prompt = statistics.mean(r.stats.prompt_seconds for r in replies)
                print(
                    f"{name}: {rates[name][-1]:.1f} tok/s; a reply's prompt {prompt:.3f} s, decoding {decoding:.3f} s"
                )
        same = sum(a == b for a, b in zip(tokens["alone"], tokens["together"], strict=True))
        gain = statistics.median(b / a for a, b in zip(rates["alone"], rates["together"], strict=True))
        print(f"{options.prompts} prompts together: {gain:.2f} times the tokens per second; {same} replies the same")
        if options.profile:
            model.forget()
            with cProfile.Profile() as profile:
                together()
            pstats.Stats(profile).sort_stats("tottime").print_stats(35)


if __name__ == "__main__":
    main()
