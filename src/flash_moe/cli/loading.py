"""Loads a model for a command."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .console import at_terminal

if TYPE_CHECKING:
    from ..model import Model


def load(model: str, revision: str | None, options: dict[str, Any]) -> Model:
    """``Model.load`` with these options, of a folder or a hub repository. Loading is worth no lines in a file."""
    from ..checkpoint.hub import resolve
    from ..model import Model

    return Model.load(resolve(model, revision=revision), progress=at_terminal(), **options)
