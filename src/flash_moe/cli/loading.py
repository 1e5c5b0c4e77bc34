"""Loads a model behind a progress bar."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .progress import Bar

if TYPE_CHECKING:
    from ..model import Model


def load(model: str, revision: str | None, options: dict[str, Any]) -> Model:
    """``Model.load`` with these options, of a folder or a hub repository."""
    from ..checkpoint.hub import resolve
    from ..model import Model

    folder = resolve(model, revision=revision)  # shows a download in its own way
    with Bar("loading") as bar:

        def progress(stage: str, done: int, total: int) -> None:
            if stage in ("layers", "kernels"):
                bar.count(done, total, stage)
            else:
                bar.bytes(done, total)

        return Model.load(folder, progress=progress, **options)
