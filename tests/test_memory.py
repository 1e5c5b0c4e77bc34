"""Memory does not grow with the number of tokens, beyond the KV cache."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TOKENS = 1000
LIMIT = 10_000_000

SCRIPT = """
import gc, resource, sys
from pathlib import Path
from flash_moe import Model

def resident():
    gc.collect()
    status = Path("/proc/self/statm")
    if status.exists():
        return int(status.read_text().split()[1]) * resource.getpagesize()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS: bytes, and only ever growing

caches = []
with Model.load(sys.argv[1], experts_per_token=None, expert_io=sys.argv[2]) as model:
    model.tokenizer.eos_token_ids = frozenset()
    new_cache = model._decoder.new_cache
    model._prefixes._new_cache = lambda: caches.append(new_cache()) or caches[-1]
    stream = model.stream([1, 2, 3], max_tokens=int(sys.argv[3]) + 100, temperature=0)
    for _ in range(100):
        next(stream)
    before, cache_before = resident(), caches[-1].nbytes
    for chunk in stream:
        pass
    print(resident() - before - (caches[-1].nbytes - cache_before))
    assert chunk.stats.generated_tokens == int(sys.argv[3]) + 100
"""


@pytest.mark.parametrize(
    ("expert_io", "kernels"),
    [
        ("slots", "on"),
        *(
            pytest.param(io, kernels, marks=pytest.mark.slow)
            for io in ("mapped", "resident", "slots")
            for kernels in ("off", "on")
            if (io, kernels) != ("slots", "on")
        ),
    ],
)
def test_a_thousand_tokens_do_not_grow_memory(expert_io: str, kernels: str, packed_checkpoint: Path) -> None:
    command = [sys.executable, "-c", SCRIPT, str(packed_checkpoint), expert_io, str(TOKENS)]
    environment = os.environ | {"FLASH_MOE_KERNELS": kernels}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < LIMIT
