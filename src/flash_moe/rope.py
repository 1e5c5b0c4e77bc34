"""Frequencies of rotary position embeddings, plain or extended to long contexts by YaRN.

YaRN follows arXiv:2309.00071 and transformers (``modeling_rope_utils._compute_yarn_parameters``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Yarn:
    """Parameters of YaRN, named as in config.json.

    Attributes:
        factor: slow pairs rotate this many times slower than in plain RoPE; at least 1.
        original_max_position_embeddings: context length in tokens in training.
        beta_fast, beta_slow: a pair that makes at least ``beta_fast`` turns in that context keeps its frequency. A pair
            that makes at most ``beta_slow`` turns is slowed down by ``factor``. Between them, the change is linear.
        truncate: whether the ends of the linear range are rounded outwards to whole pairs.
        attention_factor: factor for the rotated elements of queries and keys.
    """

    factor: float
    original_max_position_embeddings: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0

    @property
    def max_position_embeddings(self) -> int:
        """The extended context length in tokens."""
        return int(self.factor * self.original_max_position_embeddings)


def frequencies(dims: int, theta: float, yarn: Yarn | None = None) -> tuple[float, ...]:
    """Returns the [dims / 2] angles by which the pairs of a head rotate, in radians per position.

    Args:
        dims: number of rotated elements of a head, even.
        theta: base of the frequencies; above 1 with YaRN.
        yarn: None for plain RoPE.
    """
    plain = theta ** (-np.arange(0, dims, 2) / dims)
    if yarn is None:
        return tuple(plain.tolist())

    def pair(turns: float) -> float:
        """Returns the fractional index of the pair that makes this many turns in the original context."""
        return dims * math.log(yarn.original_max_position_embeddings / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = pair(yarn.beta_fast), pair(yarn.beta_slow)
    if yarn.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dims - 1)
    ramp = np.clip((np.arange(dims // 2) - first) / ((last - first) or 0.001), 0, 1)
    return tuple((plain * (1 - ramp) + plain / yarn.factor * ramp).tolist())


def attention_factor(factor: float, mscale: float | None = None, mscale_all_dim: float | None = None) -> float:
    """Returns YaRN's default attention factor: 0.1 · ln(factor) + 1, or a ratio of two such terms."""

    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    return scale(mscale) / scale(mscale_all_dim) if mscale and mscale_all_dim else scale(1.0)
