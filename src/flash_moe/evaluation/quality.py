"""Summarises token scores: perplexity of a model, and divergence from a reference."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..errors import ArgumentError
from .estimates import Estimate, clustered_mean, exponential
from .token_scores import TokenScores


@dataclass(frozen=True)
class Perplexity:
    """The perplexity of a model on a text. For standard errors, each sequence is one cluster.

    Attributes:
        tokens, sequences: numbers of predicted tokens and of sequences.
        nll: mean of -ln of the probabilities of tokens.
        perplexity: exp of ``nll``.
    """

    tokens: int
    sequences: int
    nll: Estimate
    perplexity: Estimate

    def __str__(self) -> str:
        return f"perplexity {self.perplexity} over {self.tokens:,} tokens of {self.sequences:,} sequences"


@dataclass(frozen=True)
class Divergence:
    """The distance of a model from a reference on the same tokens, with standard errors as in :class:`Perplexity`.

    Attributes:
        kl: mean KL(reference || model) of the next-token distributions, in nats.
        kl_999: the 99.9th percentile of the KL divergence over tokens.
        kl_max: the maximum of the KL divergence over tokens.
        same_top: share of positions where both have the same most probable token.
        perplexity_ratio: perplexity of the model divided by that of the reference. Its standard error is that of paired
            differences, which is smaller than those of the two perplexities.
        reference: perplexity of the reference.
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
    """Returns the divergence of the model from the reference on all tokens of ``scores``.

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
