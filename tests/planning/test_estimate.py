"""Seconds computed by hand from costs that were made up."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from flash_moe.generation.chunks import prefill_chunk
from flash_moe.models import open_model
from flash_moe.planning.costs import Costs, LayerCost, ReadCost
from flash_moe.planning.estimate import Seconds, decode_seconds, held_share, prefill_seconds
from flash_moe.planning.hit_rate import distinct, popularity
from flash_moe.planning.needs import Kind, Needs, decode_hits, needs, prompt_hits, share_memory

LINEAR, FULL = Kind("linear_attention", True), Kind("full_attention", True)
LAYERS = {LINEAR: LayerCost(2e-3, 0, 5e-3, 1e-4, 0), FULL: LayerCost(1e-3, 1e-6, 3e-3, 2e-4, 1e-8)}
READS = ReadCost(ssd=1e8, ssd_group=2e8, memory=1e9, memory_group=4e9)
EVEN = popularity(16, 4, 0.0)
MEMORY = 32 * 1024 * (2 * 4 + 12) * 64 * 4  # bytes for which a chunk has 1,024 tokens


@pytest.fixture(scope="module")
def need(packed_checkpoint: Path) -> Needs:
    """3 linear layers and a full one, 16 experts each."""
    checkpoint = open_model(packed_checkpoint)
    return needs(checkpoint, checkpoint.records(), 4, 4, "slots")


def costs(**changes: object) -> Costs:
    return Costs(
        **{"bandwidth": 1e12, "flops": 1e15, "layers": LAYERS, "record": 1e-3, "row": 1e-5, "draw": 0.0, "reads": READS}
        | changes
    )


def test_a_token(need: Needs) -> None:
    asked = 4 * 4 * need.record
    cold = decode_seconds(need, costs(), context=1000, hits=0, held=0)
    head = need.head / 1e12
    assert cold.ssd == pytest.approx(asked / 1e8)
    assert cold.page_cache == 0
    assert cold.memory + cold.overhead == pytest.approx(3 * 2e-3 + 1e-3 + 1000 * 1e-6 + head)
    half = decode_seconds(need, costs(), context=0, hits=0.5, held=0.25)
    assert (half.ssd, half.page_cache) == pytest.approx((0.5 * asked / 1e8, 0.25 * asked / 1e9))
    warm = decode_seconds(need, costs(), context=0, hits=1, held=1)
    assert (warm.ssd, warm.page_cache) == (0, 0)
    in_place = decode_seconds(need, costs(reads=ReadCost(1e8, 1e8, math.inf, math.inf)), context=0, hits=1, held=0)
    assert in_place.page_cache == 0


def test_weights_explain_no_more_than_there_is(need: Needs) -> None:
    found = decode_seconds(need, costs(bandwidth=1.0), context=0, hits=1, held=1)
    assert found.overhead == 0
    assert found.memory == pytest.approx(need.head + 7e-3)


def test_drawing_a_token_takes_the_host(need: Needs) -> None:
    def seconds(draw: float) -> tuple[Seconds, Seconds]:
        found = costs(draw=draw)
        return (
            decode_seconds(need, found, context=0, hits=1, held=1),
            prefill_seconds(need, found, 100, 1.0, EVEN, keeps=True, memory=MEMORY),
        )

    for with_it, without in zip(seconds(0.25), seconds(0.0), strict=True):
        assert with_it.overhead - without.overhead == pytest.approx(0.25)
        assert with_it.total - without.total == pytest.approx(0.25)


def test_a_prompt(need: Needs) -> None:
    tokens = 100
    touched = distinct(EVEN, tokens)
    experts = touched * 1e-3 + 400 * 1e-5
    layers = 3 * (5e-3 + tokens * 1e-4) + (3e-3 + tokens * 2e-4 + tokens**2 * 1e-8) + 4 * experts + need.head / 1e12
    cold = prefill_seconds(need, costs(), tokens, 0.0, EVEN, keeps=True, memory=MEMORY)
    assert cold.ssd == pytest.approx(4 * touched * need.record / 2e8)  # one group a layer: all of it is waited for
    assert cold.compute + cold.overhead == pytest.approx(layers)
    warm = prefill_seconds(need, costs(), tokens, 1.0, EVEN, keeps=True, memory=MEMORY)
    assert (warm.ssd, warm.page_cache) == pytest.approx((0, 4 * touched * need.record / 4e9))
    assert cold.total == pytest.approx(cold.ssd + layers)


def test_a_long_prompt_reads_experts_again_only_where_they_were_forgotten(need: Needs) -> None:
    assert prefill_chunk(need.dimensions, need.experts_per_token, MEMORY) == 1024
    once = prefill_seconds(need, costs(), 1024, 0.0, EVEN, keeps=True, memory=MEMORY)
    kept = prefill_seconds(need, costs(), 2048, 0.0, EVEN, keeps=True, memory=MEMORY)
    forgotten = prefill_seconds(need, costs(), 2048, 0.0, EVEN, keeps=False, memory=MEMORY)
    assert kept.ssd == pytest.approx(once.ssd, rel=1e-6)
    assert forgotten.ssd == pytest.approx(2 * once.ssd)


def test_reading_the_next_group_hides_behind_computing_this_one(need: Needs) -> None:
    touched = distinct(EVEN, 1000)
    groups = Needs(**{**need.__dict__, "capacity": 4})
    read, compute = touched * need.record / 2e8, touched * 1e-3 + 4000 * 1e-5
    assert read < compute
    found = prefill_seconds(groups, costs(), 1000, 0.0, EVEN, keeps=True, memory=MEMORY)
    assert found.ssd == pytest.approx(4 * read / 4)  # the first of four groups
    slow = costs(reads=ReadCost(1e6, 1e6, 1e9, 1e9))
    found = prefill_seconds(groups, slow, 1000, 0.0, EVEN, keeps=True, memory=MEMORY)
    read = touched * need.record / 1e6
    assert found.ssd == pytest.approx(4 * (read / 4 + 3 * (read - compute) / 4))


def test_terms_add_up() -> None:
    assert Seconds(1, 2, 3, 4, 5).total == 15


def test_memory(need: Needs) -> None:
    total = 8 << 30
    found = share_memory(need, 1000, total)
    assert found.kept == 2 << 30
    assert found.cache == need.state + 1000 * need.kv_per_token
    assert found.left == total - (2 << 30) - need.resident - need.slots - found.cache
    assert (found.fits, found.largest_context) == (True, 4096)
    assert share_memory(need, 1000, total, used=3 << 30).kept == 3 << 30
    assert share_memory(need, 1000, 100 << 30).kept == 10 * (1 << 30)


def test_memory_that_is_short(need: Needs) -> None:
    fixed = (2 << 30) + need.resident + need.slots + need.state
    tight = share_memory(need, 1000, fixed + 500 * need.kv_per_token)
    assert (tight.fits, tight.left, tight.largest_context) == (False, -500 * need.kv_per_token, 500)
    assert share_memory(need, 1, fixed - 1).largest_context == 0


def test_what_memory_keeps(need: Needs) -> None:
    assert decode_hits(need, need.experts, EVEN) == 1
    assert decode_hits(need, -5, EVEN) == 0
    assert decode_hits(need, round(7.1 * 4 * need.record), EVEN) == pytest.approx(1 - 0.75**2)
    assert held_share(need, EVEN) == hit_rate_of_slots(need)
    assert prompt_hits(need, need.experts, need.experts) == 1
    assert prompt_hits(need, need.experts // 2, need.experts) == 0
    assert prompt_hits(need, need.experts // 2, need.experts / 4) == pytest.approx(0.5)


def hit_rate_of_slots(need: Needs) -> float:
    """Two fetches of all 16 experts fit into the bank: of 4 layers, 8 records each, which is two tokens' worth."""
    assert need.slots == 32 * need.record
    return 1 - 0.75**2
