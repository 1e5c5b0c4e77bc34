"""Conversion of a repository shard by shard: the same bytes as from a folder, whenever it is killed, on little disk."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from types import SimpleNamespace

import huggingface_hub.constants
import pytest
from conversions import contents
from foreign_checkpoints import write_foreign
from hub_server import HubServer, use
from random_checkpoint import text_config, write_checkpoint

from flash_moe import DiskSpaceError, HubError
from flash_moe.checkpoint import remote
from flash_moe.packing.convert import convert

SRC = Path(__file__).parents[2] / "src"
TEXT = text_config(num_hidden_layers=2, full_attention_interval=2, num_experts=4, num_experts_per_tok=2, vocab_size=512)


def write_float(folder: Path) -> Path:
    """Five shards over which the tensors of a layer are scattered."""
    return write_checkpoint(folder / "float", TEXT, shards=5)


def write_separate(folder: Path) -> Path:
    return write_checkpoint(folder / "separate", TEXT, shards=5, fused_experts=False)


def write_fp8(folder: Path) -> Path:
    return write_foreign(folder, "Qwen FP8")[0]


def write_nvfp4(folder: Path) -> Path:
    return write_foreign(folder, "ModelOpt NVFP4")[0]


def write_gptq(folder: Path) -> Path:
    return write_foreign(folder, "GPTQ integers")[0]


SOURCES: dict[str, tuple[Callable[[Path], Path], dict[str, object]]] = {
    "float": (write_float, {}),
    "separate, 3-bit": (write_separate, {"bits": 3, "group_size": 32}),
    "FP8": (write_fp8, {"group_size": 32}),
    "NVFP4": (write_nvfp4, {"group_size": 32}),
    "GPTQ": (write_gptq, {}),
    "a share": (write_float, {"share": "1/2"}),
}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
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


@pytest.mark.parametrize("source", SOURCES)
def test_same_bytes_on_little_disk(
    source: str, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, options = SOURCES[source]
    folder = write(tmp_path)
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
    assert largest < max(sizes) < result + 2 * largest + 100_000
    assert not (tmp_path / "cache").exists()


def test_keep_downloads_to_the_cache(hub: HubServer, tmp_path: Path) -> None:
    publish(hub, write_float(tmp_path))
    convert("org/model", tmp_path / "kept", keep=True)
    asked = sum(hub.downloads().values())
    convert("org/model", tmp_path / "again")  # from there
    assert sum(hub.downloads().values()) == asked
    assert contents(tmp_path / "kept") == contents(tmp_path / "again")


def test_a_cut_connection_is_continued(hub: HubServer, tmp_path: Path) -> None:
    folder = write_float(tmp_path)
    convert(folder, tmp_path / "local")
    publish(hub, folder)
    shard = "model-00005-of-00005.safetensors"
    assert len(hub.files[shard]) > 200_000
    hub.faults[shard] = [len(hub.files[shard]), len(hub.files[shard]), 1000]  # after the header and a piece
    with pytest.raises(HubError):
        convert("org/model", tmp_path / "packed")
    assert (tmp_path / "packed.partial" / "source").exists()
    convert("org/model", tmp_path / "packed")
    assert contents(tmp_path / "packed") == contents(tmp_path / "local")


def test_disk_space_is_foreseen(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_float(tmp_path)
    largest = publish(hub, folder)
    convert(folder, tmp_path / "local")
    result = sum(f.stat().st_size for f in (tmp_path / "local").glob("*.safetensors"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=result + largest // 2))
    with pytest.raises(DiskSpaceError, match="nothing was written"):
        convert("org/model", tmp_path / "packed")
    assert not (tmp_path / "packed.partial").exists()


def killed(hub: HubServer, tmp_path: Path, points: int) -> None:
    """Kills conversions at random steps, each again and again until it is through."""
    folder = write_float(tmp_path)
    convert(folder, tmp_path / "local")
    publish(hub, folder)
    expected, random = contents(tmp_path / "local"), Random(7)
    environment = os.environ | {"PYTHONPATH": str(SRC), "HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(tmp_path / "none")}
    script = [sys.executable, str(Path(__file__).with_name("interrupted.py")), "org/model"]
    done, kills, destination = 0, 0, tmp_path / "runs" / "packed"
    destination.parent.mkdir()
    while kills < points:
        steps = random.choice([random.randrange(1, 60), random.randrange(60, 400)])
        run = subprocess.run([*script, str(destination), str(steps)], capture_output=True, text=True, env=environment)
        assert run.returncode in (0, -signal.SIGKILL), run.stderr
        kills += run.returncode != 0
        if destination.exists():
            assert contents(destination) == expected
            shutil.rmtree(destination.parent)
            destination.parent.mkdir()
            done += 1
    while not destination.exists():
        convert("org/model", destination)
    assert contents(destination) == expected


def test_killed_at_some_points(hub: HubServer, tmp_path: Path) -> None:
    killed(hub, tmp_path, 2)


@pytest.mark.slow
def test_killed_at_fifty_points(hub: HubServer, tmp_path: Path) -> None:
    killed(hub, tmp_path, 50)
