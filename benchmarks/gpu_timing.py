"""Timing a GPU operation in two ways: with the host that launches it, and on the GPU alone.

With the host: the wall time of calls that are evaluated together, divided by their number. There are enough of them
that starting and draining the GPU does not matter. Where the host needs longer to launch than the GPU to compute, it is
the host's time.

On the GPU alone: a long operation occupies the GPU until the host has launched all calls, which then follow one
another; its own time is subtracted.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import cache, cached_property
from typing import Any

import mlx.core as mx

SECONDS, REPEATS = 0.03, 7  # of launches that are evaluated together, and how often they are
OCCUPIED = 0.016  # seconds, at least, of the operation that occupies the GPU
SPARE = 0.8  # of the occupied time, in which all must have been launched
ENOUGH = 0.008  # seconds of calls behind it; fewer where they cannot be launched in time
LEAST = 0.0003  # fewer seconds of calls than this are lost in the noise
COPY_ELEMENTS, COPIES = 1 << 30, 2  # float32: 4 GB read and 4 GB written


class Op:
    """A function and the sets of operands that it is timed with, one after the other.

    Operands should together exceed the GPU's caches. All sets go into one trace, as the decoder is traced, too.
    """

    def __init__(self, function: Callable[..., Any], operands: list[tuple[Any, ...]]) -> None:
        self._function, self._operands = function, operands
        self._flat = [array for one in operands for array in one]
        width = len(operands[0])

        def each(*flat: mx.array) -> list[Any]:
            return [function(*flat[k : k + width]) for k in range(0, len(flat), width)]

        self._traced = mx.compile(each)

    def __call__(self, i: int) -> Any:
        return self._function(*self._operands[i % len(self._operands)])

    @cached_property
    def seconds(self) -> float:
        """Median seconds of a call, launching included."""

        def run(rounds: int) -> float:
            mx.synchronize()
            start = time.perf_counter()
            mx.eval([self._traced(*self._flat) for _ in range(rounds)])
            mx.synchronize()
            return (time.perf_counter() - start) / rounds

        rounds = max(1, round(SECONDS / min(run(1) for _ in range(3))))
        run(rounds)
        return statistics.median(run(rounds) for _ in range(REPEATS)) / len(self._operands)

    @cached_property
    def gpu_seconds(self) -> float:
        """Median seconds of a call on the GPU alone; NaN where too few can be launched while it is occupied.

        The calls do not depend on each other, so a GPU may begin one before the last is done.
        """
        rounds = max(1, round(ENOUGH / (self.seconds * len(self._operands))))
        while True:
            self._behind(rounds)  # builds what MLX keeps for the next time
            runs = [self._behind(rounds) for _ in range(REPEATS)]
            in_time = statistics.median(launched for launched, _ in runs) < SPARE * OCCUPIED
            if in_time or rounds == 1:
                break
            rounds //= 2
        calls = statistics.median(took for _, took in runs)
        return calls / (rounds * len(self._operands)) if in_time and calls > LEAST else float("nan")

    def _behind(self, rounds: int) -> tuple[float, float]:
        """Seconds until ``rounds`` of all sets were launched behind the long operation, and what they add to its."""
        calls = [self._traced(*self._flat) for _ in range(rounds)]
        alone = _occupy([])[1]
        launched, total = _occupy(calls)
        return launched, total - alone


def _occupy(calls: list[Any]) -> tuple[float, float]:
    """Seconds until ``calls`` were launched behind an operation of ``OCCUPIED`` seconds, and until all was done."""
    occupy = mx.logsumexp(_long_row())
    mx.synchronize()
    start = time.perf_counter()
    mx.async_eval(occupy)
    mx.async_eval(calls)
    launched = time.perf_counter() - start
    mx.synchronize()
    return launched, time.perf_counter() - start


@cache
def _long_row() -> mx.array:
    """A row whose logsumexp, one launch of a single block of threads, takes ``OCCUPIED`` seconds or more."""
    size = 1 << 22
    while True:
        row, times = mx.zeros(size), []
        mx.eval(row)
        for _ in range(3):
            start = time.perf_counter()
            mx.eval(mx.logsumexp(row))
            times.append(time.perf_counter() - start)
        if min(times) > OCCUPIED:
            return row
        size *= 2


def copy_bandwidth() -> float:
    """Bytes read and written per second by a large device copy."""
    source = mx.zeros(COPY_ELEMENTS)
    mx.eval(source)

    def run() -> float:
        mx.synchronize()
        start = time.perf_counter()
        copied = source
        for _ in range(COPIES):
            copied = copied + 1.0
        mx.eval(copied)
        return time.perf_counter() - start

    run()
    return COPIES * 2 * source.nbytes / statistics.median(run() for _ in range(REPEATS))
