"""What tests of the demo model's training share; torch is imported only where it is used, since CI installs none."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.fixture
def one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def perturbed() -> Any:
    """A tiny model without zeros or ones among its weights."""
    import torch
    from demo_model import model
    from demo_runs import tiny

    made = model.create(tiny(), seed=1)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.2)
    return made
