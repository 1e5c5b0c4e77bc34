"""Show a reply while it is written, with the model's own number of experts per token.

python examples/streaming.py [MODEL] ["a question"]
"""

import sys

from flash_moe import Model

path = sys.argv[1] if len(sys.argv) > 1 else "demo"
question = sys.argv[2] if len(sys.argv) > 2 else "What is the page cache?"
messages = [
    {"role": "system", "content": "Answer in two sentences."},
    {"role": "user", "content": question},
]

with Model.load(path, experts_per_token=None) as model:
    for chunk in model.stream(messages, max_tokens=200, temperature=0.7, seed=1, stop="\n\n"):
        print(chunk.text, end="", flush=True)
    print(f"\n[{chunk.finish_reason}; first token after {chunk.stats.time_to_first_token:.2f} s]")
