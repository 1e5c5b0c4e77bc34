"""Starts the ranks of a group on this machine: `launch` is what `mlx.launch` does, but ends with their exit codes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

ROOT = Path(__file__).parents[2]


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on; they are free again when this returns."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


class Ranks:
    """Processes that run one program, each as a rank; what they print goes to files.

    Attributes:
        processes: in the order of ranks.

    Args:
        commands: arguments of Python, for all ranks or for each.
    """

    def __init__(self, folder: Path, count: int, *commands: Sequence[str], **environment: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        hosts = folder / "hosts.json"
        hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(count)]))
        self.folder, self.processes = folder, list[subprocess.Popen[bytes]]()
        common = os.environ | {
            "MLX_HOSTFILE": str(hosts),
            "PYTHONPATH": f"{ROOT / 'src'}:{ROOT / 'tools'}",
            "FLASH_MOE_EXPERT_IO": "slots",
            "OPENBLAS_NUM_THREADS": "1",
            **environment,
        }
        for rank in range(count):
            with (folder / f"{rank}.out").open("wb") as out, (folder / f"{rank}.err").open("wb") as err:
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, *commands[rank % len(commands)]],
                        env=common | {"MLX_RANK": str(rank)},
                        stdin=subprocess.DEVNULL,
                        stdout=out,
                        stderr=err,
                    )
                )

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *error: object) -> None:
        for process in self.processes:
            process.kill()
            process.wait()

    def wait(self, seconds: float = 600) -> list[int]:
        """Exit codes; all are killed where they take longer."""
        deadline = time.monotonic() + seconds
        try:
            return [process.wait(max(0.1, deadline - time.monotonic())) for process in self.processes]
        except subprocess.TimeoutExpired:
            raise AssertionError(f"no end within {seconds} s: {self.said()}") from None

    def said(self) -> str:
        """What all ranks wrote, for people."""
        return "\n".join(
            f"rank {rank} {kind}: {(self.folder / f'{rank}.{kind}').read_text(errors='replace')[-3000:]}"
            for rank in range(len(self.processes))
            for kind in ("out", "err")
        )
