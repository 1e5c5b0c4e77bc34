"""The network against logits recorded from transformers (tools/record_golden.py)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from random_checkpoint import write_checkpoint
from record_golden import CASES, GOLDEN, tokens_of

from flash_moe import Model

TOLERANCE = 1e-4


def layouts(case: str) -> list[dict]:
    """The Hugging Face layouts in which a case can be stored."""
    if CASES[case]["model_type"] == "qwen3_next":
        return [{"prefix": "model.", "nested_config": False, "fused_experts": fused} for fused in (True, False)]
    return [
        {"prefix": "model.language_model.", "nested_config": True, "fused_experts": True},
        {"prefix": "model.", "nested_config": False, "fused_experts": False},
    ]


@pytest.mark.parametrize("layout", [0, 1], ids=["fused", "per-expert"])
@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case: str, layout: int, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", CASES[case], **layouts(case)[layout])
    golden = np.load(GOLDEN / f"{case}.npy")
    with Model.load(folder, experts_per_token=None, dtype="float32") as model:
        logits = np.array(model.logits(tokens_of(case)))
    assert logits.dtype == np.float32
    assert logits.shape == golden.shape
    np.testing.assert_allclose(logits, golden, atol=TOLERANCE, rtol=0)


def test_vision_and_mtp_tensors_are_ignored(tmp_path: Path) -> None:
    extra = {
        "model.visual.patch_embed.proj.weight": np.ones((4, 4), np.float32),
        "mtp.layers.0.mlp.gate.weight": np.full((4, 4), np.nan, np.float32),
        "mtp.norm.weight": np.full(64, np.nan, np.float32),
    }
    folder = write_checkpoint(tmp_path / "model", CASES["default"], extra=extra)
    with Model.load(folder, experts_per_token=None, dtype="float32") as model:
        logits = np.array(model.logits(tokens_of("default")))
    np.testing.assert_allclose(logits, np.load(GOLDEN / "default.npy"), atol=TOLERANCE, rtol=0)
