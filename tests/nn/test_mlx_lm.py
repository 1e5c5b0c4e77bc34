"""The network against mlx-lm on the same checkpoints, plain and quantised."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from random_checkpoint import next_config, text_config, write_checkpoint

from flash_moe import Model
from flash_moe.packing.convert import convert

TOKENS = [17, 250, 3, 99, 140, 8, 8, 61, 230, 77, 5]
RECIPES = {
    "2-bit": {"q_bits": 2, "q_group_size": 64},
    "3-bit": {"q_bits": 3, "q_group_size": 32},
    "4-bit": {"q_bits": 4, "q_group_size": 64},
    "5-bit": {"q_bits": 5, "q_group_size": 32},
    "6-bit": {"q_bits": 6, "q_group_size": 64},
    "8-bit": {"q_bits": 8, "q_group_size": 32},
    "mixed-2-6": {"quant_predicate": "mixed_2_6"},
    "mixed-3-4": {"quant_predicate": "mixed_3_4"},
    "mixed-4-6": {"quant_predicate": "mixed_4_6"},
}


def mlx_lm_logits(folder: Path) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from mlx_lm.utils import load_model

        model, _ = load_model(folder)
    model.set_dtype(mx.float32)
    return np.array(model(mx.array([TOKENS]))[0])


def our_logits(folder: Path, **options: object) -> np.ndarray:
    with Model.load(folder, experts_per_token=None, dtype="float32", **options) as model:
        return np.array(model.logits(TOKENS))


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "per-expert"])
@pytest.mark.parametrize("k", [1, 4, 10])
def test_float_logits_equal_mlx_lm(k: int, fused: bool, tmp_path: Path) -> None:
    if fused:
        text, options = text_config(num_experts_per_tok=k), {}
    else:  # the form that mlx-lm reads for Qwen3-Next only
        text, options = next_config(num_experts_per_tok=k), {"prefix": "model.", "nested_config": False}
    folder = write_checkpoint(tmp_path / "model", text, fused_experts=fused, **options)
    np.testing.assert_allclose(our_logits(folder), mlx_lm_logits(folder), atol=1e-4, rtol=0)


@pytest.mark.parametrize("recipe", RECIPES)
def test_quantized_logits_equal_mlx_lm(
    recipe: str, float_checkpoint: Path, mlx_quantize: Callable[..., Path], tmp_path: Path
) -> None:
    quantized = mlx_quantize(float_checkpoint, tmp_path / "quantized", **RECIPES[recipe])
    expected = mlx_lm_logits(quantized)
    np.testing.assert_allclose(our_logits(quantized), expected, atol=1e-3, rtol=0)
    convert(quantized, tmp_path / "packed")
    np.testing.assert_array_equal(our_logits(tmp_path / "packed"), our_logits(quantized))


def test_quantized_qwen3_next_equals_mlx_lm(
    next_checkpoint: Path, mlx_quantize: Callable[..., Path], tmp_path: Path
) -> None:
    quantized = mlx_quantize(next_checkpoint, tmp_path / "quantized", q_bits=4, q_group_size=32)
    convert(quantized, tmp_path / "packed")
    expected = mlx_lm_logits(quantized)
    for folder in (quantized, tmp_path / "packed"):
        np.testing.assert_allclose(our_logits(folder), expected, atol=1e-3, rtol=0)


def test_bfloat16_activations_stay_close(quantized_checkpoint: Path) -> None:
    """bf16 end to end, against float32: a sanity bound, since MLX's CPU bf16 products are no oracle."""
    with Model.load(quantized_checkpoint, experts_per_token=None, dtype="bfloat16") as model:
        logits = np.array(model.logits(TOKENS[:3]))
    exact = our_logits(quantized_checkpoint)[:3]
    assert np.corrcoef(logits.ravel(), exact.ravel())[0, 1] > 0.95
