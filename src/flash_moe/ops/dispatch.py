"""Which ops are ours and not MLX's on a GPU, on which back end, and why: the one place that decides."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from . import kernel

# Where a kernel beats MLX's own ops. Metal: nobody has measured yet, so kernels there have to be asked for.
BEATS_MLX: dict[str, frozenset[str]] = {
    "cuda": frozenset(
        # delta_chunks is no kernel but MLX's ops: its own rule takes 100 µs a token there, one after the other
        {"quantized_matvec", "experts", "router", "attention", "delta_net", "delta_chunks", "add_rms_norm"}
    ),
    "metal": frozenset(),
}
_VARIABLE = "FLASH_MOE_KERNELS"
_allowed: ContextVar[bool | None] = ContextVar("flash_moe_kernels", default=None)


def use_kernel(op: str) -> bool:
    """Whether ``op`` runs as a kernel here.

    ``FLASH_MOE_KERNELS=off`` switches all of them off, ``on`` uses them even where nothing has been measured.
    """
    back_end, wanted = kernel.back_end(), _allowed.get()
    if back_end is None or wanted is False:
        return False
    setting = os.environ.get(_VARIABLE, "").lower()
    if setting == "off":
        return False
    return bool(wanted) or setting == "on" or op in BEATS_MLX[back_end]


def on_gpu() -> bool:
    """Whether arrays are computed on a GPU."""
    return kernel.back_end() is not None


@contextmanager
def kernels(allowed: bool | None) -> Iterator[None]:
    """Within: all kernels (True), none (False), or those that :data:`BEATS_MLX` names (None)."""
    token = _allowed.set(allowed)
    try:
        yield
    finally:
        _allowed.reset(token)
