"""Machines with a slow network between them: right tokens, and time per token against the forecast.

    python benchmarks/machines_latency.py [--ranks 2] [--tokens 40] [--latencies 0.1 1 5]      # root, Linux

Every rank runs on this machine in a network namespace with an address of its own. What it sends leaves by a TUN device, and
a process of real-time priority holds each packet back for the latency (few kernels of containers have netem). The forecast
is the time without latency, plus what `flash-moe plan` adds for it.
"""

from __future__ import annotations

import argparse
import ctypes
import fcntl
import heapq
import json
import multiprocessing
import os
import select
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1] / "tools"), str(Path(__file__).parents[1] / "src")]

from random_checkpoint import text_config, write_checkpoint  # noqa: E402

from flash_moe import Model, convert  # noqa: E402
from flash_moe.planning.costs import Group  # noqa: E402

LAYERS = 12
CONFIG = text_config(num_hidden_layers=LAYERS, hidden_size=512, num_experts=32, moe_intermediate_size=128)
PROMPT = list(range(40))
NEW_NETWORK, TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x40000000, 0x400454CA, 0x0001, 0x1000


def libc(name: str, *arguments: int) -> None:
    library = ctypes.CDLL(None, use_errno=True)
    if getattr(library, name)(*arguments):
        raise OSError(ctypes.get_errno(), f"{name}{arguments} failed; are you root?")


def address(rank: int) -> str:
    return f"10.77.0.{rank + 1}"


class Network:
    """A network namespace for each rank, and the delayed way between them."""

    def __init__(self, ranks: int) -> None:
        here = os.open("/proc/self/ns/net", os.O_RDONLY)
        self.devices, self.namespaces = [], []
        for rank in range(ranks):
            libc("unshare", NEW_NETWORK)
            device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
            fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH", b"tun0", IFF_TUN | IFF_NO_PI))
            for command in ("link set lo up", f"addr add {address(rank)}/24 dev tun0", "link set tun0 up mtu 9000"):
                subprocess.run(["ip", *command.split()], check=True)
            self.devices.append(device)
            self.namespaces.append(os.open("/proc/self/ns/net", os.O_RDONLY))
            libc("setns", here, NEW_NETWORK)

    def enter(self, rank: int) -> None:
        """Moves this process into the namespace of a rank, and to a processor of its own: ranks spin while they wait."""
        libc("setns", self.namespaces[rank], NEW_NETWORK)
        os.sched_setaffinity(0, {rank % (os.cpu_count() or 1)})

    def carry(self, latency: float) -> None:
        """Passes packets on, each after this number of seconds; never returns."""
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(10))
        held: list[tuple[float, int, int, bytes]] = []
        number = 0
        while True:
            wait = max(0.0, held[0][0] - time.monotonic()) if held else None
            ready, _, _ = select.select(self.devices, [], [], wait)
            for device in ready:
                packet = os.read(device, 1 << 16)
                if packet[0] >> 4 == 4 and packet[16:19] == bytes([10, 77, 0]):
                    heapq.heappush(held, (time.monotonic() + latency, number, packet[19] - 1, packet))
                    number += 1
            while held and held[0][0] <= time.monotonic():
                _, _, rank, packet = heapq.heappop(held)
                os.write(self.devices[rank], packet)


def rank(folder: str, tokens: int) -> None:
    """Rank 0 prints the tokens and the seconds of a token."""
    with Model.load(folder, group="auto", expert_io="resident", kernels=False, progress=False) as model:
        if model.follow():
            return
        model.tokenizer.eos_token_ids = frozenset()
        found, seconds, last = [], [], time.perf_counter()
        for chunk in model.stream(PROMPT, max_tokens=tokens, temperature=0.0):
            now = time.perf_counter()
            found.append(chunk.token)
            seconds.append(now - last)
            last = now
        print(json.dumps({"tokens": found, "seconds": statistics.median(seconds[4:])}))


def run(folder: Path, network: Network, ranks: int, tokens: int, latency: float) -> dict:
    """What rank 0 prints."""
    carrier = multiprocessing.get_context("fork").Process(target=network.carry, args=(latency,), daemon=True)
    carrier.start()
    hosts = folder.with_name("hosts.json")
    hosts.write_text(json.dumps([[f"{address(each)}:5000"] for each in range(ranks)]))
    processes = []
    for i in range(ranks):
        command = [sys.executable, __file__, "--folder", str(folder), "--tokens", str(tokens)]
        environment = os.environ | {"MLX_RANK": str(i), "MLX_HOSTFILE": str(hosts), "OPENBLAS_NUM_THREADS": "1"}
        enter = partial(network.enter, i)
        processes.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, preexec_fn=enter)
        )
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    carrier.kill()
    carrier.join()
    return json.loads(outputs[0].splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--latencies", type=float, nargs="+", default=[0.1, 1, 5], metavar="MS")
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.folder:
        rank(options.folder, options.tokens)
        return
    network = Network(options.ranks)
    with tempfile.TemporaryDirectory() as temporary:
        source = write_checkpoint(Path(temporary) / "float", CONFIG)
        convert(source, folder := Path(temporary) / "packed", progress=False)
        with Model.load(folder, kernels=False, progress=False) as model:
            model.tokenizer.eos_token_ids = frozenset()
            expected = list(model.generate(PROMPT, max_tokens=options.tokens, temperature=0.0).tokens)
        measure = partial(run, folder, network, options.ranks, options.tokens)
        base = [measure(0.0)["seconds"] for _ in range(2)][-1]  # once to warm up
        print(f"{options.ranks} ranks, {LAYERS} layers; without latency: {1e3 * base:.1f} ms per token")
        print("latency, ms   ms per token   forecast   tokens")
        for latency in options.latencies:
            found = measure(latency / 1e3)
            forecast = base + LAYERS * Group(options.ranks, latency / 1e3).sum_seconds(0)
            right = "right" if found["tokens"] == expected else "WRONG"
            print(f"{latency:11g} {1e3 * found['seconds']:14.1f} {1e3 * forecast:10.1f}   {right}", flush=True)


if __name__ == "__main__":
    main()
