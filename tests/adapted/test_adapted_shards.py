"""Checkpoints of mlx-lm's families on the hub, converted shard by shard."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from family_checkpoints import checkpoint
from hub_server import HubServer
from shard_conversions import killed, on_little_disk, served_hub  # noqa: F401

SOURCES: Mapping[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "a tensor for each expert": ("qwen3_moe", {"mode": None, "published": True}, {"group_size": 32}),
    "fused and interleaved": ("gpt_oss", {"mode": "mxfp4", "published": True}, {}),
    "attention that is rearranged": ("deepseek_v3", {"mode": None, "published": True}, {"bits": 8, "group_size": 32}),
    "quantised by mlx-lm": ("nemotron_h", {"mode": "affine"}, {}),
    "transposed": ("llama4", {"mode": None, "published": True}, {"mode": "mxfp4"}),
    "a share": ("mixtral", {"mode": None, "published": True}, {"share": "1/2", "group_size": 32}),
}


QUICK = ("attention that is rearranged", "quantised by mlx-lm")


@pytest.mark.parametrize(
    "source", [pytest.param(source, marks=() if source in QUICK else pytest.mark.slow) for source in SOURCES]
)
def test_same_bytes_on_little_disk(
    source: str,
    hub: HubServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name, written, options = SOURCES[source]
    folder = checkpoint(name, tmp_path / name, shards=5, **written)
    on_little_disk(hub, folder, tmp_path, monkeypatch, **options)


def of_deepseek(tmp_path: Path) -> Path:
    return checkpoint("deepseek_v3", tmp_path / "source", mode=None, published=True, shards=5)


@pytest.mark.slow
def test_killed_at_fifty_points(hub: HubServer, tmp_path: Path) -> None:
    killed(hub, of_deepseek(tmp_path), tmp_path, 50, group_size=32)
