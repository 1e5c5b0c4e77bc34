"""The division of a machine's memory, and the room that it leaves for experts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .hit_rate import hit_rate
from .needs import Needs

_KEPT_SHARE, _KEPT_LEAST = 0.1, 2 << 30  # of memory, for the system and for activations, at the least


@dataclass(frozen=True)
class Memory:
    """The division of a machine's memory.

    Attributes:
        total: of the machine.
        kept: by the system and other programs, and room for activations.
        resident, cache, slots: weights; keys, values and states at the context; the bank that experts are read into.
        left: for the page cache to keep experts in; below 0 where the model does not fit.
        largest_context: tokens that leave the page cache nothing, or the model's own limit; 0 where nothing fits.
    """

    total: int
    kept: int
    resident: int
    cache: int
    slots: int
    left: int
    largest_context: int

    @property
    def fits(self) -> bool:
        return self.left >= 0


def share_memory(need: Needs, context: int, total: int, used: int = 0) -> Memory:
    """Divides a machine's memory.

    Args:
        context: tokens to have room for.
        total: bytes of the machine.
        used: bytes that other programs hold now, where that is known.
    """
    kept = max(round(_KEPT_SHARE * total), _KEPT_LEAST, used)
    room = total - kept - need.resident - need.slots - need.state
    limit = need.dimensions.max_position_embeddings
    largest = min(limit, room // need.kv_per_token) if need.kv_per_token else limit
    keys = context * need.kv_per_token
    cache, left = need.state + keys, room - keys
    return Memory(total, kept, need.resident, cache, need.slots, left, largest if room >= 0 else 0)


def decode_hits(need: Needs, left: int, probabilities: np.ndarray) -> float:
    """Returns share of a token's expert bytes that are expected in memory where ``left`` bytes can hold experts."""
    if not need.record:
        return 1.0
    return hit_rate(probabilities, max(0, left) / need.record / need.expert_layers)


def prompt_hits(need: Needs, left: int, touched: float) -> float:
    """Returns share of the ``touched`` bytes of experts that a prompt finds in memory.

    It goes through the layers one after the other, so where not all that it touches fits, what it needs next has just
    been forgotten.
    """
    return 1.0 if left >= need.experts else 0.0 if left < touched else left / need.experts
