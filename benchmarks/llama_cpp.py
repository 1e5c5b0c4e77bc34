"""flash_moe on the CPU beside llama.cpp: the same sizes, 4 bits, in turns, in memory and under a memory limit (Linux).

    python -m venv ~/llama && ~/llama/bin/pip install llama-cpp-python gguf
    python benchmarks/llama_cpp.py FOLDER --llama ~/llama/bin/python [--prompts '[16, 256]'] [--limit 900] [--busy 2]

FOLDER gets two models of made-up weights, 2 GB each; those that are there are used again. A limit is in MB and takes root.
Where a virtual machine names AMX without allowing it, llama.cpp built there ends with an illegal instruction: build it
with CMAKE_ARGS="-DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_BMI2=ON -DGGML_AVX512=ON
-DGGML_AVX512_VBMI=ON -DGGML_AVX512_VNNI=ON -DGGML_AVX512_BF16=ON".
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "benchmarks")]

from memory_group import memory_group  # noqa: E402
from memory_limit import LARGEST, fill  # noqa: E402
from random_checkpoint import text_config  # noqa: E402
from sparse_checkpoint import write_sparse  # noqa: E402

SIZES: dict[str, Any] = text_config(
    vocab_size=32_768, hidden_size=2048, num_hidden_layers=8, num_attention_heads=16, num_key_value_heads=2, head_dim=256,
    linear_num_key_heads=16, linear_num_value_heads=32, linear_key_head_dim=128, linear_value_head_dim=128,
    num_experts=128, num_experts_per_tok=8, moe_intermediate_size=512, shared_expert_intermediate_size=512,
)  # fmt: skip
SIDE = ROOT / "benchmarks" / "llama_cpp_side.py"
READ = "MB from the disk, a token"


def ours(folder: str, threads: int, prompts: list[int], tokens: int, expert_io: str) -> dict[str, float]:
    """Milliseconds of prompts, the best of two or of one long one, and of single tokens, median; as the other side does."""
    import mlx.core as mx

    from flash_moe import Model
    from flash_moe.bench.system import disk_bytes_read

    ids = np.random.default_rng(0).integers(0, SIZES["vocab_size"], 4096).tolist()
    with Model.load(folder, experts_per_token=None, expert_io=expert_io, threads=threads) as model:  # type: ignore[arg-type]
        engine, decoder = model._engine, model._decoder

        def run(length: int) -> float:
            start = time.perf_counter()
            engine.prefill(ids[:length], decoder.new_cache())
            return 1e3 * (time.perf_counter() - start)

        run(16)
        found = {f"prompt {length}": min(run(length) for _ in range(2 if length < 1000 else 1)) for length in prompts}
        if not tokens:
            return found
        cache, times = decoder.new_cache(), []
        engine.prefill(ids[:16], cache)
        before = disk_bytes_read()
        for token in ids[16 : 16 + tokens]:
            start = time.perf_counter()
            mx.eval(decoder.logits(decoder(mx.array([token], dtype=mx.int32), cache)))
            times.append(1e3 * (time.perf_counter() - start))
        return found | {"token": float(np.median(times)), READ: (disk_bytes_read() - before) / 1e6 / tokens}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--llama", required=True, help="a Python with llama-cpp-python and gguf")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--llama-threads", type=int, help="of llama.cpp, where others are better for it")
    parser.add_argument("--prompts", type=json.loads, default=[16, 256, 2048])
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--limit", type=int, help="MB of memory for each side")
    parser.add_argument("--busy", type=int, default=0, help="other processes that use a core each meanwhile")
    a = parser.parse_args()
    model, gguf = a.folder / "flash_moe", a.folder / "model.gguf"
    if not model.exists():
        write_sparse(model, SIZES)
        for file in model.glob("*.safetensors"):
            fill(file, np.random.default_rng(0), 4, LARGEST / 2)
    if not gguf.exists():
        subprocess.run([a.llama, str(SIDE), "write", str(gguf), json.dumps(SIZES)], check=True)
    what = [json.dumps(a.prompts), str(a.tokens)]
    code = f"import sys; sys.path.insert(0, {str(ROOT / 'benchmarks')!r}); import json, llama_cpp; " + (
        "print(json.dumps(llama_cpp.ours(sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3]), int(sys.argv[4]), sys.argv[5])))"
    )
    io = "slots" if a.limit else "resident"
    sides = {
        "flash_moe": [sys.executable, "-c", code, str(model), str(a.threads), *what, io],
        "llama.cpp": [a.llama, str(SIDE), "run", str(gguf), str(a.llama_threads or a.threads), *what],
    }
    print(
        f"{datetime.datetime.now():%Y-%m-%d %H:%M}, {processor()}; LLAMA_REPACK={os.environ.get('LLAMA_REPACK', 'on')}"
    )
    print(f"python {shlex.join(sys.argv)}")
    found: dict[str, dict[str, list[float]]] = {side: defaultdict(list) for side in sides}
    with busy(a.busy):
        for turn in range(a.turns):
            for side in sorted(sides, reverse=turn % 2 == 1):
                line = output(sides[side], a.limit, [gguf, *model.glob("*.safetensors")])
                print(f"{side:9} {line}", flush=True)
                for name, value in json.loads(line).items():
                    found[side][name].append(value)
    print("\n| | flash_moe, ms | llama.cpp, ms | flash_moe's speed, of llama.cpp's |\n|---|---|---|---|")
    for name in found["flash_moe"]:
        own, other = (min(found[side][name]) for side in sides)
        print(f"| {name} | {own:,.1f} | {other:,.1f} | {'' if name == READ else f'{other / own:.2f}'} |")


def processor() -> str:
    """The machine in words."""
    with contextlib.suppress(OSError):
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        return f"{len(os.sched_getaffinity(0))} cores of {names[0].split(': ')[1]}"
    return f"{os.cpu_count()} cores, {platform.machine()}"


@contextlib.contextmanager
def busy(count: int) -> Iterator[None]:
    """Keeps this number of processes computing meanwhile."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def output(command: list[str], limit: int | None, files: list[Path]) -> str:
    """The last line that a side prints, run within the limit; what it then needs of the files, it reads itself."""
    if limit is None:
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    else:
        for file in files:
            drop(file)  # pages that are there already would count for nobody
        with memory_group(limit * 1_000_000) as group:
            done = subprocess.run([*group.command, *command], check=True, capture_output=True, text=True)
    return done.stdout.splitlines()[-1]


def drop(file: Path) -> None:
    """Drops a file from the page cache."""
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


if __name__ == "__main__":
    main()
