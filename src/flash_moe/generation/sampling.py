"""Choosing the next token from logits."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ..checks import integer, real
from ..errors import NumericalError

_CANDIDATES = 1024  # most probable tokens that top_p looks at first; nearly always they are enough


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; the filters apply in the order of the attributes, as in transformers.

    Attributes:
        repetition_penalty: logits of tokens seen before are divided by it (multiplied where negative); 1 is off.
        temperature: logits are divided by it; 0 takes the most probable token (greedy).
        top_k: keep the k most probable tokens; 0 keeps all.
        top_p: keep the fewest most probable tokens whose probabilities sum to at least this; 1 keeps all.
        min_p: keep tokens at least this fraction as probable as the most probable one; 0 keeps all.
        seed: makes the draws reproducible; None draws anew each time.
    """

    repetition_penalty: float = 1.0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None

    def __post_init__(self) -> None:
        checked = {
            "repetition_penalty": real("repetition_penalty", self.repetition_penalty, "0.01 to 100", 0.01, 100),
            "temperature": real("temperature", self.temperature, "a number of 0 or more", 0),
            "top_k": integer("top_k", self.top_k, 0),
            "top_p": real("top_p", self.top_p, "a number above 0 and at most 1", 0, 1, above=0),
            "min_p": real("min_p", self.min_p, "a number from 0 to 1", 0, 1),
            "seed": None if self.seed is None else integer("seed", self.seed, 0),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)


class Sampler:
    """Draws one token after the other.

    Args:
        sampling: how.
        seen: token ids of the prompt, for the repetition penalty.
    """

    def __init__(self, sampling: Sampling, seen: Iterable[int] = ()) -> None:
        self._sampling = sampling
        self._random = np.random.default_rng(sampling.seed)
        self._seen = set(seen)

    def __call__(self, logits: mx.array) -> int:
        """Draws a token id from [V] float32 logits.

        Raises:
            NumericalError: the logits hold NaN.
        """
        token = self._draw(logits)
        self._seen.add(token)
        return token

    def _draw(self, logits: mx.array) -> int:
        s = self._sampling
        if s.repetition_penalty == 1 and s.temperature == 0:
            best = mx.argmax(logits)
            token, top = int(best), float(logits[best])
            _check(top)
            return token
        values = np.array(logits, dtype=np.float64)
        _check(values.max())
        if s.repetition_penalty != 1:
            seen = np.fromiter(self._seen, np.int64)
            values[seen] *= np.where(values[seen] < 0, s.repetition_penalty, 1 / s.repetition_penalty)
        if s.temperature == 0:
            return int(values.argmax())
        with np.errstate(over="ignore"):  # a tiny temperature takes all but the largest to -inf
            scaled = (values - values.max()) / s.temperature
        ids, probabilities = kept_tokens(scaled, s)
        return int(self._random.choice(ids, p=probabilities))


def _check(largest: float) -> None:
    if math.isnan(largest):
        raise NumericalError(
            "the network produced NaN logits; the checkpoint is damaged (run `flash-moe verify`) or its activations "
            "overflow (load it with dtype='float32')"
        )


def kept_tokens(logits: np.ndarray, sampling: Sampling) -> tuple[np.ndarray, np.ndarray]:
    """Token ids that top_k, top_p and min_p leave, and their renormalised probabilities.

    Most probable first, or by id where all are kept: sorting a whole vocabulary takes longer than all the rest.
    """
    probabilities = np.exp(logits - logits.max())
    probabilities /= probabilities.sum()
    if sampling.top_k == 0 and sampling.top_p == 1 and sampling.min_p == 0:
        return np.arange(probabilities.size), probabilities
    ids = _candidates(probabilities, sampling)
    ids = ids[np.argsort(-probabilities[ids], kind="stable")]
    kept = probabilities[ids]
    if sampling.top_k:
        ids, kept = ids[: sampling.top_k], kept[: sampling.top_k] / kept[: sampling.top_k].sum()
    if sampling.top_p < 1:
        count = int(np.searchsorted(np.cumsum(kept), sampling.top_p)) + 1
        ids, kept = ids[:count], kept[:count]
    above = kept >= sampling.min_p * kept[0]
    ids, kept = ids[above], kept[above]
    return ids, kept / kept.sum()


def _candidates(probabilities: np.ndarray, sampling: Sampling) -> np.ndarray:
    """Ids, in order, of all tokens that the filters can keep: few of a vocabulary, as a rule."""
    if sampling.top_k:
        return _largest(probabilities, sampling.top_k)
    if sampling.top_p == 1:
        return np.flatnonzero(probabilities >= sampling.min_p * probabilities.max())
    count, ids = _CANDIDATES, _largest(probabilities, _CANDIDATES)
    while ids.size < probabilities.size and probabilities[ids].sum() < sampling.top_p:
        count *= 8
        ids = _largest(probabilities, count)
    return ids


def _largest(values: np.ndarray, count: int) -> np.ndarray:
    """Indices of the ``count`` largest values, or of all, in order."""
    if count >= values.size:
        return np.arange(values.size)
    return np.sort(np.argpartition(-values, count - 1)[:count])
