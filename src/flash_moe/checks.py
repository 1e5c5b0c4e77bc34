"""Checks numbers that users pass; an invalid number raises an error that names the argument."""

from __future__ import annotations

import math
import operator
from numbers import Real
from typing import Any

from .errors import ArgumentError


class _Default(int):
    """A default number, as opposed to a number from the user. A default that is too large is capped, not rejected."""


DEFAULT_EXPERTS_PER_TOKEN = _Default(4)


def is_default(value: int | None) -> bool:
    """Returns whether the number is a default that the user did not set."""
    return isinstance(value, _Default)


def resolve_experts_per_token(wanted: int | None, own: int) -> int:
    """Returns K. None means the model's own K, and the default is capped at that K.

    Args:
        own: the K that the router was trained for.

    Raises:
        ArgumentError: ``wanted`` is not from 1 to the model's own K.
    """
    if wanted is None or isinstance(wanted, _Default):
        return int(min(wanted or own, own))  # a plain int: kernels accept no other type
    try:
        return integer("experts_per_token", wanted, 1, own)
    except ArgumentError as error:
        raise ArgumentError(f"{error}, the model's own number, or None for that number") from None


def integer(name: str, value: Any, least: int, most: int | None = None) -> int:
    """Returns a value as an int, if it is a Python or NumPy integer or has ``__index__``.

    Raises:
        ArgumentError: the value is not an integer, or not from ``least`` to ``most``.
    """
    expected = f"an integer of {least} or more" if most is None else f"an integer from {least} to {most}"
    try:
        number = least - 1 if isinstance(value, bool) else operator.index(value)
    except Exception:  # arrays of several elements, and any other error of __index__
        number = least - 1
    if number < least or (most is not None and number > most):
        raise _error(name, value, expected)
    return number


def real(name: str, value: Any, expected: str, least: float, most: float = math.inf, above: float = -math.inf) -> float:
    """Returns a real number as a float.

    Args:
        expected: describes valid values in the error message.

    Raises:
        ArgumentError: the value is not a finite real number, not from ``least`` to ``most``, or not greater than
            ``above``.
    """
    try:
        number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    except (OverflowError, ValueError):  # an integer beyond the largest float
        number = math.nan
    if not (math.isfinite(number) and least <= number <= most and number > above):
        raise _error(name, value, expected)
    return number


def shown(value: Any) -> str:
    """Returns the beginning of a value's ``repr`` for an error message, or its type if ``repr`` fails."""
    try:
        return f"{value!r:.200}"
    except Exception:  # any error of __repr__; integers with too many digits
        return f"of type {type(value).__name__}"


def _error(name: str, value: Any, expected: str) -> ArgumentError:
    return ArgumentError(f"{name} is {shown(value)}, expected {expected}")
