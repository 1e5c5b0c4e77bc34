"""Loads a model for a command, with the options that all generating commands share."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .arguments import (
    DropColdOption,
    DtypeOption,
    ExpertCacheOption,
    ExpertIOChoice,
    ExpertIOOption,
    PreferCachedOption,
    PrefetchOption,
    RevisionOption,
    ThreadsOption,
    VerboseOption,
    experts_per_token,
    size,
)
from .console import at_terminal

if TYPE_CHECKING:
    from ..model import Model

Loader = Callable[[str, "str | None"], "Model"]
"""Loads a folder or a hub repository, with K as the user typed it."""


def load(model: str, revision: str | None, options: dict[str, Any]) -> Model:
    """Loads a folder or a hub repository with these options. It shows progress only in a terminal.

    In a group of machines, it returns only on rank 0. The other ranks follow until rank 0 ends.
    """
    from ..checkpoint.hub import resolve
    from ..model import Model

    loaded = Model.load(resolve(model, revision=revision), progress=at_terminal(), group="auto", **options)
    if loaded.follow():
        raise SystemExit
    return loaded


def loads(command: Callable[..., None]) -> Callable[..., None]:
    """Adds the options of loading to a command, and passes it a :data:`Loader` as ``loading``."""
    own = inspect.signature(command, eval_str=True).parameters.values()
    common = inspect.signature(_loader, eval_str=True).parameters

    def wrapped(**given: Any) -> None:
        loading = _loader(**{name: given.pop(name) for name in common})
        command(**given, loading=loading)

    parameters = [*(parameter for parameter in own if parameter.name != "loading"), *common.values()]
    wrapped.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # what Typer reads
    wrapped.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    wrapped.__doc__ = command.__doc__
    return wrapped


def _loader(
    expert_io: ExpertIOOption = ExpertIOChoice.auto,
    expert_cache: ExpertCacheOption = "0",
    prefetch: PrefetchOption = False,
    drop_cold_below: DropColdOption = 0.0,
    prefer_cached: PreferCachedOption = 0.0,
    dtype: DtypeOption = None,
    threads: ThreadsOption = None,
    revision: RevisionOption = None,
    verbose: VerboseOption = False,
) -> Loader:
    options = {
        "expert_io": expert_io.value, "expert_cache": size(expert_cache, "--expert-cache"), "prefetch": prefetch,
        "drop_cold_below": drop_cold_below, "prefer_cached": prefer_cached, "dtype": None if dtype is None else dtype.value,
        "threads": threads,
    }  # fmt: skip
    return lambda model, k: load(model, revision, {"experts_per_token": experts_per_token(k), **options})
