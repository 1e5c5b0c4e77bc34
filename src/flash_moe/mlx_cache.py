"""Frees the memory that MLX keeps, without waiting for other machines."""

from __future__ import annotations

from threading import Lock

import mlx.core as mx

communicating = Lock()  # held while MLX waits for another machine


def clear_cache() -> None:
    """Frees the memory that MLX keeps for later arrays, after a running sum over machines has ended.

    ``mx.clear_cache`` waits for such a sum and holds the GIL meanwhile (MLX 0.32.4). The threads that send commands to
    the other machines could then not run, and the sum would never end.
    """
    with communicating:
        mx.clear_cache()
