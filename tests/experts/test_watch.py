"""What those who watch a store are told."""

from __future__ import annotations

from pathlib import Path

import pytest

from flash_moe import Model


@pytest.mark.parametrize("expert_io", ["mapped", "slots", "resident"])
def test_watchers_see_what_is_counted(packed_checkpoint: Path, expert_io: str) -> None:
    seen: list[tuple[int, list[int], list[int]]] = []
    with Model.load(packed_checkpoint, expert_io=expert_io) as model:  # type: ignore[arg-type]
        store = model.expert_store
        store.evict()
        before = store.stats.bytes_requested, store.stats.bytes_missing
        with store.watch(lambda layer, experts, missing: seen.append((layer, list(experts), list(missing)))):
            model.generate("hello", max_tokens=3)
        requested = sum(store.layouts[layer].stride * len(experts) for layer, experts, _ in seen)
        assert requested == store.stats.bytes_requested - before[0] > 0
        assert sum(sum(missing) for _, _, missing in seen) == store.stats.bytes_missing - before[1]
        assert {layer for layer, _, _ in seen} == set(store.layouts)
        count = len(seen)
        model.generate("hello again", max_tokens=2)
    assert len(seen) == count
