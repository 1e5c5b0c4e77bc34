"""The number of tokens that go through the layers together."""

from __future__ import annotations

import pytest
from random_checkpoint import text_config

from flash_moe.config import ModelConfig
from flash_moe.generation.chunks import memory_limit, prefill_chunk


def test_chunks_follow_memory() -> None:
    config = ModelConfig.from_dict(text_config(hidden_size=4096))
    chunks = [prefill_chunk(config, 10, gigabytes << 30) for gigabytes in (1, 8, 24, 48, 1024)]
    assert chunks == [256, 512, 1536, 3072, 4096]
    assert prefill_chunk(config, 4, 24 << 30) == 2304


def test_memory_is_the_least_that_the_system_names(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    limit, unlimited = tmp_path / "limit", tmp_path / "unlimited"
    limit.write_text("1000000\n")
    unlimited.write_text("max\n")
    everything = memory_limit()
    assert everything > 1 << 26
    monkeypatch.setattr("flash_moe.generation.chunks._CGROUP_LIMITS", (str(tmp_path / "absent"), str(unlimited)))
    assert memory_limit() >= everything
    monkeypatch.setattr("flash_moe.generation.chunks._CGROUP_LIMITS", (str(limit),))
    assert memory_limit() == 1_000_000
