"""Every way of streaming against the resident store, on the GPU that is there: the same bits, the same tokens.

    python tools/same_bits.py [--kernels on off] [--k 4 10]

A small packed model with random weights is made. A prompt and 40 single tokens go through it in every way; all logits must
equal the resident store's bit for bit, and greedy tokens must be the same. Where experts are kept, one run has tokens wait
for the host in every layer, others run ahead through 8 and 3 layers at a time, with room for some of the experts and for all.
Exits with 1 where something differs. Running ahead needs a GPU, and is left out elsewhere.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from random_checkpoint import text_config, write_checkpoint

from flash_moe import Model
from flash_moe.nn.prefetch_switch import PrefetchSwitch
from flash_moe.nn.run_ahead import AheadSwitch
from flash_moe.packing.convert import convert

LAYERS, EXPERTS, PROMPT, TOKENS = 8, 32, 7, 40
KERNELS = {"on": True, "off": False, "auto": None}


class Ahead(AheadSwitch):
    """Always one way."""

    def __init__(self, length: int) -> None:
        super().__init__(LAYERS)
        self.ahead, self.length = length > 0, length

    def record(self, seconds: float, misses: int) -> None:
        """Changes nothing."""


class Prefetching(PrefetchSwitch):
    """Always on."""

    on = True


def make(folder: Path) -> Path:
    sizes = dict.fromkeys(("hidden_size", "moe_intermediate_size", "shared_expert_intermediate_size"), 256)
    text = text_config(num_hidden_layers=LAYERS, num_experts=EXPERTS, num_experts_per_tok=10, **sizes)
    convert(write_checkpoint(folder / "float", text), folder / "packed", bits=4, group_size=64)
    return folder / "packed"


def run(folder: Path, k: int, options: dict[str, Any], length: int | None = None) -> tuple[np.ndarray, Any, str]:
    """Logits of a prompt and of single tokens after it, greedy tokens, and a remark."""
    with Model.load(folder, experts_per_token=k, **options) as model:
        decoder = model._decoder
        if length is not None:
            decoder.run_ahead.switch = Ahead(length)
        if decoder.prefetcher is not None:
            decoder.prefetcher.switch = Prefetching()
        tokens = np.random.default_rng(3).integers(0, 256, PROMPT + TOKENS).tolist()
        cache = decoder.new_cache()
        rows = [decoder.run(tokens[:PROMPT], cache, PROMPT)]
        rows += [decoder.run([token], cache, 1) for token in tokens[PROMPT:]]
        logits = np.concatenate([np.array(row) for row in rows])
        model.tokenizer.eos_token_ids = frozenset()
        greedy = model.generate(tokens[:PROMPT], max_tokens=30, temperature=0).tokens
        remark = ""
        if length:
            counters = decoder.run_ahead.counters
            remark = f"{counters.ahead} tokens ahead, {counters.clean} without a miss, {counters.restarts} restarts"
        if decoder.prefetcher is not None:
            remark = f"{decoder.prefetcher.counters.found} of {decoder.prefetcher.counters.needed} predicted"
        return logits, greedy, remark


def ways(stride: int) -> dict[str, tuple[dict[str, Any], int | None]]:
    """Options of every way, and through how many layers tokens run ahead: 0 never does, None has no choice."""
    found: dict[str, tuple[dict[str, Any], int | None]] = {
        "slots": ({"expert_io": "slots"}, None),
        "mapped": ({"expert_io": "mapped"}, None),
        "slots, prefetch": ({"expert_io": "slots", "prefetch": True}, None),
        "mapped, prefetch": ({"expert_io": "mapped", "prefetch": True}, None),
    }
    for records in (8, 40, LAYERS * EXPERTS):  # beside the slots of two fetches, of a layer each
        for length in (0, 8, 3) if mx.default_device() != mx.cpu else (None,):
            way = "waiting" if not length else f"{length} layers ahead"
            found[f"{records} of {LAYERS * EXPERTS} experts kept, {way}"] = ({"expert_cache": records * stride}, length)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=["on", "off"])
    parser.add_argument("--k", type=int, nargs="+", default=[4, 10])
    arguments = parser.parse_args()
    print(f"{mx.device_info(mx.default_device()).get('device_name', 'CPU')}, mlx {mx.__version__}")
    different = 0
    with tempfile.TemporaryDirectory() as scratch:
        folder = make(Path(scratch))
        for kernels in arguments.kernels:
            for k in arguments.k:
                options = {"kernels": KERNELS[kernels]}
                expected, tokens, _ = run(folder, k, options | {"expert_io": "resident"})
                with Model.load(folder, experts_per_token=k, expert_io="mapped", **options) as model:
                    stride = model.expert_store.layouts[0].stride
                for name, (more, length) in ways(stride).items():
                    logits, greedy, remark = run(folder, k, options | more, length)
                    rows = (logits != expected).any(axis=1)
                    wrong = f"{rows[:PROMPT].sum()} of the prompt's rows and {rows[PROMPT:].sum()} tokens DIFFER"
                    same = (wrong if rows.any() else "equal") + ("" if greedy == tokens else ", other TOKENS")
                    different += bool(rows.any()) or greedy != tokens
                    print(f"kernels {kernels}, K={k}: {name}: {same}  {remark}", flush=True)
    sys.exit(bool(different))


if __name__ == "__main__":
    main()
