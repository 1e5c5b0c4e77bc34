"""Several projections of one input: separately, one after the other, and as one matrix where they are stored alike."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from flash_moe.formats import Quantization
from flash_moe.nn.linear import Linear, Linears

Q4 = Quantization(4, 32)


def layers(formats: list[Quantization | None]) -> list[Linear]:
    made = []
    for out, q in zip((24, 8, 8), formats, strict=True):
        weight = mx.random.normal((out, 64))
        if q is None:
            made.append(Linear(weight, None, None, None, None))
        else:
            made.append(Linear(*mx.quantize(weight, group_size=q.group_size, bits=q.bits), q, None))
    return made


@pytest.mark.parametrize("formats, groups", [([Q4] * 3, 1), ([Q4, None, None], 2), ([Q4, None, Q4], 3)])
@pytest.mark.parametrize("join", [True, False])
def test_together_is_separate_one_after_the_other(formats: list[Quantization | None], groups: int, join: bool) -> None:
    mx.random.seed(1)
    x, separate = mx.random.normal((2, 64)), layers(formats)
    linears = Linears(separate, join=join)
    assert len(linears.groups) == (groups if join else 3)
    expected = [np.array(layer(x)) for layer in separate]
    for found, one in zip(linears(x), expected, strict=True):
        np.testing.assert_allclose(found, one, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(linears.together(x), np.concatenate(expected, axis=-1), rtol=1e-5, atol=1e-5)
