"""Token by token says the same as layer by layer, unless experts are dropped or swapped."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from flash_moe import Model, PromptError
from flash_moe.evaluation import DecodedModel, LayerwiseModel, TokenSequence, divergence, token_scores
from flash_moe.experts.mapped import MappedStore
from flash_moe.nn.streaming_options import StreamingOptions

HALF = [expert % 2 == 0 for expert in range(16)]


@pytest.fixture
def short(sequences: list[TokenSequence]) -> list[TokenSequence]:
    return sequences[:3]


@pytest.fixture
def _half_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MappedStore, "in_memory", lambda self, layer, experts: [HALF[e] for e in experts])


@pytest.mark.parametrize("form", ["packed_checkpoint", "next_checkpoint"])
def test_the_same_states_as_layer_by_layer(
    form: str, short: list[TokenSequence], request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(form)
    tokens = [sequence.tokens for sequence in short]
    expected = LayerwiseModel.open(folder, experts_per_token=2).final_states(tokens)
    model, steps = DecodedModel.open(folder, experts_per_token=2), []
    found = model.final_states(tokens, lambda *step: steps.append(step))
    assert [x.shape for x in found] == [(len(part), 64) for part in tokens]
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(np.array(a), np.array(b), atol=1e-4)
    assert steps == [(done, 48) for done in range(1, 49)]
    assert model.choices == []


@pytest.mark.usefixtures("_half_in_memory")
def test_what_dropping_and_swapping_cost(packed_checkpoint: Path, short: list[TokenSequence]) -> None:
    def measured(**options: float) -> tuple[DecodedModel, float]:
        model = DecodedModel.open(packed_checkpoint, expert_io="mapped", streaming=StreamingOptions(**options))
        return model, divergence(token_scores(model, short, LayerwiseModel.open(packed_checkpoint))).kl.value

    _, exact = measured(prefetch=True)
    little, a_little = measured(drop_cold_below=0.15, prefer_cached=0.05)
    much, a_lot = measured(drop_cold_below=0.4, prefer_cached=0.9)
    assert exact < 1e-6 < a_little < a_lot
    (few,), (many,) = little.choices, much.choices
    assert few.routed == many.routed == 4 * 4 * 48  # K, layers, tokens
    assert 0 < few.swapped < many.swapped
    assert 0 < few.router_mass_dropped + few.router_mass_swapped < many.router_mass_dropped + many.router_mass_swapped


@pytest.mark.usefixtures("_half_in_memory")
def test_the_same_logits_as_generation(packed_checkpoint: Path) -> None:
    """Greedy tokens follow from the states that the same tokens leave behind when they are scored."""
    options = {"drop_cold_below": 0.3, "prefer_cached": 0.3}
    with Model.load(packed_checkpoint, expert_io="mapped", **options) as model:
        model.tokenizer.eos_token_ids = frozenset()
        tokens = [65, *model.generate([65], max_tokens=30, temperature=0).tokens]
    scored = DecodedModel.open(packed_checkpoint, expert_io="mapped", streaming=StreamingOptions(**options))
    (states,) = scored.final_states([tokens[:-1]])
    assert np.array(scored.head()(states)).argmax(axis=1).tolist() == tokens[1:]


@pytest.mark.parametrize("tokens", [[], [288], [1] * 5000], ids=["none", "no token", "too many"])
def test_bad_sequences(packed_checkpoint: Path, tokens: list[int]) -> None:
    with pytest.raises(PromptError):
        DecodedModel.open(packed_checkpoint).final_states([[1], tokens])
