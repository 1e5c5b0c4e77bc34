"""Decoding a model several times larger than the memory it may use, in a control group (Linux, as root).

    python benchmarks/memory_limit.py [--limit-mb 640] [--layers 16] [--experts 64] [--hidden 1024] [--bits 8] [--stores slots]
    python benchmarks/memory_limit.py --model FOLDER --own-k --limit-mb 858

A child process in a group of its own fills the group, and then measures by turns how fast the disk gives cold records to
plain parallel reads, and decodes a few tokens: with each store, without and with prefetching for the next layer. In a
full group every page that is read takes the place of another; reads into an empty one are faster by up to a half. Beside
it stand the system's own counters: bytes that the process caused to be read (/proc/self/io), the group's highest memory
use, and its swap.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))

from memory_group import memory_group
from random_checkpoint import text_config
from sparse_checkpoint import GATES, QUANTIZATION, write_sparse

from flash_moe import Model
from flash_moe.bench.raw_reads import open_files, raw_speed
from flash_moe.bench.system import disk_bytes_read
from flash_moe.experts.host_memory import read_buffer
from flash_moe.experts.reader import IN_FLIGHT, REQUEST
from flash_moe.nn.prefetch_switch import TRIAL
from flash_moe.record import RecordLayout

RAW_SECONDS = 4.0  # half of it for cold reads
TURNS = 4  # of decoding, between measurements of the disk: one that others use changes within minutes
LARGEST = 0.03  # of the weights of a model 1024 wide; a wider one has smaller ones


def make(folder: Path, arguments: argparse.Namespace) -> Path:
    """A packed checkpoint with random weights, every byte of which is on the disk."""
    text = text_config(
        hidden_size=arguments.hidden, num_hidden_layers=arguments.layers, num_experts=arguments.experts,
        num_experts_per_tok=8, moe_intermediate_size=1024, shared_expert_intermediate_size=1024, vocab_size=2048,
    )  # fmt: skip
    write_sparse(folder, text, arguments.bits)
    rng = np.random.default_rng(0)
    for file in folder.glob("*.safetensors"):
        fill(file, rng, arguments.bits, LARGEST * 1024 / arguments.hidden)
    return folder


def fill(path: Path, rng: np.random.Generator, expert_bits: int, largest: float) -> None:
    """Gives every tensor of a file values that keep activations near one, and routers busy with all experts."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(size))
        metadata = header.pop("__metadata__", {})
        for name, entry in header.items():
            start, stop = entry["data_offsets"]
            file.seek(8 + size + start)
            if name == "experts":
                layout = RecordLayout.from_json(json.loads(metadata["layout"]))
                record = np.zeros(layout.stride, np.uint8)
                for part in layout.parts:
                    record[part.offset : part.offset + part.nbytes] = values(
                        part.key, part.nbytes, rng, expert_bits, largest
                    )
                for _ in range(entry["shape"][0]):
                    file.write(record.tobytes())
            else:
                bits = GATES.bits if "gate." in name and "proj" not in name else QUANTIZATION.bits
                file.write(values(name, stop - start, rng, bits, largest).tobytes())


def values(name: str, nbytes: int, rng: np.random.Generator, bits: int, largest: float) -> np.ndarray:
    """Bytes of a stored tensor: random weights of mean zero up to ``largest``, embeddings up to 3; ones for norms."""
    if bits == 32:
        return rng.uniform(-largest, largest, nbytes // 4).astype(np.float32).view(np.uint8)
    if name.endswith(".weight") and "norm" not in name and "conv1d" not in name:
        return np.frombuffer(rng.bytes(nbytes), np.uint8)
    if "embed_tokens" in name:
        largest = 3.0  # so that the residual stream says which token it is
    value = 1.0
    if name.endswith("scales"):
        value = largest / (1 << (bits - 1))
    elif name.endswith("biases"):
        value = -largest * (1 - 0.5**bits)  # so that the mean is zero: else all tokens would look alike to the router
    return np.full(nbytes // 2, np.float32(value).view(np.uint32) >> 16, np.uint16).view(np.uint8)  # bfloat16


def raw_speed_when_full(folder: Path, limit: int) -> float:
    """Plain cold reads, bytes per second, of a part of the experts, once the others have filled the group."""
    files = open_files(sorted(folder.glob("experts-*.safetensors")))
    measured, buffer = list(files), read_buffer(REQUEST)
    while limit > 0:
        file = measured.pop()
        limit -= file.size
        for offset in range(0, file.size, REQUEST):
            file.read_into(buffer[: file.size - offset], offset)
    speed = raw_speed(measured, IN_FLIGHT, REQUEST, RAW_SECONDS).cold
    for file in files:
        file.close()
    return speed


def child(folder: Path, limit: int, k: int | None, tokens: int, expert_io: str, prefetch: bool) -> dict[str, Any]:
    """Runs inside the group. The tokens that count come after as many as a trial of prefetching takes: it is full then."""
    raw, seconds, system = [raw_speed_when_full(folder, limit)], 0.0, 0
    before, each = TRIAL + 1, tokens // TURNS
    with Model.load(folder, experts_per_token=k, expert_io=expert_io, prefetch=prefetch) as model:
        model.tokenizer.eos_token_ids = frozenset()
        model.expert_store.evict(flush=True)
        chunks = model.stream([1], max_tokens=before + TURNS * each, temperature=100.0, seed=0)  # any token
        *_, first = (chunk.stats for chunk in itertools.islice(chunks, before))
        for _ in range(TURNS):
            start, read = time.perf_counter(), disk_bytes_read()
            *_, last = (chunk.stats for chunk in itertools.islice(chunks, each))
            seconds += time.perf_counter() - start
            system += disk_bytes_read() - read
            raw.append(raw_speed_when_full(folder, limit))
    return {
        "raw_bytes_per_second": sum(raw) / len(raw),
        "tokens": TURNS * each,
        "seconds": seconds,
        "waiting_for_reads": last.fetch_seconds - first.fetch_seconds,
        "bytes_missing": last.expert_bytes_missing - first.expert_bytes_missing,
        "bytes_requested": last.decode_bytes_requested - first.decode_bytes_requested,
        "system_read_bytes": system,
        "prefetch": str(last.prefetch),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--limit-mb", type=int, default=640)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument(
        "--bits", type=int, default=8, help="of experts; 32 for plain float32, which costs least to compute"
    )
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--stores", nargs="+", choices=("slots", "mapped"), default=("slots", "mapped"))
    parser.add_argument("--model", type=Path, help="a packed checkpoint, instead of one that is made up")
    parser.add_argument("--own-k", action="store_true", help="as many experts per token as the model's own; else 4")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        folder, expert_io, prefetch = arguments.child
        limit = arguments.limit_mb << 20
        k = None if arguments.own_k else 4
        print(json.dumps(child(Path(folder), limit, k, arguments.tokens, expert_io, prefetch == "prefetch")))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.model or make(Path(scratch) / "model", arguments)
        size = sum(file.stat().st_size for file in folder.glob("experts-*.safetensors"))
        limit = arguments.limit_mb << 20
        print(
            f"{datetime.date.today()}, mlx {mx.__version__} on {mx.default_device()}, {size / 1e9:.2f} GB of "
            f"{'' if arguments.model else f'{arguments.bits}-bit '}experts, {limit / 1e9:.2f} GB of memory"
        )
        columns = ("store", "tok/s", "MB missing per token", "raw cold GB/s", "of raw", "reads alone, of raw",
                   "system's bytes, of missing", "highest MB")  # fmt: skip
        print(f"\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
        for expert_io, prefetch in itertools.product(arguments.stores, ("", "prefetch")):
            with memory_group(limit) as group:
                command = [sys.executable, __file__, "--tokens", str(arguments.tokens)]
                command += ["--limit-mb", str(arguments.limit_mb), *(["--own-k"] if arguments.own_k else [])]
                command += ["--child", str(folder), expert_io, prefetch]
                done = subprocess.run([*group.command, *command], capture_output=True, text=True)
                if done.returncode:
                    raise SystemExit(f"the child ended with {done.returncode}:\n{done.stderr[-2000:]}")
                highest, swap = group.highest_bytes(), group.swapped_bytes()
            assert swap == 0, f"{swap} bytes were swapped"
            found = json.loads(done.stdout.splitlines()[-1])
            missing, raw = found["bytes_missing"], found["raw_bytes_per_second"]
            values = (
                f"{found['tokens'] / found['seconds']:.2f}", f"{missing / found['tokens'] / 1e6:.0f}", f"{raw / 1e9:.2f}",
                f"{missing / raw / found['seconds']:.2f}", f"{missing / raw / found['waiting_for_reads']:.2f}",
                f"{found['system_read_bytes'] / missing:.3f}", f"{highest / 1e6:.0f}",
            )  # fmt: skip
            print(f"| {', '.join(filter(None, (expert_io, prefetch)))} | {' | '.join(values)} |", flush=True)
            if prefetch:
                print(f"    {found['prefetch']}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
