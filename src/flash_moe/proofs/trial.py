"""Compares one kernel with its reference and with MLX's ops, on new random inputs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from ..ops.dispatch import kernels
from ..ops.kernel import poisoned

# Limits of the largest error relative to the largest value, and of the norm of errors relative to that of values. In
# bfloat16, one rounding of the output gives 0.4% and 0.17%. A mistake in a small part of the output shows in the norm.
TOLERANCE = {mx.float32: (1e-4, 1e-4), mx.float16: (2e-3, 6e-4), mx.bfloat16: (1.6e-2, 4e-3)}
_CACHES = 128 << 20  # bytes of operands, half of which exceed the caches of a GPU: of experts, MLX has a copy by part
_MOST_SETS = 8  # maximum sets of operands
_SECONDS, _REPEATS = 0.003, 5  # launches that are evaluated together, and repetitions
_TRACING = 4  # tracing speeds up MLX's ops by less than this factor; on CUDA, compiling their trace takes many seconds

Arrays = Sequence[mx.array]


@dataclass(frozen=True)
class Trial:
    """The operands and functions of a trial.

    Attributes:
        kernel: function that computes the op with the kernel, from one set of operands.
        reference: function that computes the op in float32.
        usual: function that computes the op with MLX's ops; it is only timed.
        operands: function that returns a set of random operands.
        dtype: dtype of the outputs.
        timed: function to time instead of ``kernel``, if ``kernel`` does more work.
        traced: whether the op runs in traces, as in decoding.
    """

    kernel: Callable[..., Arrays]
    reference: Callable[..., Arrays]
    usual: Callable[..., Any]
    operands: Callable[[], tuple[mx.array, ...]]
    dtype: mx.Dtype
    timed: Callable[..., Any] | None = None
    traced: bool = True


@dataclass(frozen=True)
class Verdict:
    """The result of a trial.

    Attributes:
        right: whether the kernel matches its reference.
        used: whether the kernel is right and faster than MLX's ops.
        reason: reason why the kernel is not used; empty if it is used.
        error, tolerance: the largest error relative to the largest value, and its limit.
        seconds, mlx_seconds: seconds of a call, including the launch; 0 if it was not timed.
        ended: number of times that the process ended or did not answer in time. After the first time, the next load
            tries the kernel again, because compiled kernels then take no more time.
    """

    right: bool
    used: bool
    reason: str = ""
    error: float = 0.0
    tolerance: float = 0.0
    seconds: float = 0.0
    mlx_seconds: float = 0.0
    ended: int = 0


def judge(trial: Trial) -> Verdict:
    """Runs a trial: checks whether the kernel is right and, if so, whether it is faster.

    Raises:
        Exception: any error of compiling or running; then the kernel must not be used.
    """
    return prepare(trial)()


def prepare(trial: Trial) -> Callable[[], Verdict]:
    """Compares a kernel with its reference, and compiles the functions to time.

    Returns:
        A function that times the kernel and returns the verdict. No other work may use the GPU meanwhile.

    Raises:
        Exception: see :func:`judge`.
    """
    operands = trial.operands()
    mx.eval(operands)
    with poisoned():
        found = list(trial.kernel(*operands))
        mx.eval(found)
    with kernels(False):
        expected = list(trial.reference(*operands))
        mx.eval(expected)
    largest, norm = TOLERANCE[trial.dtype]
    error, relative_norm = (max(values) for values in zip(*map(_errors, found, expected), strict=True))
    if not (error <= largest and relative_norm <= norm):  # NaN is wrong too
        what = f"its error is {error:.1e} of the largest value, {relative_norm:.1e} in the norm"
        wrong = Verdict(False, False, f"{what}; {largest:.0e} and {norm:.0e} are allowed", error, largest)
        return lambda: wrong
    times = _timer(trial, operands)

    def verdict() -> Verdict:
        seconds, mlx_seconds = times()
        reason = "" if seconds < mlx_seconds else f"it takes {seconds * 1e6:.1f} µs, MLX {mlx_seconds * 1e6:.1f} µs"
        return Verdict(True, not reason, reason, error, largest, seconds, mlx_seconds)

    return verdict


def _errors(found: mx.array, expected: mx.array) -> tuple[float, float]:
    """Returns the largest error relative to the largest value, and the norm of the errors relative to that of the
    values.
    """
    if found.shape != expected.shape:
        return float("nan"), float("nan")
    a, b = found.astype(mx.float32), expected.astype(mx.float32)
    difference = mx.abs(a - b)
    scale, norm = mx.maximum(mx.abs(b).max(), 1e-9), mx.maximum(mx.sqrt(mx.square(b).sum()), 1e-9)
    error, relative = difference.max() / scale, mx.sqrt(mx.square(difference).sum()) / norm
    # a maximum may ignore NaN
    return (error.item(), relative.item()) if mx.isfinite(difference).all().item() else (float("inf"), float("inf"))  # type: ignore[return-value]


def _timer(trial: Trial, operands: tuple[mx.array, ...]) -> Callable[[], tuple[float, float]]:
    """Compiles a kernel and MLX's ops as the decoder traces them.

    Returns:
        A function that times the kernel and MLX's ops alternately, and returns the median seconds of a call of each. If
            MLX's ops take much longer, they are not traced.
    """
    count = min(_MOST_SETS, -(-_CACHES // max(1, sum(a.nbytes for a in operands))))
    sets = [operands, *(trial.operands() for _ in range(count - 1))]
    flat = [array for one in sets for array in one]
    mx.eval(flat)

    def rounds(function: Callable[..., Any], traced: bool) -> Callable[[], float]:
        return _rounds(_all_sets(function, len(operands), traced), flat)

    def measured(mlx: Callable[[], float]) -> tuple[float, float]:
        times = [(kernel(), mlx()) for _ in range(_REPEATS)]
        seconds, mlx_seconds = (statistics.median(column) / count for column in zip(*times, strict=True))
        return seconds, mlx_seconds

    def decided(found: tuple[float, float]) -> bool:
        return not trial.traced or _TRACING * found[0] < found[1]

    with kernels(False):
        kernel, plain = rounds(trial.timed or trial.kernel, trial.traced), rounds(trial.usual, False)
        traced = None if decided(measured(plain)) else rounds(trial.usual, True)

    def times() -> tuple[float, float]:
        with kernels(False):
            if traced is None and decided(found := measured(plain)):
                return found
            return measured(traced or rounds(trial.usual, True))

    return times


def _all_sets(function: Callable[..., Any], width: int, traced: bool) -> Callable[..., list[Any]]:
    def run(*flat: mx.array) -> list[Any]:
        return [list(function(*flat[k : k + width])) for k in range(0, len(flat), width)]

    return mx.compile(run) if traced else run


def _rounds(traced: Callable[..., Any], flat: list[mx.array]) -> Callable[[], float]:
    """Returns a function that times many rounds as one run, so that starting and ending GPU work hardly counts."""

    def seconds(rounds: int) -> float:
        start = time.perf_counter()
        mx.eval([traced(*flat) for _ in range(rounds)])
        return (time.perf_counter() - start) / rounds

    seconds(1)  # compiles
    rounds = max(1, min(200, round(_SECONDS / min(seconds(1) for _ in range(2)))))
    return lambda: seconds(rounds)
