"""Sequences of several lengths, and logits of the whole model for them."""

from __future__ import annotations

import numpy as np
import pytest

from flash_moe.evaluation import TokenSequence


@pytest.fixture(scope="session")
def sequences() -> list[TokenSequence]:
    """Random tokens: one of a single token, one longer than a chunk of prefill, two between."""
    rng = np.random.default_rng(5)
    lengths = (40, 1, 7, 1030)
    return [
        TokenSequence(tuple(rng.integers(0, 256, n).tolist()), tuple((rng.random(n) < 0.3).tolist())) for n in lengths
    ]
