"""How much a token has a GPU launch: what decoding takes there, beside reading."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import pytest
from launches import LAYERS, Launches, make_checkpoint, mlx_lm, ours


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("launches"))


@pytest.fixture(autouse=True)
def nothing_else_counts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("FLASH_MOE_KERNELS", "")
    yield
    mx.clear_cache()


MOST = {  # launches and evaluations per layer
    (False, "read back"): (30.5, 3.5),
    (False, "ahead"): (32.5, 1.5),
    (False, "mapped"): (36.5, 3.5),
    (True, "read back"): (11, 2.5),
    (True, "ahead"): (12, 1.5),
    (True, "resident"): (11, 1.5),
}  # fmt: skip


@pytest.mark.parametrize("kernels, way", MOST, ids=[f"{'kernels' if k else 'ops'} {way}" for k, way in MOST])
def test_a_token_launches_no_more_than_it_did(kernels: bool, way: str, folder: Path) -> None:
    found = ours(folder, kernels, way)
    launches, evaluations = MOST[kernels, way]
    assert found.total / LAYERS <= launches, found.operations
    assert found.evaluations / LAYERS <= evaluations


def test_mlx_lm_launches_more(folder: Path) -> None:
    assert mlx_lm(folder).total > ours(folder, False, "resident").total


def test_the_count_sees_operations_and_not_views() -> None:
    found, x = Launches(), mx.ones((4, 4))
    mx.eval(x)
    found.add(mx.concatenate([x, x, x])[1:].reshape(-1) + 1)
    assert dict(found.operations) == {"Concatenate": 3, "Add": 1}
