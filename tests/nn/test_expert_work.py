"""What stores are compared by: the work that a token does with its records, through every kind of store."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import pytest
from launches import as_on_a_gpu

from flash_moe.experts.banks import can_lie_by_part
from flash_moe.experts.choosing import choose, measure_stores
from flash_moe.experts.mapped import MappedStore
from flash_moe.experts.reader import RecordReader
from flash_moe.experts.slots import SlotStore
from flash_moe.models import open_model
from flash_moe.nn.expert_work import ExpertWork


@pytest.mark.parametrize("back_end", ["metal", "cuda"])
@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "ops"])
@pytest.mark.parametrize("kind", ["mapped", "slots", "slots by part"])
def test_the_work_ends_with_the_records_used(
    kind: str, kernels: bool, back_end: str, packed_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "slots by part" and kernels:
        pytest.skip("banks lie by part only without kernels")
    table = open_model(packed_checkpoint).records()
    assert can_lie_by_part(list(table.layouts.values()), "F32")
    reader = RecordReader(table)
    store = MappedStore(reader, 4) if kind == "mapped" else SlotStore(reader, 4, by_part=kind == "slots by part")
    evaluated: list[mx.array] = []
    evaluate = mx.eval

    def noted(*arrays: object) -> None:
        evaluated.extend(array for found in arrays if isinstance(found, list) for array in found)
        evaluate(*arrays)

    with monkeypatch.context() as patch:
        patch.setattr(mx, "eval", noted)
        with as_on_a_gpu(back_end):
            work = ExpertWork(table.layouts, mx.float32, kernels=kernels)
            work(store, 1, [3, 0])
            assert work.name == ("kernels" if kernels else "ops")
    assert store.stats.fetches == 1
    assert [array for array in evaluated if array.shape[-1] == 64]  # outputs, not copies of records
    store.close()


def test_each_kind_of_work_has_its_own_choice(
    packed_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("FLASH_MOE_EXPERT_IO")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    table, seen = open_model(packed_checkpoint).records(), []

    class Noted(ExpertWork):
        def __call__(self, store: object, layer: int, experts: object) -> None:
            seen.append(type(store).__name__)
            super().__call__(store, layer, experts)  # type: ignore[arg-type]

    work = Noted(table.layouts, mx.float32, kernels=False)
    timing = measure_stores(table, 2, work)
    assert timing is not None
    assert {"MappedStore", "SlotStore"} == set(seen)
    del seen[:]
    choose(table, 2, work=work)
    assert seen
    del seen[:]
    choose(table, 2, work=work)  # remembered
    assert not seen
    work.name = "another kind"
    choose(table, 2, work=work)
    assert seen
