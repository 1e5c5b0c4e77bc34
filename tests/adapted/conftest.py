"""What tests of mlx-lm's families share."""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx
import pytest


@pytest.fixture(autouse=True)
def not_compiled() -> Iterator[None]:
    """On the CPU, MLX has a C++ compiler make each of mlx-lm's compiled functions, which takes seconds a family."""
    mx.disable_compile()
    yield
    mx.enable_compile()
