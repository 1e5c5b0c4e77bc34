"""What `flash_moe.bench.phases` reports is what the store and the operating system counted."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from flash_moe import ArgumentError, Model
from flash_moe.bench.phases import ModelReport, bench, hit_rate, sample_prompt

LAYERS, K, TOKENS, PROMPT = 4, 4, 3, 20


@pytest.fixture(scope="module", params=["mapped", "slots"])
def report(request: pytest.FixtureRequest, packed_checkpoint: Path) -> Iterator[ModelReport]:
    with Model.load(packed_checkpoint, expert_io=request.param) as model:
        yield bench(model, sample_prompt(model, PROMPT), TOKENS, runs=2)


def test_phases(report: ModelReport, packed_checkpoint: Path) -> None:
    phases = [(phase.name, phase.cold, phase.tokens, len(phase.seconds)) for phase in report.phases]
    assert phases == [
        ("prefill", True, 2 * PROMPT, 2),
        ("decode", True, TOKENS, TOKENS),
        ("prefill", False, 2 * PROMPT, 2),
        ("decode", False, TOKENS, TOKENS),
    ]
    assert (report.path, report.experts_per_token, report.prompt_tokens) == (str(packed_checkpoint), K, PROMPT)


def test_cold_is_cold(report: ModelReport) -> None:
    cold = [phase for phase in report.phases if phase.cold]
    if any(phase.leftover_bytes for phase in cold):
        pytest.skip("this file system keeps its pages")
    for phase in cold:
        assert 0 < phase.experts.bytes_missing <= phase.experts.bytes_requested == phase.experts.bytes_loaded
        if sys.platform == "linux":  # reading one record may bring in parts of others before they are asked for
            assert phase.disk_bytes is not None
            assert phase.disk_bytes >= phase.experts.bytes_requested


def test_warm_is_warm(report: ModelReport) -> None:
    for phase in report.phases:
        if not phase.cold:
            assert (phase.leftover_bytes, phase.experts.bytes_missing, hit_rate(phase.experts)) == (None, 0, 1.0)


def test_a_token_asks_for_its_experts(report: ModelReport, packed_checkpoint: Path) -> None:
    with Model.load(packed_checkpoint) as model:
        strides = {layer: layout.stride for layer, layout in model.expert_store.layouts.items()}
    for phase in report.phases:
        if phase.name == "decode":
            assert phase.experts.bytes_requested == TOKENS * K * sum(strides.values())
            assert {i: stats.bytes_requested for i, stats in phase.layers.items()} == {
                i: TOKENS * K * stride for i, stride in strides.items()
            }


def test_layers_add_up(report: ModelReport) -> None:
    for phase in report.phases:
        for name in ("fetches", "bytes_requested", "bytes_loaded", "bytes_missing"):
            assert sum(getattr(s, name) for s in phase.layers.values()) == getattr(phase.experts, name)
        spent = sum(stats.seconds for stats in phase.layers.values())
        assert spent == pytest.approx(phase.experts.seconds)
        assert 0 < phase.experts.fetch_seconds < spent < sum(phase.seconds)
        assert phase.fetch_seconds < phase.token_seconds


def test_json_holds_everything(report: ModelReport) -> None:
    found = json.loads(json.dumps(report.to_dict()))
    assert set(found) == set(report.__dataclass_fields__)
    for phase, original in zip(found["phases"], report.phases, strict=True):
        assert set(phase) >= {*original.__dataclass_fields__, "hit_rate", "token_seconds", "fetch_seconds_per_token"}
        assert len(phase["layers"]) == LAYERS
        assert phase["token_seconds"] == original.token_seconds


def test_a_resident_store_has_no_cold_phases(packed_checkpoint: Path) -> None:
    with Model.load(packed_checkpoint, expert_io="resident") as model:
        found = bench(model, [1, 2, 3], 2)
    assert [(phase.name, phase.cold) for phase in found.phases] == [("prefill", False), ("decode", False)]
    assert all(phase.experts.bytes_loaded == 0 for phase in found.phases)


def test_an_end_of_sequence_ends_nothing(packed_checkpoint: Path) -> None:
    with Model.load(packed_checkpoint) as model:
        model.tokenizer.eos_token_ids = everything = frozenset(range(model.config.vocab_size))
        found = bench(model, [1, 2, 3], 4)
        assert [len(phase.seconds) for phase in found.phases] == [1, 4, 1, 4]
        assert model.tokenizer.eos_token_ids == everything


@pytest.mark.parametrize(("prompt", "tokens", "runs"), [(0, 1, 1), (1, 0, 1), (1, 1, 0), (4000, 96, 1)])
def test_argument_errors(packed_checkpoint: Path, prompt: int, tokens: int, runs: int) -> None:
    with Model.load(packed_checkpoint) as model, pytest.raises(ArgumentError, match="fewer than 4096 tokens in all"):
        bench(model, [1] * prompt, tokens, runs=runs)


@pytest.mark.parametrize("tokens", [1, 100, 5000])
def test_the_prompt_has_the_length_that_was_asked_for(packed_checkpoint: Path, tokens: int) -> None:
    with Model.load(packed_checkpoint) as model:
        prompt = sample_prompt(model, tokens)
    assert len(prompt) == tokens
    assert all(0 <= token < 288 for token in prompt)
