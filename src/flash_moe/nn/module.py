"""The base of all modules: MLX's, with attributes that Python finds at once."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import mlx.core as mx
from mlx import nn


class Module(nn.Module):
    """An MLX module. Arrays and modules in it are found like any other attribute, and not only after all else has failed.

    MLX keeps them as items of a dictionary, which is where ``parameters`` and ``update`` look. A lookup as an attribute
    ends there last, after 1.5 µs on a slow machine, and a token makes forty in every layer.
    """

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(name, value)
        self.__dict__[name] = value

    def __delitem__(self, name: str) -> None:
        super().__delitem__(name)
        self.__dict__.pop(name, None)

    def clear(self) -> None:
        """Lets go of all arrays and modules in it."""
        for name in list(self):
            del self[name]


def traced(method: Callable[..., Any]) -> Callable[..., Any]:
    """Traces a method as ``mx.compile`` does, for an attribute of its own object, which is freed all the same.

    ``mx.compile(method)`` would keep the object, which keeps the trace: such a circle is left to Python's collector.
    """
    function, owner = method.__func__, weakref.proxy(method.__self__)  # type: ignore[attr-defined]
    compiled: Callable[..., Any] = mx.compile(lambda *arguments: function(owner, *arguments))
    return compiled
