"""Our own networks beside mlx-lm's, where config.json leaves something out.

Where the two libraries have other defaults, ours are those of transformers, which wrote the files: mlx-lm takes no
``norm_topk_prob`` as false for qwen3_next, and no ``rope_parameters`` of qwen3_5_moe as a base of 100,000, whatever is stated
beside. Published files state both.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from family_checkpoints import FAMILIES, checkpoint, plain

from flash_moe import Model
from flash_moe.models import family_of

PROMPT = [17, 250, 3, 99, 140, 8, 8, 61, 230, 77, 5, 44, 91, 12, 0, 201]
STATED: dict[str, dict[str, Any]] = {
    "qwen3_next": {"norm_topk_prob": True},
    "qwen3_5_moe": {"rope_parameters": {"rope_type": "default", "rope_theta": 1000.0, "partial_rotary_factor": 0.5}},
}


@pytest.mark.parametrize("left_out", [(), ("rope_theta", "partial_rotary_factor"), ("head_dim",), ("mlp_only_layers",)])
@pytest.mark.parametrize("name", STATED)
def test_defaults_are_those_of_transformers(name: str, left_out: tuple[str, ...]) -> None:
    transformers = pytest.importorskip("transformers")
    kind = {"qwen3_next": "Qwen3NextConfig", "qwen3_5_moe": "Qwen3_5MoeTextConfig"}[name]
    raw = {key: value for key, value in FAMILIES[name].items() if key not in left_out}
    theirs, ours = getattr(transformers, kind)(**raw), family_of(name).config(raw)
    rope = theirs.rope_parameters
    assert (ours.rope_theta, ours.head_dim) == (rope["rope_theta"], theirs.head_dim)
    assert ours.rotary_dims == int(theirs.head_dim * rope["partial_rotary_factor"])
    assert ours.norm_topk_prob == getattr(theirs, "norm_topk_prob", True)
    assert ours.layer_types == tuple(theirs.layer_types)
    dense = getattr(theirs, "mlp_only_layers", None) or []
    assert ours.sparse_layers == tuple(i not in dense for i in range(ours.num_hidden_layers))


@pytest.mark.parametrize("name", STATED)
def test_logits_equal_mlx_lms_where_all_is_stated(name: str, tmp_path: Path) -> None:
    stated, silent = (
        checkpoint(name, tmp_path / f"{name}-{i}", **changed) for i, changed in enumerate((STATED[name], {}))
    )
    expected = np.array(plain(stated)(mx.array([PROMPT]))[0].astype(mx.float32))
    for folder in (stated, silent):
        with Model.load(folder, experts_per_token=None, kernels=False) as model:
            np.testing.assert_allclose(np.array(model.logits(PROMPT)), expected, atol=2e-3)
    assert np.abs(np.array(plain(silent)(mx.array([PROMPT]))[0]) - expected).max() > 0.01
