"""Things that are compared take turns, so that what changes on the machine meanwhile meets all of them."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any


def in_turns(runs: int, tasks: dict[str, Callable[[], Any]]) -> dict[str, list[Any]]:
    """What tasks return that take turns, after one round that is not counted."""
    found: dict[str, list[Any]] = {name: [] for name in tasks}
    for number in range(runs + 1):
        for name, task in tasks.items():
            result = task()
            if number:
                found[name].append(result)
    return found


def medians(runs: int, tasks: dict[str, Callable[[], float]]) -> dict[str, float]:
    """Of what :func:`in_turns` finds."""
    return {name: statistics.median(values) for name, values in in_turns(runs, tasks).items()}
