"""Two GPUs of one host as a group of machines: tokens, and ms per layer of 1 and 2 ranks at sizes of Qwen3.5-397B-A17B.

    python benchmarks/machines_397b.py FOLDER                # NCCL, kernels on
    python benchmarks/machines_397b.py FOLDER --tiny         # a small model and the ring, on any machine
    ... --demo                                               # also compares tokens of the demo model

The large model is made in FOLDER, with random weights: 8 layers of 64 experts. Experts come out of the page cache (slots
without expert_cache), or from the bank (expert_cache holds all of this rank's). A token's time is the median of those decoded
after as many that are not counted. The demo model's tokens are greedy and sampled ones, in float32 and bfloat16; on a GPU it
takes minutes to compile kernels for its sizes.
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


def measure(folder: str, tokens: int, backend: str, kernels: bool | None, demo: bool, ks: list[int]) -> None:
    """Every case on this rank; rank 0 prints a line of JSON for each."""
    group = mx.distributed.init(backend=backend) if "MLX_RANK" in os.environ else None
    if group is not None:
        sum_alone(group)
    for dtype in ("float32", "bfloat16") if demo else ():
        for k in ks:
            with Model.load(
                "demo", group=group, experts_per_token=k, dtype=dtype, kernels=kernels, progress=False
            ) as model:
                if not model.follow():
                    say(case=f"demo, {dtype}, K={k}", tokens=replies(model))
    for store in ("bank", "page cache"):
        for k in ks:
            cache, start = 0 if store == "page cache" else 40 << 30, time.perf_counter()
            with Model.load(
                folder,
                group=group,
                experts_per_token=k,
                expert_io="slots",
                expert_cache=cache,
                kernels=kernels,
                progress=False,
            ) as model:
                if cache:
                    fill(model)
                if model.follow():
                    continue
                model.tokenizer.eos_token_ids = frozenset()
                loaded = time.perf_counter() - start
                say(case=f"{store}, K={k}", loaded=loaded, **timed(model, tokens))


def say(**found: object) -> None:
    print(json.dumps(found), flush=True)


def sum_alone(group: mx.distributed.Group) -> None:
    """Rank 0 prints the seconds of a sum as large as a token's, one after the other."""
    seconds = []
    for _ in range(300):
        x = mx.ones(FULL_SIZE["hidden_size"] + 2)
        mx.eval(x)
        start = time.perf_counter()
        mx.eval(mx.distributed.all_sum(x, group=group))
        seconds.append(time.perf_counter() - start)
    if group.rank() == 0:
        say(case="a sum alone", token=statistics.median(seconds[100:]))


def replies(model: Model) -> list[list[int]]:
    """Greedy and sampled tokens after prompts of 1, 8 and 40 tokens."""
    model.tokenizer.eos_token_ids = frozenset()
    found = []
    for prompt in ([5], [p % 256 for p in PROMPT], list(range(40))):
        for options in ({"temperature": 0.0}, {"temperature": 1.0, "seed": 3}):
            found.append(list(model.generate(prompt, max_tokens=24, **options).tokens))
    return found


def timed(model: Model, tokens: int) -> dict:
    """The tokens; the median seconds of one, of all but the first half; and its mean seconds in sums."""
    sums = getattr(model._decoder, "sums", None)
    found, seconds, last, before = [], [], time.perf_counter(), 0.0
    for number, chunk in enumerate(model.stream(PROMPT, max_tokens=2 * tokens, temperature=0.0)):
        now = time.perf_counter()
        found.append(chunk.token)
        seconds.append(now - last)
        last = now
        if number == tokens - 1 and sums is not None:
            before = sums.seconds
    first, steady = statistics.median(seconds[1:9]), statistics.median(seconds[tokens:])
    waited = 0.0 if sums is None else (sums.seconds - before) / tokens
    return {"first": first, "token": steady, "sums": waited, "tokens": [found]}


def fill(model: Model) -> None:
    """Reads all experts of this rank into the bank."""
    store = model.expert_store
    table = store._reader.table  # type: ignore[attr-defined]
    for layer in table.layouts:
        experts = table.experts(layer)
        for start in range(0, len(experts), store.capacity):
            store.fetch(layer, experts[start : start + store.capacity])


def run(folder: Path, tokens: int, ranks: int, backend: str, demo: bool, ks: list[int]) -> dict[str, dict]:
    """What rank 0 prints, by case."""
    with socket.create_server(("127.0.0.1", 0)) as free, socket.create_server(("127.0.0.1", 0)) as other:
        ports = [free.getsockname()[1], other.getsockname()[1]]
    hosts = folder.with_name("hosts.json")
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in ports]))
    group = {"NCCL_HOST_IP": "127.0.0.1", "NCCL_PORT": str(ports[0]), "MLX_WORLD_SIZE": str(ranks)}
    if backend == "ring":
        group = {"MLX_HOSTFILE": str(hosts)}
    command = [sys.executable, __file__, str(folder), "--measure", "--tokens", str(tokens), "--backend", backend]
    command += ["--experts-per-token", *map(str, ks), *(["--own-kernels"] if backend == "nccl" else [])]
    command += ["--demo"] if demo else []
    processes = []
    for rank in range(ranks):
        own = group | {"MLX_RANK": str(rank)} if ranks > 1 else {}
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": str(rank)} | own
        processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    found = {}
    for line in processes[0].stdout or ():
        print(ranks, line[:200].rstrip(), flush=True)  # should a later case never end
        result = json.loads(line)
        found[result.pop("case")] = result
    for process in processes:
        process.communicate()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokens", type=int, default=44)
    parser.add_argument("--experts-per-token", type=int, nargs="+", default=[4, OWN_K], metavar="K")
    parser.add_argument("--demo", action="store_true")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--backend", default="nccl", choices=["nccl", "ring"])
    parser.add_argument("--out", type=Path, help="file for the results, as JSON")
    parser.add_argument("--own-kernels", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(
            str(options.folder),
            options.tokens,
            options.backend,
            options.own_kernels or None,
            options.demo,
            options.experts_per_token,
        )
        return
    text, backend = (TINY, "ring") if options.tiny else (FULL_SIZE, options.backend)
    options.folder.mkdir(parents=True, exist_ok=True)
    folder = make_model(options.folder, "machines", text | SHAPE, 2)
    print(f"mlx {mx.__version__}, {mx.default_device()}, {backend}; {LAYERS} layers of {EXPERTS} experts", flush=True)
    by_ranks = {}
    for ranks in (1, 2):
        by_ranks[ranks] = run(folder, options.tokens, ranks, backend, options.demo, options.experts_per_token)
        if options.out:
            options.out.write_text(json.dumps(by_ranks))
    print("case              ranks   ms per layer at first   later   of it in sums   loading, s   tokens")
    for ranks, results in by_ranks.items():
        for case, found in results.items():
            first, token, sums = (1e3 * found.get(name, 0.0) / LAYERS for name in ("first", "token", "sums"))
            same = compared(found.get("tokens", []), by_ranks[1].get(case, {}).get("tokens", []))
            print(f"{case:22} {ranks} {first:16.3f} {token:14.3f} {sums:12.3f} {found.get('loaded', 0):10.1f}   {same}")


def compared(tokens: list[list[int]], expected: list[list[int]]) -> str:
    """How many are the same, up to the first that differs in each reply."""
    same = 0
    for found, wanted in zip(tokens, expected, strict=True) if expected else ():
        same += next((i for i, pair in enumerate(zip(found, wanted, strict=True)) if len({*pair}) > 1), len(found))
    return f"{same} of {sum(map(len, tokens))} the same"


if __name__ == "__main__":
    main()
