"""Several cores for one token: MLX runs a stream of the CPU on a single thread."""

from __future__ import annotations

import os
from functools import cache

import mlx.core as mx

MOST = 8  # streams; more would wait for the memory


@cache
def cpu_streams() -> list[mx.ThreadLocalStream]:
    """Returns a stream per core, usable in every thread."""
    return [mx.new_thread_local_stream(mx.cpu) for _ in range(min(os.cpu_count() or 1, MOST))]
