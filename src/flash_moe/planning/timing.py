"""Measures times on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import mlx.core as mx

_MOST_RUNS, _ENOUGH = 12, 0.3  # of anything that is timed, and seconds after which none is begun
_FIRST_RUNS = 3  # that are not counted where they are quick: traces and graphs are made in them


def run_seconds(run: Callable[[], object]) -> float:
    """Returns median seconds of a run and its evaluation, after some that are not counted; fewer runs where they take
    long.
    """
    seconds: list[float] = []
    while len(seconds) < 2 or (len(seconds) < _FIRST_RUNS + _MOST_RUNS and sum(seconds[1:]) < _ENOUGH):
        start = time.perf_counter()
        mx.eval(run())
        seconds.append(time.perf_counter() - start)
    return median(seconds[min(_FIRST_RUNS, len(seconds) - 1) :])
