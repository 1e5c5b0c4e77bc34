"""A tiny checkpoint in each form, and a fresh copy of it for tests that damage it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from random_checkpoint import text_config, write_checkpoint

from flash_moe.packing.convert import convert

FORMS = ("fused", "separate", "quantized", "packed")


@pytest.fixture(scope="session")
def tiny_checkpoints(tmp_path_factory: pytest.TempPathFactory, mlx_quantize: Callable[..., Path]) -> dict[str, Path]:
    """One folder for each of FORMS: two layers (one of attention), four experts."""
    folder = tmp_path_factory.mktemp("tiny")
    text = text_config(num_hidden_layers=2, full_attention_interval=2, num_experts=4, num_experts_per_tok=2)
    fused = write_checkpoint(folder / "fused", text)
    separate = write_checkpoint(folder / "separate", text, fused_experts=False)
    quantized = mlx_quantize(fused, folder / "quantized", q_bits=4, q_group_size=32)
    convert(quantized, folder / "packed")
    return {"fused": fused, "separate": separate, "quantized": quantized, "packed": folder / "packed"}


@pytest.fixture
def tiny_copy(tiny_checkpoints: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    """A copy of one form that the test may damage: ``tiny_copy("packed")``."""
    return lambda form: Path(shutil.copytree(tiny_checkpoints[form], tmp_path / form))
