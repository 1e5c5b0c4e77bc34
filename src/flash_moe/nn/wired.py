"""Keeps the memory of the resident weights wired on macOS."""

from __future__ import annotations

import weakref

import mlx.core as mx

_held: dict[int, int] = {}  # bytes by the id of their owner


def keep_wired(owner: object, nbytes: int) -> None:
    """Asks macOS to keep ``nbytes`` more of MLX's memory wired until ``owner`` is freed. On other systems, it does
    nothing.

    Memory that is not wired may be compressed while the page cache fills with experts. The next token would then wait
    for weights. MLX wires its current memory and later allocations until the limit is reached. So this function is
    called directly before the weights are loaded, with a limit that leaves no room for later allocations. The system
    can still reclaim the pages of experts. A higher limit that the program has set is not changed.

    Args:
        nbytes: bytes of the weights, of temporary memory during loading, and of all memory that MLX already holds.
    """
    if not mx.metal.is_available() or mx.default_device() == mx.cpu:
        return
    before = sum(_held.values())
    _held[id(owner)] = nbytes
    weakref.finalize(owner, _release, id(owner))
    _set_limit(before)


def _release(key: int) -> None:
    before = sum(_held.values())
    del _held[key]
    _set_limit(before)


def _set_limit(before: int) -> None:
    """Sets the limit to the wired bytes, at most that of the system.

    ``before`` is the limit that this module set last.
    """
    most = int(mx.device_info()["max_recommended_working_set_size"])
    previous = mx.set_wired_limit(min(sum(_held.values()), most))
    if previous > min(before, most):
        mx.set_wired_limit(previous)
