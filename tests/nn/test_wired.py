"""What MLX is asked to keep wired, on a Mac that only takes notes."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from flash_moe import Model, loading
from flash_moe.nn import wired
from flash_moe.nn.wired import keep_wired

MOST = 1000


class Owner:
    """Something that can be freed."""


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The limits that were set, the last one last; the first is the system's own."""
    found = [0]

    def set_wired_limit(limit: int) -> int:
        assert limit <= MOST, "an error on macOS"
        found.append(limit)
        return found[-2]

    monkeypatch.setattr(wired, "_held", {})
    monkeypatch.setattr(mx, "set_wired_limit", set_wired_limit)
    monkeypatch.setattr(mx, "device_info", lambda *_: {"max_recommended_working_set_size": MOST})
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    return found


def test_models_add_up_and_give_back(limits: list[int]) -> None:
    one, other = Owner(), Owner()
    keep_wired(one, 300)
    keep_wired(other, 500)
    assert limits == [0, 300, 800]
    del one
    gc.collect()
    assert limits[-1] == 500
    del other
    gc.collect()
    assert limits[-1] == 0


def test_never_more_than_the_system_allows(limits: list[int]) -> None:
    one, other = Owner(), Owner()
    keep_wired(one, 700)
    keep_wired(other, 700)
    assert limits[-1] == MOST
    del other
    gc.collect()
    assert limits[-1] == 700


def test_a_higher_limit_of_somebody_else_stays(limits: list[int]) -> None:
    limits.append(900)
    owner = Owner()
    keep_wired(owner, 300)
    assert limits[-1] == 900
    del owner
    gc.collect()
    assert limits[-1] == 900


def test_nothing_happens_elsewhere(limits: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mx.metal, "is_available", lambda: False)
    keep_wired(Owner(), 300)
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.cpu))
    keep_wired(Owner(), 300)
    assert limits == [0]


@pytest.mark.parametrize(
    ("options", "wires"),
    [({"expert_io": "mapped"}, True), ({"expert_io": "slots"}, True), ({"expert_io": "resident"}, False),
     ({"expert_io": "slots", "expert_cache": 1 << 20}, False)],
    ids=["mapped", "slots", "resident", "cache"],
)  # fmt: skip
def test_the_always_read_weights_are_wired_where_experts_stream(
    options: dict[str, Any], wires: bool, packed_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(loading, "keep_wired", lambda owner, nbytes: asked.append(nbytes))
    before = mx.get_active_memory()
    with Model.load(packed_checkpoint, dtype="float32", **options) as model:
        weights = sum(array.nbytes for _, array in tree_flatten(model._decoder.parameters())) if wires else 0
    assert bool(asked) == wires
    assert not wires or weights <= asked[0] < 3 * weights + before + (4 << 20)
