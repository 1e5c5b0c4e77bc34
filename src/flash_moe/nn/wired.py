"""Memory that macOS keeps wired for the GPU: that of the weights which every token reads."""

from __future__ import annotations

import weakref

import mlx.core as mx

_held: dict[int, int] = {}  # bytes by the identity of who needs them


def keep_wired(owner: object, nbytes: int) -> None:
    """Asks macOS to keep so much more of MLX's memory wired, until ``owner`` is freed. Elsewhere nothing happens.

    Memory that is not wired may be compressed while the page cache fills with experts, and then the next token waits for
    weights. MLX wires what it holds and what it allocates next, until the limit is reached. So this comes right before the
    weights are loaded, and leaves no room for what comes later: pages with experts stay the system's to take back. A higher
    limit that somebody else has set stays.

    Args:
        nbytes: of the weights, of what loading them takes, and of all that MLX holds already.
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
    """Sets the limit to what is held, at most the system's; ``before`` is what this module had set it to."""
    most = int(mx.device_info()["max_recommended_working_set_size"])
    previous = mx.set_wired_limit(min(sum(_held.values()), most))
    if previous > min(before, most):
        mx.set_wired_limit(previous)
