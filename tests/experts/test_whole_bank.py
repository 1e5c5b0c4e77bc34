"""A bank with room for every record: once a layer has been read, it is there as a whole, by expert id."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from flash_moe.experts.opening import open_store
from flash_moe.experts.store import ExpertStore
from flash_moe.models import open_model

K, EXPERTS, ROOM = 4, 16, 1 << 30


@pytest.fixture
def store(packed_checkpoint: Path) -> Iterator[ExpertStore]:
    store = open_store(open_model(packed_checkpoint).records(), "slots", K, ROOM)
    yield store
    store.close()


def fetch_all(store: ExpertStore, layer: int) -> None:
    order = np.random.RandomState(layer).permutation(EXPERTS).tolist()
    for start in range(0, EXPERTS, K):
        store.fetch(layer, order[start : start + K])


def test_a_layer_is_whole_once_all_of_it_has_been_fetched(store: ExpertStore, packed_checkpoint: Path) -> None:
    resident = open_store(open_model(packed_checkpoint).records(), "resident", K)
    store.prefetch(1, range(K))
    for layer in (2, 1):
        assert store.whole(layer, K) is None
        fetch_all(store, layer)
        bank, oracle = store.whole(layer, K), resident.whole(layer, K)
        assert bank is not None and oracle is not None
        np.testing.assert_array_equal(np.array(bank), np.array(oracle))
    assert store.whole(0, K) is None
    fetch_all(store, 0)
    records = store.fetch(2, [3, 0, 9])
    np.testing.assert_array_equal(np.array(records.stacked()), np.array(store.whole(2, K))[[3, 0, 9]])


def test_using_it_counts_as_a_fetch(store: ExpertStore) -> None:
    fetch_all(store, 0)
    before = store.stats.bytes_requested
    assert store.whole(0, K) is not None
    assert store.stats.bytes_requested == before + K * store.layouts[0].stride


def test_a_bank_with_less_room_is_never_whole(packed_checkpoint: Path) -> None:
    table = open_model(packed_checkpoint).records()
    store = open_store(table, "slots", K, 20 * table.max_stride)
    try:
        fetch_all(store, 0)
        assert store.whole(0, K) is None
    finally:
        store.close()


def test_an_emptied_store_begins_anew(store: ExpertStore) -> None:
    fetch_all(store, 0)
    store.evict()
    assert store.whole(0, K) is None
    fetch_all(store, 0)
    assert store.whole(0, K) is not None
