"""Computes the prefill chunk size: the number of prompt tokens that pass through the layers together."""

from __future__ import annotations

from ..limits import memory_limit
from ..nn.network import Dimensions

_SHARE = 32  # share of the machine's memory that a chunk may use
_STEP, _MOST = 256, 4096


def prefill_chunk(config: Dimensions, experts_per_token: int, memory: int | None = None) -> int:
    """Returns the prefill chunk size. Larger chunks read each expert fewer times; memory sets the limit.

    Args:
        experts_per_token: K. Per token, a layer holds 2·K + 12 rows of H float32: the inputs and outputs of the
            experts, and the projections of the mixer.
        memory: bytes of memory; None takes the memory of this machine.

    Returns:
        A multiple of 256, from 256 to 4,096.
    """
    per_token = (2 * experts_per_token + 12) * config.hidden_size * 4
    tokens = (memory_limit() if memory is None else memory) // _SHARE // per_token
    return max(_STEP, min(_MOST, tokens // _STEP * _STEP))
