"""The demo model as a Hugging Face checkpoint: the same model in transformers and here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: training the demo model is for developers")
pytest.importorskip("transformers", reason="transformers is not installed: training the demo model is for developers")

from demo_model import export  # noqa: E402
from demo_runs import random_ids  # noqa: E402
from random_checkpoint import write_tokenizer  # noqa: E402

from flash_moe import Model  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def exported(perturbed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    import copy

    (tmp_path / "tokenizer").mkdir()
    write_tokenizer(tmp_path / "tokenizer")
    monkeypatch.setattr(export, "SHARD", "200KB")
    export.export(copy.deepcopy(perturbed), tmp_path / "model", tmp_path / "tokenizer")
    return tmp_path / "model"


def test_export_has_equal_logits_in_transformers_and_here(exported: Path) -> None:
    from transformers import AutoModelForCausalLM

    assert len(list(exported.glob("model-*-of-*.safetensors"))) > 1
    config = json.loads((exported / "config.json").read_text())
    assert (config["eos_token_id"], config["pad_token_id"], config["dtype"]) == (258, 256, "bfloat16")
    ids = random_ids(1, 64)
    theirs = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)(ids).logits[0].detach().numpy()
    with Model.load(exported, experts_per_token=None) as loaded:
        ours = np.array(loaded.logits(ids[0].tolist()))
    np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-3)


def test_export_refuses_a_folder_with_files(perturbed: Any, exported: Path) -> None:
    with pytest.raises(FileExistsError, match="expected a new folder"):
        export.export(perturbed, exported, exported)
