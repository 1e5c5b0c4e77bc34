"""Attributes that an object holds until it is closed, in the process that made it."""

from __future__ import annotations

import os
from typing import Any, Generic, TypeVar, overload

from .errors import ForkError, ModelClosedError

T = TypeVar("T")
_used_in: list[int] = []  # the process that computes


class UntilClosed(Generic[T]):
    """An attribute that closing takes away. Whatever needs it afterwards raises one clear error.

    The threads that read and compute do not exist in a forked process, where waiting for them would never end: there
    the attribute cannot be read either.

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
    """Takes an :class:`UntilClosed` attribute away.

    Returns:
        Its value, for closing it; None where it was taken before, or belongs to another process.
    """
    process, value = vars(owner).pop(name, (None, None))
    return value if process == os.getpid() else None


def enter_process() -> None:
    """Notes that this process computes from now on.

    Raises:
        ForkError: the process that it was forked from did so before: then MLX waits for ever here.
    """
    if _used_in and _used_in[0] != os.getpid():
        raise ForkError(_used_in[0])
    _used_in[:] = [os.getpid()]


def check_open(owner: object, name: str) -> None:
    """Raises what reading an :class:`UntilClosed` attribute raises."""
    getattr(owner, name)


def is_open(owner: object, name: str) -> bool:
    """Returns whether an :class:`UntilClosed` attribute can be read."""
    return vars(owner).get(name, (None,))[0] == os.getpid()
