"""Perplexity and divergence against float64 from the whole model's logits."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from random_checkpoint import text_config, write_checkpoint

from flash_moe import ArgumentError, Model, NumericalError
from flash_moe.evaluation import LayerwiseModel, TokenSequence, divergence, perplexity, token_scores
from flash_moe.evaluation.distributions import Distributions


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def whole_model(folder: Path, k: int | None, sequences: Sequence[TokenSequence]) -> np.ndarray:
    """Log-probabilities of all predictions of all sequences, [N, V] float64."""
    with Model.load(folder, experts_per_token=k) as model:
        return np.concatenate([log_softmax(np.array(model.logits(s.tokens)))[:-1] for s in sequences])


@pytest.fixture(params=[64 << 20, 5 * 4 * 288], ids=["large chunks", "5 rows"])
def _chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LayerwiseModel, "chunk_bytes", request.param)


@pytest.mark.usefixtures("_chunks")
def test_against_float64(packed_checkpoint: Path, float_checkpoint: Path, sequences: list[TokenSequence]) -> None:
    model = LayerwiseModel.open(packed_checkpoint, experts_per_token=2)
    reference = LayerwiseModel.open(float_checkpoint, experts_per_token=None)
    stages: dict[str, list[tuple[int, int]]] = {}
    scores = token_scores(model, sequences, reference, lambda stage, *done: stages.setdefault(stage, []).append(done))
    q, p = whole_model(packed_checkpoint, 2, sequences), whole_model(float_checkpoint, None, sequences)
    targets = np.concatenate([s.tokens[1:] for s in sequences]).astype(int)
    nll, reference_nll = (-x[np.arange(len(targets)), targets] for x in (q, p))
    kl = (np.exp(p) * (p - q)).sum(axis=1)
    same = p.argmax(axis=1) == q.argmax(axis=1)
    assert 0.1 < kl.mean() < 3 and 0.1 < same.mean() < 0.9

    assert scores.comparison is not None
    np.testing.assert_allclose(scores.nll, nll, atol=1e-4)
    np.testing.assert_allclose(scores.comparison.nll, reference_nll, atol=1e-4)
    np.testing.assert_allclose(scores.comparison.kl, kl, atol=1e-4)
    np.testing.assert_array_equal(scores.comparison.same_top, same)
    np.testing.assert_array_equal(scores.sequence, np.repeat([0, 2, 3], [39, 6, 1029]))

    own, found = perplexity(scores), divergence(scores)
    assert (own.tokens, own.sequences) == (1074, 3)
    assert own.perplexity.value == pytest.approx(math.exp(nll.mean()), rel=1e-5)
    assert found.reference.perplexity.value == pytest.approx(math.exp(reference_nll.mean()), rel=1e-5)
    assert found.perplexity_ratio.value == pytest.approx(math.exp((nll - reference_nll).mean()), rel=1e-5)
    assert found.kl.value == pytest.approx(kl.mean(), abs=1e-5)
    assert found.kl_999 == pytest.approx(np.quantile(kl, 0.999), abs=1e-4)
    assert found.kl_max == pytest.approx(kl.max(), abs=1e-4)
    assert found.same_top.value == same.mean()

    mask = np.concatenate([s.assistant[1:] for s in sequences]).astype(bool)
    part = scores.of_assistant()
    assert part is not None
    assert perplexity(part).nll.value == pytest.approx(nll[mask].mean(), abs=1e-5)
    assert divergence(part).kl.value == pytest.approx(kl[mask].mean(), abs=1e-5)
    assert perplexity(part).tokens == mask.sum()

    assert set(stages) == {"reference layers", "layers", "tokens"}
    assert stages["layers"] == stages["reference layers"] == [(done, 4) for done in range(5)]
    assert stages["tokens"][-1] == (1074, 1074)


def test_a_model_does_not_diverge_from_itself(packed_checkpoint: Path, sequences: list[TokenSequence]) -> None:
    model = LayerwiseModel.open(packed_checkpoint, experts_per_token=None)
    for reference in (model, LayerwiseModel.open(packed_checkpoint, experts_per_token=None, expert_io="resident")):
        found = divergence(token_scores(model, sequences, reference))
        assert 0 <= found.kl.value <= found.kl_999 <= found.kl_max < 1e-6
        assert found.same_top.value == 1
        assert found.perplexity_ratio.value == pytest.approx(1, abs=1e-9)


def test_fewer_experts_diverge_more(packed_checkpoint: Path, sequences: list[TokenSequence]) -> None:
    reference = LayerwiseModel.open(packed_checkpoint, experts_per_token=None)
    found = [
        divergence(token_scores(LayerwiseModel.open(packed_checkpoint, experts_per_token=k), sequences, reference))
        for k in (3, 2, 1)
    ]
    assert 0 < found[0].kl.value < found[1].kl.value < found[2].kl.value
    assert found[0].same_top.value > found[1].same_top.value > found[2].same_top.value


def test_without_a_reference(packed_checkpoint: Path, sequences: list[TokenSequence]) -> None:
    plain = [dataclasses.replace(s, assistant=(False,) * len(s.tokens)) for s in sequences[:3]]
    scores = token_scores(LayerwiseModel.open(packed_checkpoint), plain)
    assert scores.comparison is None and scores.of_assistant() is None
    with pytest.raises(ArgumentError, match="pass a reference"):
        divergence(scores)
    assert json.loads(json.dumps(dataclasses.asdict(perplexity(scores))))["tokens"] == 45
    assert str(perplexity(scores)).endswith("over 45 tokens of 2 sequences")


def test_nothing_to_predict(packed_checkpoint: Path, sequences: list[TokenSequence]) -> None:
    for few in ([], [sequences[1]]):
        with pytest.raises(ArgumentError, match="no sequence has two tokens"):
            token_scores(LayerwiseModel.open(packed_checkpoint), few)


def test_a_reference_with_another_vocabulary(
    packed_checkpoint: Path, sequences: list[TokenSequence], tmp_path: Path
) -> None:
    model = LayerwiseModel.open(packed_checkpoint)
    other = write_checkpoint(tmp_path / "other", text_config(vocab_size=320))
    with pytest.raises(ArgumentError, match="vocabulary of 320 tokens, the model one of 288"):
        token_scores(model, sequences, LayerwiseModel.open(other))
    renamed = Path(shutil.copytree(packed_checkpoint, tmp_path / "renamed"))
    tokenizer = json.loads((renamed / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (renamed / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ArgumentError, match="are another text"):
        token_scores(model, sequences, LayerwiseModel.open(renamed))


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
def test_distributions_of_large_vocabularies(scale: float) -> None:
    rng = np.random.default_rng(0)
    a = (scale * rng.standard_normal((3, 50_000)) + 7).astype(np.float32)
    b = (a + 0.01 * scale * rng.standard_normal(a.shape)).astype(np.float32)
    p, q = log_softmax(a), log_softmax(b)
    tokens = np.array([0, 1, 49_999])
    np.testing.assert_allclose(Distributions(a).nll(tokens), -p[np.arange(3), tokens], rtol=1e-6, atol=1e-6)
    expected = (np.exp(p) * (p - q)).sum(axis=1)
    np.testing.assert_allclose(Distributions(a).kl(Distributions(b)), expected, rtol=1e-3, atol=1e-8)
    assert Distributions(a).kl(Distributions(a)).tolist() == [0, 0, 0]
    np.testing.assert_array_equal(Distributions(a).top(), a.argmax(axis=1))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_no_numbers(value: float) -> None:
    with pytest.raises(NumericalError, match="output head"):
        Distributions(np.array([[0, value]], np.float32))
