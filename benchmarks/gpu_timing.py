"""Timing a GPU operation in two ways: with the host that launches it, and on the GPU alone.

With the host: the wall time of so many calls, evaluated together, that starting and draining the GPU do not count,
divided by their number. Where the host needs longer to launch than the GPU to compute, it is the host's time.

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
WAIT_ELEMENTS = 1 << 30  # float32 of the operation that occupies the GPU, 4 GB read and 4 GB written
WAIT_STEPS = 2
SPARE = 0.8  # of the occupied time, in which all must have been launched
ENOUGH = 0.003  # seconds of calls behind it


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
        """Median seconds of a call on the GPU alone; NaN where the host cannot launch even one round in time."""
        occupied = _occupied_seconds()
        found, rounds = float("nan"), 1
        while True:
            runs = [self._behind(rounds) for _ in range(REPEATS)]
            if max(launched for launched, _ in runs) > SPARE * occupied:
                return found
            calls = statistics.median(total for _, total in runs) - occupied
            found = calls / (rounds * len(self._operands))
            if calls > ENOUGH:
                return found
            rounds *= 2

    def _behind(self, rounds: int) -> tuple[float, float]:
        """Seconds until ``rounds`` of all sets were launched behind the long operation, and until they were done."""
        calls = [self._traced(*self._flat) for _ in range(rounds)]
        mx.synchronize()
        start = time.perf_counter()
        mx.async_eval(_long_operation())
        mx.async_eval(calls)
        launched = time.perf_counter() - start
        mx.synchronize()
        return launched, time.perf_counter() - start


@cache
def _ballast() -> mx.array:
    array = mx.zeros(WAIT_ELEMENTS)
    mx.eval(array)
    return array


def _long_operation() -> mx.array:
    result = _ballast()
    for _ in range(WAIT_STEPS):
        result = result + 1.0
    return result


@cache
def _occupied_seconds() -> float:
    def run() -> float:
        mx.synchronize()
        start = time.perf_counter()
        mx.async_eval(_long_operation())
        mx.synchronize()
        return time.perf_counter() - start

    run()
    return statistics.median(run() for _ in range(2 * REPEATS))


def copy_bandwidth() -> float:
    """Bytes read and written per second by a large device copy."""
    return WAIT_STEPS * 2 * _ballast().nbytes / _occupied_seconds()
