"""Perplexity of a model, and its divergence from a reference: scores of tokens as a few numbers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..errors import ArgumentError
from .estimates import Estimate, clustered_mean, exponential
from .token_scores import TokenScores


@dataclass(frozen=True)
class Perplexity:
    """The perplexity of a model on a text; standard errors take the tokens of a sequence as one cluster.

    Attributes:
        tokens, sequences: predicted tokens, and the sequences they are from.
        nll: mean of -ln of the tokens' probabilities.
        perplexity: exp of that.
    """

    tokens: int
    sequences: int
    nll: Estimate
    perplexity: Estimate

    def __str__(self) -> str:
        return f"perplexity {self.perplexity} over {self.tokens:,} tokens of {self.sequences:,} sequences"


@dataclass(frozen=True)
class Divergence:
    """The distance of a model from a reference on the same tokens; standard errors as in :class:`Perplexity`.

    Attributes:
        kl: mean KL(reference || model) of the next-token distributions, in nats.
        kl_999: its 99.9th percentile over tokens.
        kl_max: its maximum.
        same_top: share of tokens where both have the same likeliest token.
        perplexity_ratio: perplexity of the model over that of the reference; its standard error is that of paired
            differences, smaller than those of the two perplexities.
        reference: the reference's perplexity.
    """

    kl: Estimate
    kl_999: float
    kl_max: float
    same_top: Estimate
    perplexity_ratio: Estimate
    reference: Perplexity

    def __str__(self) -> str:
        return (
            f"KL {self.kl} nats, 99.9% {self.kl_999:.4g}, maximum {self.kl_max:.4g}, "
            f"same top token {self.same_top}, perplexity ratio {self.perplexity_ratio}"
        )


def perplexity(scores: TokenScores) -> Perplexity:
    """Returns the model's perplexity on all tokens of ``scores``."""
    return _perplexity(scores.nll, scores.sequence)


def divergence(scores: TokenScores) -> Divergence:
    """Returns how far the model is from the reference on all tokens of ``scores``.

    Raises:
        ArgumentError: the scores were made without a reference.
    """
    if (comparison := scores.comparison) is None:
        raise ArgumentError("the scores have no comparison; pass a reference to token_scores")
    return Divergence(
        kl=clustered_mean(comparison.kl, scores.sequence),
        kl_999=float(np.quantile(comparison.kl, 0.999)),
        kl_max=float(comparison.kl.max()),
        same_top=clustered_mean(comparison.same_top, scores.sequence),
        perplexity_ratio=exponential(clustered_mean(scores.nll - comparison.nll, scores.sequence)),
        reference=_perplexity(comparison.nll, scores.sequence),
    )


def _perplexity(nll: np.ndarray, sequence: np.ndarray) -> Perplexity:
    mean = clustered_mean(nll, sequence)
    return Perplexity(len(nll), len(np.unique(sequence)), mean, exponential(mean))
