"""Freeing the memory that MLX keeps, while other machines are waited for or not."""

from __future__ import annotations

from threading import Lock

import mlx.core as mx

communicating = Lock()  # held while MLX waits for another machine


def clear_cache() -> None:
    """Frees the memory that MLX keeps for later arrays, as soon as no sum over machines is under way.

    ``mx.clear_cache`` waits for such a sum, and holds the interpreter meanwhile (MLX 0.32.4). So the threads stand still that
    tell the other machines what to run, and the sum would never end.
    """
    with communicating:
        mx.clear_cache()
