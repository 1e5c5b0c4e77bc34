"""Decides which ops run as kernels on a GPU: those that proved right and faster there, all, or none."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import mlx.core as mx

from ..errors import ArgumentError
from . import kernel

VARIABLE = "FLASH_MOE_KERNELS"
_SETTINGS = {"off": False, "on": True, "auto": None, "": None}

Case = tuple[str | int, ...]  # an op, and all that its kernels are compiled for

_accepted: set[Case] = set()  # proven in this process, or remembered from another
_allowed: ContextVar[bool | None] = ContextVar("flash_moe_kernels", default=None)
_needed: ContextVar[dict[Case, None] | None] = ContextVar("flash_moe_kernels_needed", default=None)


def use_kernel(op: str, *sizes: int | str | mx.Dtype) -> bool:
    """Returns whether ``op`` runs as a kernel here, at these sizes and dtypes."""
    if kernel.back_end() is None or (wanted := kernels_wanted()) is False:
        return False
    case = (op, *(dtype_name(size) if isinstance(size, mx.Dtype) else size for size in sizes))
    if (needed := _needed.get()) is not None:
        needed[case] = None
        return False
    return wanted is True or case in _accepted


def kernels_wanted() -> bool | None:
    """Returns whether all kernels are used (True), none (False), or those that proved themselves (None).

    ``FLASH_MOE_KERNELS=off`` goes before what a program asks for, and that before ``on``.

    Raises:
        ArgumentError: the variable is none of on, off and auto.
    """
    setting = os.environ.get(VARIABLE, "").lower()
    if setting not in _SETTINGS:
        raise ArgumentError(f"{VARIABLE} is {setting!r}, expected on, off or auto")
    asked = _allowed.get()
    return False if setting == "off" else _SETTINGS[setting] if asked is None else asked


def accept(cases: Iterable[Case]) -> None:
    """Lets these run as kernels from now on, in this process."""
    _accepted.update(cases)


def on_gpu() -> bool:
    """Returns whether arrays are computed on a GPU."""
    return kernel.back_end() is not None


def dtype_name(dtype: mx.Dtype) -> str:
    """Returns a dtype's name, e.g. ``"bfloat16"``."""
    return str(dtype).rpartition(".")[2]


@contextmanager
def kernels(allowed: bool | None) -> Iterator[None]:
    """Within: all kernels (True), none (False), or those that proved themselves (None)."""
    token = _allowed.set(allowed)
    try:
        yield
    finally:
        _allowed.reset(token)


@contextmanager
def kernels_needed() -> Iterator[dict[Case, None]]:
    """Within, no op runs as a kernel; collects the cases of those that could."""
    found: dict[Case, None] = {}
    token = _needed.set(found)
    try:
        yield found
    finally:
        _needed.reset(token)
