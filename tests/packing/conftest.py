"""A tiny float checkpoint, the same one quantised by mlx_lm, and its undisturbed conversion."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from random_checkpoint import text_config, write_checkpoint

from flash_moe.packing.convert import convert


@pytest.fixture(scope="session")
def small_float(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers (one of attention), four experts."""
    text = text_config(num_hidden_layers=2, full_attention_interval=2, num_experts=4, num_experts_per_tok=2)
    return write_checkpoint(tmp_path_factory.mktemp("small") / "float", text)


@pytest.fixture(scope="session")
def small_quantized(
    small_float: Path, mlx_quantize: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """4 bits in groups of 64, by ``mlx_lm.convert``."""
    return mlx_quantize(small_float, tmp_path_factory.mktemp("small") / "quantized", q_bits=4, q_group_size=64)


@pytest.fixture(scope="session")
def small_packed(small_quantized: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small") / "packed"
    convert(small_quantized, folder)
    return folder
