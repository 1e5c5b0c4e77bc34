"""Conversions of a repository on the stand-in of the hub, shard by shard: disk that they take, and how they are killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random

import huggingface_hub.constants
import pytest
from conversions import contents
from hub_server import HubServer, use

from flash_moe.checkpoint import remote
from flash_moe.packing.convert import convert

SRC = Path(__file__).parents[1] / "src"


@pytest.fixture(name="hub")
def served_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    with HubServer({}) as server:
        use(monkeypatch, server.url)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(remote, "_BLOCK", 100_000)
        yield server


def publish(hub: HubServer, folder: Path) -> int:
    """Puts a folder's files on the hub; the size of the largest weight file."""
    hub.files.update({file.name: file.read_bytes() for file in folder.iterdir()})
    return max(len(data) for name, data in hub.files.items() if name.endswith(".safetensors"))


def on_little_disk(
    hub: HubServer, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int = 0, **options: object
) -> None:
    """Converts a published folder: to the same bytes as from the folder, on no more disk than result and two shards.

    Args:
        most: bytes of what two shards are translated to.
    """
    convert(folder, tmp_path / "local", **options)
    largest, work, sizes = publish(hub, folder), tmp_path / "work", [0]
    fsync = os.fsync

    def measured(fd: int) -> None:
        fsync(fd)
        sizes.append(sum(file.stat().st_size for file in work.rglob("*") if file.is_file()))

    monkeypatch.setattr(os, "fsync", measured)
    assert convert("org/model", work / "packed", **options) == []
    assert contents(work / "packed") == contents(tmp_path / "local")
    assert [path.name for path in work.iterdir()] == ["packed"]
    result = sum(file.stat().st_size for file in (work / "packed").iterdir())
    assert largest < max(sizes) < result + max(most, 2 * largest) + 100_000
    assert not (tmp_path / "cache").exists()


def killed(hub: HubServer, folder: Path, tmp_path: Path, points: int, **options: object) -> None:
    """Kills conversions at random steps, each again and again until it is through."""
    convert(folder, tmp_path / "local", **options)
    publish(hub, folder)
    expected, random = contents(tmp_path / "local"), Random(7)
    environment = os.environ | {"PYTHONPATH": str(SRC), "HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(tmp_path / "none")}
    script = [sys.executable, str(Path(__file__).parent / "packing" / "interrupted.py"), "org/model"]
    done, kills, destination = 0, 0, tmp_path / "runs" / "packed"
    destination.parent.mkdir()
    while kills < points:
        steps = random.choice([random.randrange(1, 60), random.randrange(60, 400)])
        arguments = [str(destination), str(steps), json.dumps(options)]
        run = subprocess.run([*script, *arguments], capture_output=True, text=True, env=environment)
        assert run.returncode in (0, -signal.SIGKILL), run.stderr
        kills += run.returncode != 0
        if destination.exists():
            assert contents(destination) == expected
            shutil.rmtree(destination.parent)
            destination.parent.mkdir()
            done += 1
    while not destination.exists():
        convert("org/model", destination, **options)
    assert contents(destination) == expected
