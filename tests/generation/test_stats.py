"""Statistics: arithmetic of the derived figures, and the line people read."""

from __future__ import annotations

import dataclasses

import pytest

from flash_moe.amounts import format_bytes, format_memory
from flash_moe.generation.result import Generation
from flash_moe.generation.stats import Stats
from flash_moe.generation.streaming_stats import ChoiceStats, PrefetchStats
from flash_moe.nn.expert_choice import ChoiceCounters
from flash_moe.nn.prefetch_switch import Comparison

STATS = Stats(
    prompt_tokens=100,
    reused_tokens=0,
    generated_tokens=21,
    prompt_seconds=2.0,
    decode_seconds=4.0,
    time_to_first_token=2.1,
    experts_per_token=4,
    model_experts_per_token=10,
    expert_bytes_requested=1000,
    expert_bytes_missing=250,
    decode_bytes_requested=800,
    fetch_seconds=0.5,
    decode_fetch_seconds=0.5,
    peak_memory_bytes=123,
)


def test_derived_figures() -> None:
    assert STATS.prompt_tokens_per_second == 50
    assert STATS.generated_tokens_per_second == 5  # the first of the 21 tokens came with the prompt
    assert STATS.hit_rate == 0.75
    assert STATS.expert_bytes_per_token == 40
    assert STATS.to_dict()["hit_rate"] == 0.75


def test_nothing_measured_is_no_division_by_zero() -> None:
    empty = dataclasses.replace(
        STATS, generated_tokens=1, prompt_seconds=0, decode_seconds=0, expert_bytes_requested=0, expert_bytes_missing=0
    )
    assert (empty.generated_tokens_per_second, empty.prompt_tokens_per_second, empty.hit_rate) == (0, 0, 1)
    assert empty.expert_bytes_per_token == 0


def test_reused_tokens_are_named_and_are_no_speed() -> None:
    continued = dataclasses.replace(STATS, reused_tokens=80)
    assert continued.prompt_tokens_per_second == 10
    assert str(continued).startswith("100 prompt tokens (80 reused) at 10.0 tok/s")
    assert "reused" not in str(STATS)


def test_summary_names_a_reduced_k() -> None:
    assert "K=4 of the model's 10" in str(STATS)
    assert "K=10 ·" in str(dataclasses.replace(STATS, experts_per_token=10))
    assert "75% in memory" in str(STATS)


@pytest.mark.parametrize(
    ("missing", "shown"), [(0, "100%"), (1, "99%"), (4, "99%"), (990, "1%"), (999, "<1%"), (1000, "0%")]
)
def test_all_in_memory_is_written_only_for_all(missing: int, shown: str) -> None:
    assert f"· {shown} in memory" in str(dataclasses.replace(STATS, expert_bytes_missing=missing))


def test_summary_says_what_prefetching_did() -> None:
    trial = Comparison(seconds=0.8, seconds_without=1.0, missing=5, missing_without=5)
    stats = PrefetchStats("on", 20, 0.854, 4096, trial, trial.saved)
    on = dataclasses.replace(STATS, prefetch=stats)
    assert str(on).endswith("in memory · prefetch on (85% of experts predicted, 20% less time per token)")
    worse = dataclasses.replace(stats, decision="off", time_saved=-0.07)
    assert str(dataclasses.replace(STATS, prefetch=worse)).endswith("85% of experts predicted, 7% more time per token)")
    idle = PrefetchStats("nothing to load", 0, None, 0, None, None)
    assert str(dataclasses.replace(STATS, prefetch=idle)).endswith(" · prefetch nothing to load")
    found = on.to_dict()
    assert found["choice"] is None
    assert (found["prefetch"]["recall"], found["prefetch"]["trial"]["seconds_without"]) == (0.854, 1.0)
    assert "prefetch" not in str(STATS)


def test_summary_says_what_was_dropped_and_swapped() -> None:
    found = ChoiceStats.of(ChoiceCounters(1000, 25, 0, 4.0, 0.1, 0.0))
    assert found.router_mass_dropped == 0.025
    choice = dataclasses.replace(STATS, choice=found)
    assert str(choice).endswith("in memory · 2.5% of experts dropped (-2.50% of router mass)")
    both = dataclasses.replace(STATS, choice=dataclasses.replace(found, swapped=10, router_mass_swapped=0.001))
    assert str(both).endswith("router mass), 1.0% of experts swapped (-0.10% of router mass)")
    none = dataclasses.replace(STATS, choice=ChoiceStats.of(ChoiceCounters()))
    assert str(none).endswith(" · no expert dropped or swapped")


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (7077888, "7.1 MB"),
        (217e9, "217 GB"),
        (3.2e12, "3.2 TB"),
        (999999, "1.0 MB"),
    ],
)
def test_format_bytes(count: float, text: str) -> None:
    assert format_bytes(count) == text


@pytest.mark.parametrize(
    ("count", "text"), [(48 << 30, "48 GB"), (5_579_071_232, "5.2 GB"), (512, "512 B"), (1 << 41, "2 TB")]
)
def test_memory_is_written_as_apple_writes_it(count: float, text: str) -> None:
    assert format_memory(count) == text


def test_generation_shows_itself() -> None:
    result = Generation("a <b> & c", (1, 2), "stop", STATS)
    assert str(result) == "a <b> & c"
    assert "a &lt;b&gt; &amp; c" in result._repr_html_()
    assert "tok/s" in result._repr_html_()
