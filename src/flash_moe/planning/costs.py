"""The cost of work on a machine, in seconds and bytes per second, measured or predicted.

:class:`Group` describes several identical machines that share the experts and sum their outputs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from .needs import Kind, Needs

LATENCY = 50e-6  # assumed seconds of a message from one machine to the next
BANDWIDTH = 1e9  # assumed bytes per second of a connection


@dataclass(frozen=True)
class LayerCost:
    """The cost of one layer of a kind, with its experts loaded.

    Attributes:
        token: seconds of one decoded token, including experts, without a context.
        key: additional seconds per token of context.
        chunk: fixed seconds of a chunk of a prompt, without its experts.
        chunk_token: additional seconds per token of the chunk.
        chunk_pair: additional seconds per pair of token and key.
    """

    token: float
    key: float
    chunk: float
    chunk_token: float
    chunk_pair: float


@dataclass(frozen=True)
class ReadCost:
    """The speeds at which records are loaded, in bytes per second.

    Attributes:
        ssd, ssd_group: from the SSD, in fetches of one token and of a prompt.
        memory, memory_group: from the page cache; infinite if its pages are used in place.
    """

    ssd: float
    ssd_group: float
    memory: float
    memory_group: float


@dataclass(frozen=True)
class Costs:
    """All costs of a machine that an estimate needs.

    Attributes:
        bandwidth: bytes of weights per second in matrix-vector products.
        flops: floating point operations per second in products with many rows.
        record, row: seconds of a prompt's chunk per used expert, and per pair of token and expert.
        draw: seconds to sample a token from logits on the host.
        reads: speeds of reads; None if the checkpoint is not on this machine, so that the disk could not be measured.
        timed: whether layers were timed, as opposed to predicted from bandwidth and flops.
    """

    bandwidth: float
    flops: float
    layers: Mapping[Kind, LayerCost]
    record: float
    row: float
    draw: float
    reads: ReadCost | None
    timed: bool = True


def expert_flops(needs: Needs) -> float:
    """Returns the floating point operations of one token in one expert."""
    return 2.0 * needs.expert_weights


def token_bytes(needs: Needs, kind: Kind) -> float:
    """Returns the bytes of weights and states that one token reads and writes in a layer of this kind."""
    experts = needs.experts_per_token * needs.record if kind.sparse else 0
    return needs.layer[kind] + 2 * needs.work[kind].state + experts


@dataclass(frozen=True)
class Group:
    """A group of machines in a ring; each has its share of the experts.

    Attributes:
        machines: number of machines.
        latency: seconds of a message from one machine to the next. bandwidth: bytes per second of a connection.
    """

    machines: int = 1
    latency: float = LATENCY
    bandwidth: float = BANDWIDTH

    def busiest(self, experts: int) -> float:
        """Returns the expected share of a token's experts on the machine that holds most of them.

        Each expert is on any machine with equal probability. Then P(no machine has more than m) is K!/n^K times the
        coefficient of x^K in (Σ_{j≤m} x^j/j!)^n.
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
        """Returns the seconds of a sum: every machine sends 2(n - 1) times an n-th of the bytes to the next."""
        messages = 2 * (self.machines - 1)
        return messages * (self.latency + nbytes / self.machines / self.bandwidth)


ALONE = Group()
