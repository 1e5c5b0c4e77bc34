"""The demo model's optimizers: Muon's updates and the learning rate."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: training the demo model is for developers")
pytest.importorskip("transformers", reason="transformers is not installed: training the demo model is for developers")

from demo_model import muon, optimizers  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("shape", [(3, 8, 24), (24, 8), (16, 16)])
def test_muon_makes_updates_nearly_orthogonal(shape: tuple[int, ...]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(muon.orthogonalise(matrices))
    assert float(values.min()) > 0.4
    assert float(values.max()) < 1.3


def test_learning_rate_rises_stays_and_falls_to_zero() -> None:
    def share(step: int, progress: float) -> float:
        return optimizers.rate_share(step, progress, warmup=10, decay=0.4)

    assert share(0, 0.0) == pytest.approx(0.1)
    assert share(9, 0.1) == share(500, 0.6) == 1
    assert share(500, 0.8) == pytest.approx(0.5)
    assert share(900, 1.0) == 0
