"""Checks the options of a generation before its first token."""

from __future__ import annotations

import inspect
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..checks import integer
from .sampling import Sampling
from .stopping import StopStrings


@dataclass(frozen=True)
class Options:
    """The options of one generation.

    Attributes:
        max_tokens: the maximum number of tokens to generate.
        sampling: the options of sampling.
        stop: strings that end the generation.
        reasoning_budget: the maximum number of reasoning tokens; None for no limit.
    """

    max_tokens: int
    sampling: Sampling
    stop: tuple[str, ...]
    reasoning_budget: int | None = None


def resolve_options(
    defaults: Mapping[str, Any],
    *,
    vocab_size: int,
    max_tokens: int,
    temperature: float | None,
    top_p: float | None,
    top_k: int | None,
    min_p: float | None,
    repetition_penalty: float | None,
    presence_penalty: float | None,
    frequency_penalty: float | None,
    logit_bias: Mapping[int, float] | None,
    seed: int | None,
    stop: str | Sequence[str] | None,
    reasoning_budget: int | None = None,
) -> Options:
    """Checks options and returns them. The arguments are those of :meth:`flash_moe.Model.stream`.

    Args:
        defaults: values for sampling options that are None.
        vocab_size: width of the model's logits, to check ``logit_bias``.

    Raises:
        ArgumentError: an option is out of range.
    """
    given = {
        "temperature": temperature, "top_p": top_p, "top_k": top_k, "min_p": min_p,
        "repetition_penalty": repetition_penalty, "presence_penalty": presence_penalty,
        "frequency_penalty": frequency_penalty, "logit_bias": logit_bias,
    }  # fmt: skip
    chosen = dict(defaults) | {name: value for name, value in given.items() if value is not None}
    sampling = Sampling(**chosen, seed=seed)
    for token in sampling.logit_bias:
        integer("a token id of logit_bias", token, 0, vocab_size - 1)
    budget = None if reasoning_budget is None else integer("reasoning_budget", reasoning_budget, 0)
    return Options(integer("max_tokens", max_tokens, 1), sampling, StopStrings(stop).stops, budget)


def sampling_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns those options of a stream that :func:`resolve_options` takes."""
    names = inspect.signature(resolve_options).parameters
    return {name: value for name, value in options.items() if name in names}


def forbid(sampling: Sampling, tokens: Collection[int]) -> Sampling:
    """Returns the sampling options with some tokens forbidden."""
    if not tokens:
        return sampling
    return replace(sampling, logit_bias={**sampling.logit_bias, **dict.fromkeys(tokens, -math.inf)})
