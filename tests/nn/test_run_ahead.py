"""Tokens that run ahead give the same bits as tokens that wait, whatever is loaded; and the faster way is chosen."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flash_moe import Model
from flash_moe.experts import opening
from flash_moe.nn import decoder, decoder_layer
from flash_moe.nn.run_ahead import GAIN, PHASE, RECHECK, AheadSwitch, best_length

TOKENS = [80, 72, 101, 108, 111, 32, 119, 80]
EXPERTS = 16


class Fixed(AheadSwitch):
    """A way that does not change."""

    def __init__(self, ahead: bool) -> None:
        super().__init__(4)
        self.ahead = ahead

    def record(self, seconds: float, misses: int) -> None:
        pass


@pytest.fixture(scope="module")
def model(quantized_checkpoint: Path) -> Iterator[Model]:
    """A model on the path of GPUs without tracing, with a bank for a part of the experts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mx, "compile", lambda function: function)
        for module in (decoder, decoder_layer):
            patch.setattr(module, "on_gpu", lambda: True)
        patch.setattr(opening, "_GROUP_BYTES", 0)  # a fetch of a prompt asks for no more than a token's experts
        with Model.load(quantized_checkpoint, expert_io="slots", expert_cache=24 << 14, dtype="float32") as model:
            assert model._store._count == 32  # type: ignore[attr-defined]
            yield model


def run(model: Model, ahead: bool, load: list[list[tuple[int, int]]], length: int = 4) -> list[np.ndarray]:
    """Logits and states after every token; before it, some experts are fetched, which takes the place of others."""
    model._store.evict()
    assert model._decoder.run_ahead is not None
    model._decoder.run_ahead.switch = Fixed(ahead)
    model._decoder.run_ahead.switch.length = length
    cache, found = model._decoder.new_cache(), []
    for token, keys in zip(TOKENS, load, strict=True):
        for layer, expert in keys:
            model._store.fetch(layer, [expert])
        hidden = model._decoder(mx.array([token]), cache)
        states = [array for layer in cache.layers for array in layer.arrays]
        found += [np.array(model._decoder.logits(hidden)), *(np.array(state) for state in states)]
    return found


KEYS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, EXPERTS - 1)), max_size=80)


@settings(max_examples=12)
@given(st.lists(KEYS, min_size=len(TOKENS), max_size=len(TOKENS)), st.integers(1, 4))
def test_every_mixture_of_hits_and_misses_gives_the_same_bits(
    model: Model, load: list[list[tuple[int, int]]], length: int
) -> None:
    for waited, ahead in zip(run(model, False, load), run(model, True, load, length), strict=True):
        np.testing.assert_array_equal(waited, ahead)


def test_a_token_whose_experts_are_loaded_reads_nothing_and_restarts_nowhere(model: Model) -> None:
    counters, stats = model._decoder.run_ahead.counters, model._store.stats  # type: ignore[union-attr]
    run(model, True, [[] for _ in TOKENS])
    cache = model._decoder.new_cache()
    for _ in range(2):  # the second time the same token finds what the first has loaded
        before = counters.clean, counters.restarts, stats.bytes_loaded, stats.fetches
        model._decoder(mx.array([TOKENS[0]]), cache)
        cache = model._decoder.new_cache()
    assert (counters.clean, counters.restarts) == (before[0] + 1, before[1])
    assert (stats.bytes_loaded, stats.fetches) == (before[2], before[3] + 4)


def test_restarts_are_bounded(model: Model) -> None:
    counters = model._decoder.run_ahead.counters  # type: ignore[union-attr]
    before = counters.restarts
    run(model, True, [[] for _ in TOKENS])
    assert 0 < counters.restarts - before <= 4 * len(TOKENS)


def test_used_experts_are_the_last_to_give_way(model: Model) -> None:
    store = model._store
    store.evict()
    for expert in range(3):
        store.fetch(0, [expert])
    assert store.use_loaded([0], np.array([[0, 1]], np.uint32)) == 1
    assert next(iter(store._slots._slot_of)) == (0, 2)  # type: ignore[attr-defined]
    assert store.use_loaded([0, 1], np.array([[0, 1], [0, 0]], np.uint32)) == 1
    store.evict()
    assert store.use_loaded([0], np.array([[0, 1]], np.uint32)) == 0


def phase(switch: AheadSwitch, seconds: float, misses: int = 0) -> None:
    for _ in range(PHASE):
        switch.record(seconds, misses)


def test_the_faster_way_is_chosen_and_the_other_tried_again() -> None:
    switch = AheadSwitch(60)
    assert not switch.ahead
    phase(switch, 2.0)
    assert switch.ahead
    phase(switch, 1.0)
    assert switch.ahead
    phase(switch, 3.0)
    assert not switch.ahead
    phases = 0
    while not switch.ahead:
        phase(switch, 2.0)
        phases += 1
    assert RECHECK - 3 <= phases <= RECHECK
    phase(switch, 3.0)
    assert not switch.ahead


def test_with_many_misses_nothing_runs_ahead() -> None:
    switch = AheadSwitch(60)
    for _ in range(3 * RECHECK):
        phase(switch, 1.0, 60)
        assert not switch.ahead
    phase(switch, 1.0, 0)
    assert switch.ahead
    phase(switch, 0.5, 60)
    assert not switch.ahead


def test_the_fewer_misses_the_more_layers_before_the_host_looks() -> None:
    lengths, promised = zip(*(best_length(missing, 60) for missing in (0.0, 0.001, 0.02, 0.2, 0.8)), strict=True)
    assert lengths[0] == 60
    assert list(lengths) == sorted(lengths, reverse=True)
    assert list(promised) == sorted(promised, reverse=True)
    assert promised[0] == pytest.approx(0.5, abs=0.01)
    assert promised[3] > GAIN > promised[4]


def test_the_statistics_say_what_was_done(model: Model) -> None:
    assert model._decoder.run_ahead is not None
    model._decoder.run_ahead.switch = Fixed(True)
    model.tokenizer.eos_token_ids = frozenset()
    reply = model.generate(TOKENS, max_tokens=6)
    ahead = reply.stats.ahead
    assert ahead is not None
    assert (ahead.decision, ahead.waited) == ("on", 0)
    assert ahead.tokens == 5  # the first token comes from the prompt
    assert "5 of 5 tokens ran ahead" in str(reply.stats)
    assert reply.stats.to_dict()["ahead"]["clean"] == ahead.clean
