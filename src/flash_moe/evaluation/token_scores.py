"""Scores every token of a text with a model, and compares with a reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ..errors import ArgumentError
from ..nn.linear import Linear
from .distributions import Distributions
from .layerwise_model import LayerwiseModel
from .sequences import TokenSequence

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Comparison:
    """The comparison with a reference on the same N tokens.

    Attributes:
        nll: [N] float64, -ln of the probability of the token in the reference.
        kl: [N] float64, KL(reference || model) of the distributions that predict the token, in nats.
        same_top: [N] bool, whether both have the same most probable token.
    """

    nll: np.ndarray
    kl: np.ndarray
    same_top: np.ndarray


@dataclass(frozen=True)
class TokenScores:
    """The scores of N predicted tokens: all tokens of each sequence except the first.

    Attributes:
        sequence: [N] int, the sequence of the token.
        assistant: [N] bool, whether the assistant wrote the token.
        nll: [N] float64, -ln of the probability of the token in the model.
        comparison: the comparison with a reference; None without a reference.
    """

    sequence: np.ndarray
    assistant: np.ndarray
    nll: np.ndarray
    comparison: Comparison | None = None

    def of_assistant(self) -> TokenScores | None:
        """Returns the scores of only the assistant's tokens; None if there are none."""
        if not (mask := self.assistant).any():
            return None
        c = self.comparison
        comparison = None if c is None else Comparison(c.nll[mask], c.kl[mask], c.same_top[mask])
        return TokenScores(self.sequence[mask], self.assistant[mask], self.nll[mask], comparison)


def token_scores(
    model: LayerwiseModel,
    sequences: Sequence[TokenSequence],
    reference: LayerwiseModel | None = None,
    progress: Progress | None = None,
) -> TokenScores:
    """Runs all sequences through the reference, if there is one, then through the model, and scores their tokens.

    Memory holds the final hidden states of each run, [T, H] per sequence, and the logits of a few rows at a time.

    Args:
        progress: function that is called as ``progress(stage, done, total)`` with the stages ``"reference layers"``,
            ``"layers"`` (or ``"decoded tokens"``, for a :class:`~.decoded.DecodedModel`) and ``"tokens"``.

    Raises:
        ArgumentError: no sequence has two tokens, or the reference has another vocabulary.
        PromptError: a sequence is longer than the context of a model.
        NumericalError: a model produced NaN.
        CheckpointError, ExpertReadError: weights are damaged or cannot be read.
    """
    counts = [len(sequence.tokens) - 1 for sequence in sequences]
    if not any(counts):
        raise ArgumentError("no sequence has two tokens, so there is none to predict; pass more text")
    if reference is not None:
        _check_vocabulary(model, reference, sequences)

    def run(which: LayerwiseModel, stage: str) -> list[mx.array]:
        report = None if progress is None else lambda done, total: progress(stage, done, total)
        return which.final_states([sequence.tokens for sequence in sequences], report)

    states = [] if reference is None else [run(reference, f"reference {reference.unit}")]
    states.append(run(model, model.unit))
    heads = [model.head()]
    if reference is not None:
        heads.insert(0, heads[0] if model.shares_head(reference) else reference.head())

    step = max(1, model.chunk_bytes // (4 * model.config.vocab_size))
    parts, done = [], 0
    for sequence, *hidden in zip(sequences, *states, strict=True):
        targets = np.array(sequence.tokens[1:], int)
        for start in range(0, len(targets), step):
            rows = slice(start, min(start + step, len(targets)))
            parts.append(_score([_logits(head, x[rows]) for head, x in zip(heads, hidden, strict=True)], targets[rows]))
            done += rows.stop - start
            if progress is not None:
                progress("tokens", done, sum(counts))
    nll, *comparison = (np.concatenate(column) for column in zip(*parts, strict=True))
    return TokenScores(
        np.repeat(np.arange(len(counts)), counts),
        np.concatenate([np.array(sequence.assistant[1:], bool) for sequence in sequences]),
        nll,
        Comparison(*comparison) if comparison else None,
    )


def _logits(head: Linear, hidden: mx.array) -> np.ndarray:
    return np.array(head(hidden).astype(mx.float32))


def _score(logits: list[np.ndarray], targets: np.ndarray) -> tuple[np.ndarray, ...]:
    """Returns the likelihoods of the model, and the comparison if the logits of a reference are given."""
    *reference, model = map(Distributions, logits)
    own = model.nll(targets)
    if not reference:
        return (own,)
    return own, reference[0].nll(targets), reference[0].kl(model), reference[0].top() == model.top()


def _check_vocabulary(model: LayerwiseModel, reference: LayerwiseModel, sequences: Sequence[TokenSequence]) -> None:
    """Raises ArgumentError unless the tokens represent the same text in both models."""
    own, other = model.config.vocab_size, reference.config.vocab_size
    if own != other:
        raise ArgumentError(
            f"the reference has a vocabulary of {other} tokens, the model one of {own}; "
            "only models with the same tokenizer can be compared"
        )
    for number, sequence in enumerate(sequences, start=1):
        if reference.tokenizer.decode(sequence.tokens) != model.tokenizer.decode(sequence.tokens):
            raise ArgumentError(
                f"the tokens of sequence {number} are another text to the reference's tokenizer; "
                "only models with the same tokenizer can be compared"
            )
