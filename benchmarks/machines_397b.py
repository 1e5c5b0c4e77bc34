"""Two GPUs of one host as a group of machines, with the layer sizes of Qwen3.5-397B-A17B: ms per layer of 1 and 2 ranks.

    python benchmarks/machines_397b.py FOLDER                # NCCL; kernels as FLASH_MOE_KERNELS says
    python benchmarks/machines_397b.py FOLDER --tiny         # a small model and the ring, on any machine

The model is made in FOLDER, with random weights: 8 layers of 64 experts. Experts come out of the page cache (slots without
expert_cache), or from the bank (expert_cache holds all of this rank's). A token's time is the median of those decoded.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path

warnings.simplefilter("ignore")
sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))

import mlx.core as mx  # noqa: E402
from made_397b import make_model  # noqa: E402
from sparse_checkpoint import FULL_SIZE  # noqa: E402
from stages_397b import TINY  # noqa: E402

from flash_moe import Model  # noqa: E402

LAYERS, EXPERTS, OWN_K = 8, 64, 10
SHAPE = {"num_hidden_layers": LAYERS, "num_experts": EXPERTS, "num_experts_per_tok": OWN_K, "vocab_size": 4096}
PROMPT = [5, 17, 301, 2, 77, 1023, 8, 640]


def measure(folder: str, tokens: int, backend: str) -> None:
    """Every case on this rank; rank 0 prints a line of JSON for each."""
    group = mx.distributed.init(backend=backend) if "MLX_RANK" in os.environ else None
    for store in ("page cache", "bank"):
        for k in (4, OWN_K):
            cache = 0 if store == "page cache" else 40 << 30
            with Model.load(
                folder, group=group, experts_per_token=k, expert_io="slots", expert_cache=cache, progress=False
            ) as model:
                if cache:
                    fill(model)
                if model.follow():
                    continue
                model.tokenizer.eos_token_ids = frozenset()
                sums = getattr(model._decoder, "sums", None)
                seconds, last, before = [], time.perf_counter(), 0.0
                for number, _ in enumerate(model.stream(PROMPT, max_tokens=tokens, temperature=0.0)):
                    now = time.perf_counter()
                    seconds.append(now - last)
                    last = now
                    if number == 0 and sums is not None:
                        before = sums.seconds
                waited = 0.0 if sums is None else (sums.seconds - before) / (tokens - 1)
                found = {"experts": store, "k": k, "token": statistics.median(seconds[4:]), "sums": waited}
                print(json.dumps(found), flush=True)


def fill(model: Model) -> None:
    """Reads all experts of this rank into the bank."""
    store = model.expert_store
    table = store._reader.table  # type: ignore[attr-defined]
    for layer in table.layouts:
        experts = table.experts(layer)
        for start in range(0, len(experts), store.capacity):
            store.fetch(layer, experts[start : start + store.capacity])


def run(folder: Path, tokens: int, ranks: int, backend: str) -> list[dict]:
    """What rank 0 prints."""
    with socket.create_server(("127.0.0.1", 0)) as free, socket.create_server(("127.0.0.1", 0)) as other:
        ports = [free.getsockname()[1], other.getsockname()[1]]
    hosts = folder.with_name("hosts.json")
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in ports]))
    group = {"NCCL_HOST_IP": "127.0.0.1", "NCCL_PORT": str(ports[0]), "MLX_WORLD_SIZE": str(ranks)}
    if backend == "ring":
        group = {"MLX_HOSTFILE": str(hosts)}
    command = [sys.executable, __file__, str(folder), "--measure", "--tokens", str(tokens), "--backend", backend]
    processes = []
    for rank in range(ranks):
        own = group | {"MLX_RANK": str(rank)} if ranks > 1 else {}
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": str(rank)} | own
        processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    outputs = [process.communicate()[0] for process in processes]
    return [json.loads(line) for line in outputs[0].splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokens", type=int, default=44)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--backend", default="nccl", choices=["nccl", "ring"])
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(str(options.folder), options.tokens, options.backend)
        return
    text, backend = (TINY, "ring") if options.tiny else (FULL_SIZE, options.backend)
    options.folder.mkdir(parents=True, exist_ok=True)
    folder = make_model(options.folder, "machines", text | SHAPE, 2)
    print(f"mlx {mx.__version__}, {mx.default_device()}, {backend}; {LAYERS} layers of {EXPERTS} experts")
    print("experts from   K   ranks   ms per token   ms per layer   of it in sums")
    for ranks in (1, 2):
        for found in run(folder, options.tokens, ranks, backend):
            per_layer, in_sums = (1e3 * found[name] / LAYERS for name in ("token", "sums"))
            row = f"{found['experts']:12} {found['k']:3} {ranks:7} {1e3 * found['token']:14.2f}"
            print(f"{row} {per_layer:14.3f} {in_sums:15.3f}", flush=True)


if __name__ == "__main__":
    main()
