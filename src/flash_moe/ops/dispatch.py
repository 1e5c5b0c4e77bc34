"""Decides which ops run as kernels on a GPU: those that passed their trial, all, or none."""

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

Case = tuple[str | int, ...]  # an op, and the sizes and dtypes that its kernels are compiled for

_accepted: set[Case] = set()  # cases with a positive verdict, from this process or a stored one
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
    """Returns whether all kernels are used (True), none (False), or those that passed their trial (None).

    ``FLASH_MOE_KERNELS=off`` overrides the program's choice, and the program's choice overrides ``on``.

    Raises:
        ArgumentError: the variable is not on, off or auto.
    """
    setting = os.environ.get(VARIABLE, "").lower()
    if setting not in _SETTINGS:
        raise ArgumentError(f"{VARIABLE} is {setting!r}, expected on, off or auto")
    asked = _allowed.get()
    return False if setting == "off" else _SETTINGS[setting] if asked is None else asked


def accept(cases: Iterable[Case]) -> None:
    """Enables the kernels of these cases in this process."""
    _accepted.update(cases)


def on_gpu() -> bool:
    """Returns whether MLX computes on a GPU."""
    return kernel.back_end() is not None


def dtype_name(dtype: mx.Dtype) -> str:
    """Returns a dtype's name, e.g. ``"bfloat16"``."""
    return str(dtype).rpartition(".")[2]


@contextmanager
def kernels(allowed: bool | None) -> Iterator[None]:
    """Sets the kernels for the block: all (True), none (False), or those that passed their trial (None)."""
    token = _allowed.set(allowed)
    try:
        yield
    finally:
        _allowed.reset(token)


@contextmanager
def kernels_needed() -> Iterator[dict[Case, None]]:
    """Collects the cases of ops that could run as kernels inside the block. No op runs as a kernel there."""
    found: dict[Case, None] = {}
    token = _needed.set(found)
    try:
        yield found
    finally:
        _needed.reset(token)
