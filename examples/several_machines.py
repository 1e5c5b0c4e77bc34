"""One model on several machines, each with its share of the experts; docs/machines.md says how machines are named.

python examples/several_machines.py                                              # alone
mlx.launch -n 2 -- $(which python) examples/several_machines.py                  # two processes on this machine
"""

import sys

from flash_moe import Model

with Model.load("demo", group="auto", progress=False) as model:
    if model.follow():  # every rank but 0 computes here, until rank 0 closes its model
        sys.exit()
    reply = model.generate("Name a colour of the sky.", max_tokens=24, temperature=0)
    print(reply.text)
    print(f"rank {model.rank} fetched {model.expert_store.stats.bytes_requested / 1e6:.1f} MB of experts")
