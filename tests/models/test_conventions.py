"""Whose conventions a checkpoint follows is told by names, never by the shape of a convolution."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from expected_records import rewrite
from random_checkpoint import text_config, write_checkpoint

from flash_moe import CheckpointError, ConfigError, Model
from flash_moe.models import FAMILIES, open_model


@pytest.mark.parametrize("form", ["float", "quantized", "packed"])
def test_form_is_told_by_the_names_of_experts(form: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(f"{form}_checkpoint")
    assert open_model(folder).follows_mlx == (form != "float")


def test_a_convolution_of_the_other_convention_is_an_error(float_checkpoint: Path, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "mixed", text_config())
    for file in folder.glob("*.safetensors"):
        rewrite(file, lambda tensors: tensors.update(
            {name: np.swapaxes(a, 1, 2) for name, a in tensors.items() if name.endswith("conv1d.weight")}
        ))  # fmt: skip
    with pytest.raises(CheckpointError, match=r"expected \[C, 1, taps\]"):
        Model.load(folder)


def test_metadata_does_not_decide(float_checkpoint: Path, tmp_path: Path) -> None:
    """Hugging Face's names, saved by MLX: norms are still zero-centred."""
    folder = write_checkpoint(tmp_path / "saved", text_config())
    for file in folder.glob("*.safetensors"):
        mx.save_safetensors(str(file), dict(mx.load(str(file))), metadata={"format": "mlx"})
    with Model.load(folder) as ours, Model.load(float_checkpoint) as original:
        np.testing.assert_array_equal(np.array(ours.logits([1, 2, 3])), np.array(original.logits([1, 2, 3])))


def test_a_family_nobody_knows(float_checkpoint: Path, tmp_path: Path, edit_config: Callable) -> None:
    folder = write_checkpoint(tmp_path / "unknown", text_config())
    edit_config(folder, lambda config: config.update(model_type="foo_moe"))
    known = [model_type for family in FAMILIES for model_type in family.model_types]
    with pytest.raises(ConfigError, match=f"'foo_moe'.*{', '.join(known)}"):
        open_model(folder)
