"""Layer by layer over all sequences is the same as the whole model over each; memory for one layer is enough."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from random_checkpoint import next_config, text_config, write_checkpoint

from flash_moe import ArgumentError, Model, NumericalError, PromptError
from flash_moe.evaluation import LayerwiseModel, TokenSequence
from flash_moe.experts.opening import open_store
from flash_moe.experts.store import ExpertStore

TOLERANCE = {"float32": 1e-4, "bfloat16": 0.02}  # of logits of a few units


def layerwise_logits(model: LayerwiseModel, sequences: Sequence[TokenSequence]) -> list[np.ndarray]:
    head = model.head()
    states = model.final_states([sequence.tokens for sequence in sequences])
    return [np.array(head(x).astype(mx.float32)) for x in states]


def check(folder: Path, sequences: Sequence[TokenSequence], **options: object) -> None:
    found = layerwise_logits(LayerwiseModel.open(folder, **options), sequences)
    with Model.load(folder, **options) as model:
        for sequence, logits in zip(sequences, found, strict=True):
            expected = np.array(model.logits(sequence.tokens))
            assert expected.std() > 0.3
            tolerance = TOLERANCE[str(options.get("dtype", "float32"))]
            np.testing.assert_allclose(logits, expected, atol=tolerance, err_msg=f"{len(sequence.tokens)} tokens")


@pytest.mark.parametrize("checkpoint", ["float", "quantized", "packed"])
@pytest.mark.parametrize("expert_io", ["mapped", "slots", "resident"])
@pytest.mark.parametrize("k", [1, 3, None], ids=["one", "below", "own"])
def test_equals_the_whole_model(
    checkpoint: str, expert_io: str, k: int | None, sequences: list[TokenSequence], request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(f"{checkpoint}_checkpoint")
    check(folder, sequences[:3], experts_per_token=k, expert_io=expert_io)


def test_equals_the_whole_model_beyond_a_chunk(packed_checkpoint: Path, sequences: list[TokenSequence]) -> None:
    check(packed_checkpoint, sequences)


def test_other_architectures(tmp_path: Path, next_checkpoint: Path, sequences: list[TokenSequence]) -> None:
    check(next_checkpoint, sequences[:3])
    dense = next_config(mlp_only_layers=[1, 3], tie_word_embeddings=True)
    check(write_checkpoint(tmp_path / "dense", dense, prefix="model.", nested_config=False), sequences[:3])


def test_other_dtypes(packed_checkpoint: Path, sequences: list[TokenSequence]) -> None:
    check(packed_checkpoint, sequences[:3], dtype="bfloat16")


def test_every_expert_is_fetched_once(
    packed_checkpoint: Path, sequences: list[TokenSequence], monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched: list[tuple[int, int]] = []

    def counting(*arguments: object) -> ExpertStore:
        store = open_store(*arguments)
        fetch = store.fetch
        monkeypatch.setattr(
            store, "fetch", lambda layer, ids: fetched.extend((layer, e) for e in ids) or fetch(layer, ids)
        )
        return store

    monkeypatch.setattr("flash_moe.evaluation.layerwise_model.open_store", counting)
    progress: list[tuple[int, int]] = []
    model = LayerwiseModel.open(packed_checkpoint)
    model.final_states([sequence.tokens for sequence in sequences], lambda *done: progress.append(done))
    assert sorted(fetched) == [(layer, expert) for layer in range(4) for expert in range(16)]
    assert progress == [(done, 4) for done in range(5)]


MEMORY = """
import json, sys
import mlx.core as mx
from flash_moe.models import open_model
from flash_moe.evaluation import LayerwiseModel

model = LayerwiseModel.open(sys.argv[1])
model.final_states([range(200), range(100)])
resident = model.checkpoint.resident
sizes = [sum(t.nbytes for n, t in resident.items() if n.startswith(f"layers.{i}.")) for i in range(16)]
print(json.dumps({"peak": mx.get_peak_memory(), "left": mx.get_active_memory(), "layer": max(sizes), "all": sum(sizes)}))
"""


def test_one_layer_of_memory(tmp_path: Path) -> None:
    config = text_config(
        hidden_size=256, num_hidden_layers=16, num_experts=4, moe_intermediate_size=8, linear_num_value_heads=16,
        shared_expert_intermediate_size=2048,
    )  # fmt: skip
    folder = write_checkpoint(tmp_path / "deep", config)
    done = subprocess.run([sys.executable, "-c", MEMORY, str(folder)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["all"] > 12 * found["layer"]
    assert found["peak"] < 4 * found["layer"]
    assert found["left"] < found["layer"]


def test_bad_sequences(packed_checkpoint: Path) -> None:
    model = LayerwiseModel.open(packed_checkpoint)
    with pytest.raises(PromptError, match=r"sequence 2 has 4097 tokens.*4096"):
        model.final_states([[1], [1] * 4097])
    with pytest.raises(PromptError, match="outside the vocabulary"):
        model.final_states([[1], [288]])
    with pytest.raises(PromptError, match="no tokens"):
        model.final_states([[1], []])


def test_bad_options(packed_checkpoint: Path) -> None:
    with pytest.raises(ArgumentError, match="expected an integer from 1 to 4"):
        LayerwiseModel.open(packed_checkpoint, experts_per_token=17)
    with pytest.raises(ArgumentError, match="dtype is 'int8'"):
        LayerwiseModel.open(packed_checkpoint, dtype="int8")
    with pytest.raises(ArgumentError, match="expert_io is 'magic'"):
        LayerwiseModel.open(packed_checkpoint, expert_io="magic").final_states([[1]])  # type: ignore[arg-type]


def test_nan_is_an_error(float_checkpoint: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    folder = Path(shutil.copytree(float_checkpoint, tmp_path / "damaged"))
    for file in folder.glob("*.safetensors"):
        weights = load_file(file)
        for name in weights:
            if name.endswith("layers.2.mlp.gate.weight"):
                weights[name][:] = np.nan
        save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(NumericalError, match="router of layer 2"):
        LayerwiseModel.open(folder).final_states([[1, 2, 3]])
