"""Next-token distributions from logits: likelihoods and divergences, summed in float64."""

from __future__ import annotations

import numpy as np

from ..errors import NumericalError


class Distributions:
    """R softmax distributions over V tokens.

    Each term is float32, relative to the largest term of its row. Sums are float64.

    Args:
        logits: [R, V] float32.

    Raises:
        NumericalError: a logit is NaN or infinite.
    """

    def __init__(self, logits: np.ndarray) -> None:
        if not np.isfinite(logits).all():
            raise NumericalError(
                "the output head produced NaN or infinity; the checkpoint is damaged (run `flash-moe verify`) or its "
                "activations overflow (load it with dtype='float32')"
            )
        self._logits = logits - logits.max(axis=1, keepdims=True)
        self._terms = np.exp(self._logits)
        self._sums = self._terms.sum(axis=1, dtype=np.float64)

    def nll(self, tokens: np.ndarray) -> np.ndarray:
        """Returns -ln of the probability of one token per row, [R] float64, for tokens [R] int."""
        return np.log(self._sums) - self._logits[np.arange(len(tokens)), tokens]

    def top(self) -> np.ndarray:
        """Returns the most probable token of each row, [R] int."""
        return self._logits.argmax(axis=1)

    def kl(self, other: Distributions) -> np.ndarray:
        """Returns KL(self || other) in nats, [R] float64: Σ p (ln p - ln q)."""
        # Takes differences of logits first, which are exactly 0 for equal distributions.
        differences = self._terms * (self._logits - other._logits)
        mean = differences.sum(axis=1, dtype=np.float64) / self._sums
        return np.maximum(mean + np.log(other._sums) - np.log(self._sums), 0.0)  # rounding may give -1e-9
