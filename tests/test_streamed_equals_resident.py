"""The store must not change a single bit: greedy tokens from every store, packed and unpacked."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from flash_moe import Model

PROMPT = [80, 72, 101, 108, 108, 111, 32, 119]
LENGTHS = [40, pytest.param(200, marks=pytest.mark.slow)]
STORES = {
    "mapped": {"expert_io": "mapped"},
    "slots": {"expert_io": "slots"},
    "slots-cached": {"expert_io": "slots", "expert_cache": 20 * 16384},
    "resident": {"expert_io": "resident"},
}


def run(folder: Path, k: int, count: int, **options: object) -> tuple[tuple[int, ...], np.ndarray]:
    with Model.load(folder, experts_per_token=k, **options) as model:
        model.tokenizer.eos_token_ids = frozenset()
        result = model.generate(PROMPT, max_tokens=count, temperature=0)
        return result.tokens, np.array(model.logits(PROMPT))


@pytest.mark.parametrize("count", LENGTHS)
@pytest.mark.parametrize("k", [1, pytest.param(3, marks=pytest.mark.slow), 4])
def test_every_store_gives_the_same_tokens_and_logits(
    k: int, count: int, quantized_checkpoint: Path, packed_checkpoint: Path
) -> None:
    expected, logits = run(quantized_checkpoint, k, count, expert_io="resident")
    assert len(expected) == count
    assert len(set(expected)) > 10, "a degenerate sequence would hide differences"
    others = [(quantized_checkpoint, name) for name in STORES if name != "resident"]
    for folder, name in [*others, *((packed_checkpoint, name) for name in STORES)]:
        tokens, streamed = run(folder, k, count, **STORES[name])
        assert tokens == expected, (folder.name, name)
        np.testing.assert_array_equal(streamed, logits, err_msg=f"{folder.name} {name}")


@pytest.mark.parametrize("count", LENGTHS)
@pytest.mark.parametrize("k", [1, 3, 4])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_float_checkpoints_stream_too(k: int, count: int, dtype: str, float_checkpoint: Path) -> None:
    expected, logits = run(float_checkpoint, k, count, dtype=dtype, expert_io="resident")
    for name in ("mapped", "slots"):
        tokens, streamed = run(float_checkpoint, k, count, dtype=dtype, **STORES[name])
        assert tokens == expected, name
        np.testing.assert_array_equal(streamed, logits, err_msg=name)
