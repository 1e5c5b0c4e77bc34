"""Attributes that exist until their object is closed, and only in the process that created it."""

from __future__ import annotations

import os
from typing import Any, Generic, TypeVar, overload

from .errors import ForkError, ModelClosedError

T = TypeVar("T")
_used_in: list[int] = []  # the id of the process that computes


class UntilClosed(Generic[T]):
    """An attribute that is removed when its object is closed. Later reads raise a clear error.

    A forked process does not have the threads that read and compute, so it would wait for them forever. There, reading
    the attribute raises an error too.

    Raises:
        ModelClosedError: the attribute is read after :func:`take` or ``del``.
        ForkError: the attribute is read in another process than the one that set it.
    """

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __set__(self, owner: object, value: T) -> None:
        vars(owner)[self._name] = os.getpid(), value

    @overload
    def __get__(self, owner: None, kind: type) -> UntilClosed[T]: ...
    @overload
    def __get__(self, owner: object, kind: type) -> T: ...
    def __get__(self, owner: object | None, kind: type) -> Any:
        if owner is None:
            return self
        try:
            process, value = vars(owner)[self._name]
        except KeyError:
            raise ModelClosedError from None
        if process != os.getpid():
            raise ForkError(process)
        return value

    def __delete__(self, owner: object) -> None:
        vars(owner).pop(self._name, None)


def take(owner: object, name: str) -> Any:
    """Removes an :class:`UntilClosed` attribute and returns its value.

    Returns:
        The value, so that the caller can close it; None if it was removed before or belongs to another process.
    """
    process, value = vars(owner).pop(name, (None, None))
    return value if process == os.getpid() else None


def enter_process() -> None:
    """Marks this process as the one that computes.

    Raises:
        ForkError: the parent of this fork already computes; MLX would then wait forever in this process.
    """
    if _used_in and _used_in[0] != os.getpid():
        raise ForkError(_used_in[0])
    _used_in[:] = [os.getpid()]


def check_open(owner: object, name: str) -> None:
    """Raises the error that reading an :class:`UntilClosed` attribute would raise, if any."""
    getattr(owner, name)


def is_open(owner: object, name: str) -> bool:
    """Returns whether an :class:`UntilClosed` attribute can be read."""
    return vars(owner).get(name, (None,))[0] == os.getpid()
