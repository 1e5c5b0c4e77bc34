"""Loads a model for a command."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .console import at_terminal

if TYPE_CHECKING:
    from ..model import Model


def load(model: str, revision: str | None, options: dict[str, Any]) -> Model:
    """``Model.load`` with these options, of a folder or a hub repository. Loading is worth no lines in a file.

    In a group of machines this returns on rank 0 only: the others follow, and end with it.
    """
    from ..checkpoint.hub import resolve
    from ..model import Model

    loaded = Model.load(resolve(model, revision=revision), progress=at_terminal(), group="auto", **options)
    if loaded.follow():
        raise SystemExit
    return loaded
