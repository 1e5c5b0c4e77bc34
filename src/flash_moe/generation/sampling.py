"""Samples the next token from logits."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import mlx.core as mx
import numpy as np

from ..checks import integer, real
from ..errors import ArgumentError, NumericalError
from .constraint import Constraint
from .filters import decisive_tokens, kept_tokens, largest

LogitsProcessor: TypeAlias = Callable[[mx.array, mx.array], mx.array]
"""``f(tokens [T] int32, logits [1, V] float32) -> logits [1, V]``, as in mlx-lm; T is the number of tokens of the
prompt and the reply so far.
"""


@dataclass(frozen=True)
class Sampling:
    """The options of sampling. The filters are applied in the order of the attributes, as in transformers.

    Attributes:
        logit_bias: values added to the logits of single tokens; -inf forbids a token.
        repetition_penalty: positive logits of tokens that occurred before are divided by it, and negative ones
            multiplied; 1 turns it off.
        presence_penalty: subtracted from the logits of all tokens of the reply so far; 0 turns it off.
        frequency_penalty: subtracted from the logits of these tokens, multiplied by the number of their occurrences; 0
            turns it off.
        temperature: divides the logits; 0 takes the most probable token (greedy).
        top_k: keep the k most probable tokens; 0 keeps all.
        top_p: keep the smallest number of most probable tokens whose probabilities sum to at least this value; 1 keeps
            all.
        min_p: keep tokens whose probability is at least this fraction of that of the most probable one; 0 keeps all.
        seed: makes sampling reproducible; None uses a new random seed each time.
    """

    repetition_penalty: float = 1.0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        checked = {
            "repetition_penalty": real("repetition_penalty", self.repetition_penalty, "0.01 to 100", 0.01, 100),
            "presence_penalty": real("presence_penalty", self.presence_penalty, "-100 to 100", -100, 100),
            "frequency_penalty": real("frequency_penalty", self.frequency_penalty, "-100 to 100", -100, 100),
            "temperature": real("temperature", self.temperature, "a number of 0 or more", 0),
            "top_k": integer("top_k", self.top_k, 0),
            "top_p": real("top_p", self.top_p, "a number above 0 and at most 1", 0, 1, above=0),
            "min_p": real("min_p", self.min_p, "a number from 0 to 1", 0, 1),
            "seed": None if self.seed is None else integer("seed", self.seed, 0),
            "logit_bias": _checked_bias(self.logit_bias),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    @property
    def filters(self) -> bool:
        """Whether top_k, top_p or min_p is on."""
        return bool(self.top_k or self.top_p < 1 or self.min_p)

    @property
    def adjusts(self) -> bool:
        """Whether biases or penalties change the logits before sampling."""
        return self.repetition_penalty != 1 or bool(self.presence_penalty or self.frequency_penalty or self.logit_bias)


def _checked_bias(bias: Mapping[int, float]) -> dict[int, float]:
    if not isinstance(bias, Mapping):
        raise ArgumentError(f"logit_bias is {bias!r:.80}, expected a dict from token ids to numbers")
    return {
        integer("a token id of logit_bias", token, 0): (
            -math.inf
            if value == -math.inf
            else real("a value of logit_bias", value, "a finite number, or -inf", -math.inf)
        )
        for token, value in bias.items()
    }


@dataclass(frozen=True)
class TokenLogprobs:
    """The network's log probabilities at a token, before temperature, penalties, filters and formats.

    Attributes:
        token: id of the chosen token.
        logprob: its log probability, in nats.
        top: the most probable tokens with their log probabilities, in order.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


class Sampler:
    """Samples one token after the other.

    Args:
        sampling: the options of sampling.
        prompt: token ids of the prompt, for the repetition penalty and the processors.
        constraint: the format of the reply, or None.
        processors: functions that change the logits, applied in order before everything else.
        logprobs: number of most probable tokens to report with every token; None reports nothing.

    Attributes:
        logprobs: log probabilities at the last sampled token, or None.
    """

    def __init__(
        self,
        sampling: Sampling,
        prompt: Sequence[int] = (),
        *,
        constraint: Constraint | None = None,
        processors: Sequence[LogitsProcessor] = (),
        logprobs: int | None = None,
    ) -> None:
        self._sampling, self._constraint, self._processors = sampling, constraint, tuple(processors)
        self._random = np.random.default_rng(sampling.seed)
        self._prompt, self._seen = list(prompt), set(prompt)
        self._reply: list[int] = []
        self._pushed: list[int] = []
        self._counts: dict[int, int] = {}
        self._reported = logprobs
        self.logprobs: TokenLogprobs | None = None

    def prepare(self) -> None:
        """Waits until everything except the logits is ready for the next token.

        Raises the errors of :meth:`__call__`.
        """
        if self._constraint is not None:
            self._constraint.prepare()

    def __call__(self, logits: mx.array) -> int:
        """Samples a token id from [V] float32 logits.

        Raises:
            NumericalError: the logits hold NaN.
            ArgumentError: processors or biases forbid all tokens that the format allows.
            FormatError: the format cannot be enforced any longer.
        """
        adjusted = logits
        for processor in self._processors:
            adjusted = self._processed(processor, adjusted)
        token = self._pushed.pop(0) if self._pushed else self._draw(adjusted)
        if self._reported is not None:
            self.logprobs = token_logprobs(logits, token, self._reported)
        if self._constraint is not None:
            self._constraint.accept(token)
        self._note(token)
        return token

    def push(self, tokens: Sequence[int]) -> None:
        """Queues tokens that the next calls return regardless of the logits."""
        self._pushed += tokens

    def forced(self) -> list[int]:
        """Accepts the tokens that the format forces next, and returns them.

        Returns no tokens if a processor or a report needs the logits of every token.
        """
        if self._constraint is None or self._processors or self._pushed or self._reported is not None:
            return []
        tokens = self._constraint.forced()
        for token in tokens:
            self._constraint.accept(token)
            self._note(token)
        return tokens

    def _note(self, token: int) -> None:
        self._reply.append(token)
        self._seen.add(token)
        self._counts[token] = self._counts.get(token, 0) + 1

    def _processed(self, processor: LogitsProcessor, logits: mx.array) -> mx.array:
        found = processor(mx.array(self._prompt + self._reply, dtype=mx.int32), logits[None])
        if getattr(found, "shape", None) != (1, logits.shape[0]):
            raise ArgumentError(
                f"a logits processor returned {getattr(found, 'shape', type(found).__name__)}, expected an MLX array of "
                f"shape (1, {logits.shape[0]})"
            )
        return found[0].astype(mx.float32)

    def _draw(self, logits: mx.array) -> int:
        s, constraint = self._sampling, self._constraint
        if s.temperature == 0 and not s.adjusts:  # on the device: only the token is copied
            token = _likeliest(logits)
            if constraint is None or constraint.allows(token):
                return token
            return _likeliest(mx.where(mx.array(constraint.allowed()), logits, -mx.inf))
        values = np.array(logits, dtype=np.float64)
        _check(values.max())
        self._adjust(values)
        if constraint is not None and s.filters and s.temperature:  # the filters depend on the allowed tokens
            return self._choose(values, constraint)
        token = self._choose(values)
        if constraint is None or constraint.allows(token):
            return token
        # Sampling again after a rejection gives every allowed token p(t) + (1 - p(allowed)) p(t) / p(allowed)
        # = p(t) / p(allowed), the same as a mask before sampling. But masks are slow, and rejections are rare.
        return self._choose(np.where(constraint.allowed(), values, -np.inf))

    def _adjust(self, values: np.ndarray) -> None:
        """Applies biases and penalties in place."""
        s = self._sampling
        for token, bias in s.logit_bias.items():
            values[token] += bias
        if s.repetition_penalty != 1:
            seen = np.fromiter(self._seen, np.int64)
            values[seen] *= np.where(values[seen] < 0, s.repetition_penalty, 1 / s.repetition_penalty)
        if s.presence_penalty or s.frequency_penalty:
            tokens, counts = (np.fromiter(part, np.int64) for part in (self._counts.keys(), self._counts.values()))
            values[tokens] -= s.presence_penalty + s.frequency_penalty * counts

    def _choose(self, values: np.ndarray, filtered_by: Constraint | None = None) -> int:
        """Samples from logits; with a constraint, only from the tokens that it allows."""
        s, ids = self._sampling, None
        _check(highest := float(values.max()))
        if s.temperature == 0:
            return int(values.argmax())
        with np.errstate(over="ignore"):  # with a tiny temperature, all logits but the largest become -inf
            scaled = (values - highest) / s.temperature
        if filtered_by is not None:
            ids = decisive_tokens(scaled, s, filtered_by.allows)
            scaled = np.where(filtered_by.allowed(), scaled, -np.inf) if ids is None else scaled[ids]
            _check(scaled.max())
        chosen, probabilities = kept_tokens(scaled, s)
        token = int(self._random.choice(chosen, p=probabilities))
        return token if ids is None else int(ids[token])


def token_logprobs(logits: mx.array, token: int, count: int) -> TokenLogprobs:
    """Returns the log probabilities of a token and of the ``count`` most probable ones, from [V] logits."""
    values = np.array(logits, dtype=np.float64)
    values -= values.max()
    values -= math.log(np.exp(values).sum())
    ids = largest(values, count) if count else np.array([], np.int64)
    top = ids[np.argsort(-values[ids], kind="stable")]
    return TokenLogprobs(token, float(values[token]), tuple((int(id), float(values[id])) for id in top))


def _likeliest(logits: mx.array) -> int:
    if mx.default_device() == mx.cpu:  # in NumPy, because three MLX evaluations would take longer than the search
        values = np.array(logits, copy=False)
        token = int(values.argmax())
        top = float(values[token])
    else:
        best = mx.argmax(logits)
        token, top = int(best), float(logits[best])
    _check(top)
    return token


def _check(largest_value: float) -> None:
    if math.isnan(largest_value):
        raise NumericalError(
            "the network produced NaN logits; the checkpoint is damaged (run `flash-moe verify`) or its activations "
            "overflow (load it with dtype='float32')"
        )
    if largest_value == -math.inf:
        raise ArgumentError(
            "no token is left: logit_bias or a logits processor forbids all that may come next; have it allow one of them"
        )
