"""What a generation is asked to do, checked before its first token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..checks import integer
from .sampling import Sampling
from .stopping import StopStrings


@dataclass(frozen=True)
class Options:
    """Options of one generation.

    Attributes:
        max_tokens: the most tokens to generate.
        sampling: how tokens are drawn.
        stop: strings that end the generation.
    """

    max_tokens: int
    sampling: Sampling
    stop: tuple[str, ...]


def resolve_options(
    defaults: Mapping[str, Any],
    *,
    max_tokens: int,
    temperature: float | None,
    top_p: float | None,
    top_k: int | None,
    min_p: float | None,
    repetition_penalty: float | None,
    seed: int | None,
    stop: str | Sequence[str] | None,
) -> Options:
    """Returns checked options; arguments are those of :meth:`flash_moe.Model.stream`.

    Args:
        defaults: values of sampling options that are None.

    Raises:
        ArgumentError: an option is out of range.
    """
    given = {
        "temperature": temperature, "top_p": top_p, "top_k": top_k, "min_p": min_p,
        "repetition_penalty": repetition_penalty,
    }  # fmt: skip
    chosen = dict(defaults) | {name: value for name, value in given.items() if value is not None}
    return Options(
        max_tokens=integer("max_tokens", max_tokens, 1),
        sampling=Sampling(**chosen, seed=seed),
        stop=StopStrings(stop).stops,
    )
