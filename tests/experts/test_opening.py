from __future__ import annotations

from typing import Any

import pytest
from streaming import Source

from flash_moe import ArgumentError, Model
from flash_moe.experts.mapped import MappedStore
from flash_moe.experts.opening import open_store
from flash_moe.experts.resident import ResidentStore
from flash_moe.experts.slots import SlotStore


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"expert_io": "mmap"}, "expert_io is 'mmap', expected one of auto, mapped, slots, resident"),
        ({"expert_io": None}, "expert_io is None, expected one of"),
        ({"expert_cache": -1}, "expert_cache is -1, expected a number of bytes"),
        ({"expert_cache": "1GB"}, "expert_cache is '1GB', expected a number of bytes"),
        ({"expert_cache": 1e9}, "expert_cache is 1000000000.0, expected a number of bytes"),
        ({"expert_cache": True}, "expert_cache is True, expected a number of bytes"),
        ({"expert_io": "mapped", "expert_cache": 1}, "expert_cache needs expert_io='slots' .*not 'mapped'"),
        ({"expert_io": "resident", "expert_cache": 1}, "expert_cache needs expert_io='slots' .*not 'resident'"),
    ],
    ids=lambda value: " ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_argument_errors(sources: dict[str, Source], arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        Model.load(sources["packed"].folder, **arguments)


@pytest.mark.parametrize(
    ("forced", "form", "cache", "kind"),
    [
        ("mapped", "packed", 0, MappedStore),
        ("slots", "packed", 0, SlotStore),
        ("mapped", "packed", 1 << 20, SlotStore),
        ("mapped", "stacked", 0, SlotStore),
        ("mapped", "fused", 0, SlotStore),
    ],
    ids=lambda value: str(value),
)
def test_auto_chooses_only_for_packed_checkpoints_without_a_cache(
    sources: dict[str, Source], monkeypatch: pytest.MonkeyPatch, forced: str, form: str, cache: int, kind: type
) -> None:
    monkeypatch.setenv("FLASH_MOE_EXPERT_IO", forced)
    store = open_store(sources[form].table, "auto", 4, cache)
    assert type(store) is kind
    store.close()


@pytest.mark.parametrize(("io", "kind"), [("mapped", MappedStore), ("slots", SlotStore), ("resident", ResidentStore)])
def test_what_is_asked_for_is_what_is_opened(sources: dict[str, Source], io: Any, kind: type) -> None:
    store = open_store(sources["stacked"].table, io, 4)
    assert type(store) is kind
    store.close()


@pytest.mark.parametrize("io", ["mapped", "slots", "resident"])
@pytest.mark.parametrize("k", [1, 4, 16])
def test_a_token_s_records_always_fit(
    sources: dict[str, Source], monkeypatch: pytest.MonkeyPatch, io: Any, k: int
) -> None:
    monkeypatch.setattr("flash_moe.experts.opening._GROUP_BYTES", 0)
    store = open_store(sources["packed"].table, io, k)
    assert store.capacity == (16 if io == "resident" else k)
    store.fetch(0, range(k))
    store.close()


def test_resident_store_reports_progress(sources: dict[str, Source]) -> None:
    seen: list[int] = []
    table = sources["packed"].table
    open_store(table, "resident", 4, progress=seen.append)
    assert seen == [table.nbytes * part // 4 for part in (1, 2, 3, 4)]
