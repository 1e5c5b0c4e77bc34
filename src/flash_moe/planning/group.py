"""Several machines alike: what each does of a token, and what their sums take."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

LATENCY = 50e-6  # seconds of a message from one machine to the next; an assumption
BANDWIDTH = 1e9  # bytes per second of a connection; an assumption


@dataclass(frozen=True)
class Group:
    """Machines in a ring, of which each has its share of the experts.

    Attributes:
        machines: how many.
        latency: seconds of a message from one to the next; bandwidth: bytes per second of a connection.
    """

    machines: int = 1
    latency: float = LATENCY
    bandwidth: float = BANDWIDTH

    def busiest(self, experts: int) -> float:
        """Returns the expected part of a token's experts that the machine with the most of them has.

        Each of the experts is on any machine alike: P(none has more than m) is K!/n^K times the coefficient of x^K in
        (Σ_{j≤m} x^j/j!)^n.
        """
        expected = 0.0
        for most in range(experts):
            terms = np.array([1 / math.factorial(j) for j in range(most + 1)])
            power = np.array([1.0])
            for _ in range(self.machines):
                power = np.convolve(power, terms)[: experts + 1]
            within = power[experts] * math.factorial(experts) / self.machines**experts if len(power) > experts else 0.0
            expected += 1 - within
        return expected / experts

    def sum_seconds(self, nbytes: int) -> float:
        """Returns what a sum takes: every machine sends 2(n - 1) times an n-th of the bytes to the next."""
        messages = 2 * (self.machines - 1)
        return messages * (self.latency + nbytes / self.machines / self.bandwidth)


ALONE = Group()
