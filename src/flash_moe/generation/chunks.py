"""The size of prefill chunks: tokens of a prompt that pass through the layers together."""

from __future__ import annotations

from ..limits import memory_limit
from ..nn.network import Dimensions

_SHARE = 32  # of the machine's memory: what a chunk may take
_STEP, _MOST = 256, 4096


def prefill_chunk(config: Dimensions, experts_per_token: int, memory: int | None = None) -> int:
    """Returns tokens per chunk: many, for every expert that a chunk touches is read once, but not more than memory
    allows.

    Args:
        experts_per_token: K. A layer holds 2·K + 12 rows of H float32 per token: inputs and outputs of the experts, and
            the projections of the mixer.
        memory: bytes the machine has; by default what the system says.

    Returns:
        A multiple of 256, from 256 to 4,096.
    """
    per_token = (2 * experts_per_token + 12) * config.hidden_size * 4
    tokens = (memory_limit() if memory is None else memory) // _SHARE // per_token
    return max(_STEP, min(_MOST, tokens // _STEP * _STEP))
