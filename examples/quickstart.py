"""Load a model and ask it something.

python examples/quickstart.py [MODEL] ["a question"]
"""

import sys

from flash_moe import Model

path = sys.argv[1] if len(sys.argv) > 1 else "demo"
question = sys.argv[2] if len(sys.argv) > 2 else "How much memory do I need for Qwen3.5-397B?"

with Model.load(path) as model:  # a folder, "org/name" on the Hugging Face hub, or "demo"
    print(model)
    reply = model.generate(question, max_tokens=200)
    print(reply)
    stats = reply.stats
    print(f"{stats.generated_tokens_per_second:.1f} tok/s, {stats.hit_rate:.0%} of the expert bytes were in memory")
