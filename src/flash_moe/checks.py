"""Numbers that users pass: taken as they are, or refused with an error that names them."""

from __future__ import annotations

import math
import operator
from numbers import Real
from typing import Any

from .errors import ArgumentError


class _Default(int):
    """A number that nobody asked for: it may be capped, where the same number would be refused."""


DEFAULT_EXPERTS_PER_TOKEN = _Default(4)


def is_default(value: int | None) -> bool:
    """Returns whether nobody asked for this number."""
    return isinstance(value, _Default)


def resolve_experts_per_token(wanted: int | None, own: int) -> int:
    """Returns K: the model's own for None. The default is capped at the model's own.

    Args:
        own: what the router was trained for.

    Raises:
        ArgumentError: ``wanted`` is not from 1 to the model's own K.
    """
    if wanted is None or isinstance(wanted, _Default):
        return int(min(wanted or own, own))  # a plain int: kernels take no other
    try:
        return integer("experts_per_token", wanted, 1, own)
    except ArgumentError as error:
        raise ArgumentError(f"{error}, the model's own number") from None


def integer(name: str, value: Any, least: int, most: int | None = None) -> int:
    """Returns a Python integer, a NumPy integer or anything else that Python can index with as an int.

    Raises:
        ArgumentError: it is no integer, or not from ``least`` to ``most``.
    """
    expected = f"an integer of {least} or more" if most is None else f"an integer from {least} to {most}"
    try:
        number = least - 1 if isinstance(value, bool) else operator.index(value)
    except Exception:  # arrays of several elements, and whatever else an __index__ may raise
        number = least - 1
    if number < least or (most is not None and number > most):
        raise _error(name, value, expected)
    return number


def real(name: str, value: Any, expected: str, least: float, most: float = math.inf, above: float = -math.inf) -> float:
    """Returns a real number as a float.

    Args:
        expected: says in the error what is right.

    Raises:
        ArgumentError: it is no finite real number from ``least`` to ``most``, or not greater than ``above``.
    """
    try:
        number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    except (OverflowError, ValueError):  # an integer beyond the largest float
        number = math.nan
    if not (math.isfinite(number) and least <= number <= most and number > above):
        raise _error(name, value, expected)
    return number


def shown(value: Any) -> str:
    """Returns the beginning of a value's ``repr`` for an error; its type where it has none or too deep a one."""
    try:
        return f"{value!r:.200}"
    except Exception:  # whatever a __repr__ may raise; numbers of too many digits
        return f"of type {type(value).__name__}"


def _error(name: str, value: Any, expected: str) -> ArgumentError:
    return ArgumentError(f"{name} is {shown(value)}, expected {expected}")
