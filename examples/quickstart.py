"""Load a model and ask it something.

python examples/quickstart.py MODEL ["a question"]
"""

import sys

from flash_moe import Model

path = sys.argv[1]
question = sys.argv[2] if len(sys.argv) > 2 else "Why is the sky blue?"

with Model.load(path) as model:  # a folder, or "org/name" on the Hugging Face hub
    print(model)
    reply = model.generate(question, max_tokens=200)
    print(reply)
    stats = reply.stats
    print(f"{stats.generated_tokens_per_second:.1f} tok/s, {stats.hit_rate:.0%} of the expert bytes were in memory")
