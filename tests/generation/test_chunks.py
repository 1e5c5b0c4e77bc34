"""The number of tokens that go through the layers together."""

from __future__ import annotations

from random_checkpoint import text_config

from flash_moe.generation.chunks import prefill_chunk
from flash_moe.models import family_of


def test_chunks_follow_memory() -> None:
    config = family_of("qwen3_5_moe").config(text_config(hidden_size=4096))
    chunks = [prefill_chunk(config, 10, gigabytes << 30) for gigabytes in (1, 8, 24, 48, 1024)]
    assert chunks == [256, 512, 1536, 3072, 4096]
    assert prefill_chunk(config, 4, 24 << 30) == 2304
