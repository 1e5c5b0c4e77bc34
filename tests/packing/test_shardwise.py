"""Conversion of a repository shard by shard: the same bytes as from a folder, whenever it is killed, on little disk."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from conversions import contents
from foreign_layouts import write_foreign
from hub_server import HubServer
from random_checkpoint import text_config, write_checkpoint
from shard_conversions import killed, on_little_disk, publish, served_hub  # noqa: F401

from flash_moe import CheckpointError, DiskSpaceError, HubError
from flash_moe.packing.convert import convert

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


@pytest.mark.parametrize("source", SOURCES)
def test_same_bytes_on_little_disk(
    source: str, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, options = SOURCES[source]
    folder = write(tmp_path)
    on_little_disk(hub, folder, tmp_path, monkeypatch, **options)


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


def test_what_no_model_could_load_is_not_downloaded(hub: HubServer, tmp_path: Path) -> None:
    folder = write_float(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["vocab_size"] *= 2
    (folder / "config.json").write_text(json.dumps(config))
    publish(hub, folder)
    with pytest.raises(CheckpointError, match=r"embed_tokens.weight has shape .* config.json asks for"):
        convert("org/model", tmp_path / "packed")
    assert not list(tmp_path.glob("packed*"))
    assert {*hub.downloads().values()} == {1}, "of weights, only the headers were asked for"


def test_disk_space_is_foreseen(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_float(tmp_path)
    largest = publish(hub, folder)
    convert(folder, tmp_path / "local")
    result = sum(f.stat().st_size for f in (tmp_path / "local").glob("*.safetensors"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=result + largest // 2))
    with pytest.raises(DiskSpaceError, match="nothing was written"):
        convert("org/model", tmp_path / "packed")
    assert not (tmp_path / "packed.partial").exists()


def test_killed_at_some_points(hub: HubServer, tmp_path: Path) -> None:
    killed(hub, write_float(tmp_path), tmp_path, 2)


@pytest.mark.slow
def test_killed_at_fifty_points(hub: HubServer, tmp_path: Path) -> None:
    killed(hub, write_float(tmp_path), tmp_path, 50)
