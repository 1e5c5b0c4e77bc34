"""Experts of mlx-lm's networks, streamed: the same bits as mlx-lm itself gives."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from family_checkpoints import FAMILIES, plain, write
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache

from flash_moe.models.adapted import stream_experts

QUICK = (
    "qwen3_moe", "glm4_moe", "deepseek_v3", "kimi_k2", "minimax_m2", "gpt_oss", "mixtral", "olmoe", "hunyuan",
    "bailing_moe", "nemotron_h", "llama4",
)  # fmt: skip
PROMPT = [17, 250, 3, 99, 140, 8, 8, 61, 230, 77, 5, 44, 91, 12, 0, 201]


@pytest.fixture(autouse=True)
def not_compiled() -> Iterator[None]:
    """On the CPU, MLX has a C++ compiler make each of mlx-lm's compiled functions, which takes seconds a family."""
    mx.disable_compile()
    yield
    mx.enable_compile()


def families() -> list[Any]:
    return [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in FAMILIES]


def greedy(model: Any, count: int = 6) -> tuple[np.ndarray, list[int]]:
    """Logits of a prompt and of each greedy token after it, and these tokens."""
    cache = make_prompt_cache(model)
    rows = [model(mx.array([PROMPT]), cache=cache)[0]]
    tokens: list[int] = []
    for _ in range(count):
        tokens.append(int(mx.argmax(rows[-1][-1])))
        rows.append(model(mx.array([tokens[-1:]]), cache=cache)[0])
    return np.array(mx.concatenate(rows).astype(mx.float32)), tokens


@pytest.mark.parametrize("name", families())
def test_streamed_equals_mlx_lm(name: str, tmp_path: Path) -> None:
    folder = write(name, tmp_path / name)
    expected, expected_tokens = greedy(plain(folder))
    model = plain(folder)
    store = stream_experts(model, folder)
    left = [path for path, _ in tree_flatten(model.parameters()) if ".switch_mlp." in path or ".experts." in path]
    logits, tokens = greedy(model)
    np.testing.assert_array_equal(logits, expected)
    assert (tokens, left) == (expected_tokens, [])
    assert store.stats.bytes_requested > 0
    store.close()
