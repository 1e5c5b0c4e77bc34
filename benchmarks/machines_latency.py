"""Machines with a slow network between them: right tokens, and time per token against the forecast.

    python benchmarks/machines_latency.py [--ranks 2] [--tokens 40] [--latencies 0.1 1 5]

All ranks run on this machine. Their ring goes through a relay that holds every message back for so many milliseconds, since
few kernels of containers have netem. The forecast is the time without latency, plus what `flash-moe plan` adds for it.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue

sys.path[:0] = [str(Path(__file__).parents[1] / "tools"), str(Path(__file__).parents[1] / "src")]

from random_checkpoint import text_config, write_checkpoint  # noqa: E402

from flash_moe import Model, convert  # noqa: E402
from flash_moe.planning.group import Group  # noqa: E402

LAYERS = 12
CONFIG = text_config(num_hidden_layers=LAYERS, hidden_size=512, num_experts=32, moe_intermediate_size=128)
PROMPT = list(range(40))


class Relay:
    """Passes on what is sent to a port, to another one, each message ``seconds`` later."""

    def __init__(self, target: int, seconds: float) -> None:
        self.target, self.seconds = target, seconds
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self) -> None:
        while True:
            here, _ = self.listener.accept()
            while True:  # the rank behind may not listen yet
                with suppress(OSError):
                    there = socket.create_connection(("127.0.0.1", self.target))
                    break
                time.sleep(0.05)
            for end in (here, there):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.pass_on(here, there)
            self.pass_on(there, here)

    def pass_on(self, source: socket.socket, target: socket.socket) -> None:
        held: SimpleQueue[tuple[float, bytes]] = SimpleQueue()

        def receive() -> None:
            data = b"-"
            while data:
                data = source.recv(1 << 20)
                held.put((time.monotonic() + self.seconds, data))

        def send() -> None:
            with suppress(OSError):
                while True:
                    due, data = held.get()
                    time.sleep(max(0.0, due - time.monotonic()))
                    if not data:
                        target.shutdown(socket.SHUT_RDWR)
                        return
                    target.sendall(data)

        for work in (receive, send):
            threading.Thread(target=work, daemon=True).start()


def rank(folder: str, tokens: int) -> None:
    """Rank 0 prints the tokens, the seconds of each, and the seconds in each token's sums."""
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
        print(json.dumps({"tokens": found, "seconds": statistics.median(seconds[1:])}))


def run(folder: Path, ranks: int, tokens: int, latency: float | None) -> dict:
    """What rank 0 prints; None is without a relay."""
    with tempfile.TemporaryDirectory() as temporary:
        own = []
        for _ in range(ranks):
            with socket.create_server(("127.0.0.1", 0)) as free:
                own.append(free.getsockname()[1])
        ports = own if latency is None else [Relay(port, latency).port for port in own]
        processes = []
        for i in range(ranks):
            hosts = Path(temporary) / f"{i}.json"
            hosts.write_text(json.dumps([[f"127.0.0.1:{own[j] if i == j else ports[j]}"] for j in range(ranks)]))
            command = [sys.executable, __file__, "--folder", str(folder), "--tokens", str(tokens)]
            environment = os.environ | {"MLX_RANK": str(i), "MLX_HOSTFILE": str(hosts)}
            processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
        outputs = [process.communicate(timeout=300)[0] for process in processes]
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
    with tempfile.TemporaryDirectory() as temporary:
        source = write_checkpoint(Path(temporary) / "float", CONFIG)
        convert(source, folder := Path(temporary) / "packed", progress=False)
        with Model.load(folder, kernels=False, progress=False) as model:
            model.tokenizer.eos_token_ids = frozenset()
            expected = list(model.generate(PROMPT, max_tokens=options.tokens, temperature=0.0).tokens)
        base = [run(folder, options.ranks, options.tokens, 0.0)["seconds"] for _ in range(2)][-1]  # once to warm up
        print(
            f"{options.ranks} ranks, {LAYERS} layers; through the relay without latency: {1e3 * base:.1f} ms per token"
        )
        print("latency, ms   ms per token   forecast   tokens")
        for latency in options.latencies:
            found = run(folder, options.ranks, options.tokens, latency / 1e3)
            forecast = base + LAYERS * Group(options.ranks, latency / 1e3).sum_seconds(0)
            right = "right" if found["tokens"] == expected else "WRONG"
            print(f"{latency:11g} {1e3 * found['seconds']:14.1f} {1e3 * forecast:10.1f}   {right}", flush=True)


if __name__ == "__main__":
    main()
