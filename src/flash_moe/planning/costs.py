"""The cost of work on a machine, in seconds and bytes per second; measured, or computed from a chip's figures.

Several machines alike share the experts, and sum what they computed: :class:`Group`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from .needs import Kind, Needs

LATENCY = 50e-6  # seconds of a message from one machine to the next; an assumption
BANDWIDTH = 1e9  # bytes per second of a connection; an assumption


@dataclass(frozen=True)
class LayerCost:
    """One layer of a kind, with its experts loaded.

    Attributes:
        token: seconds of one decoded token, experts included, without a context.
        key: seconds more per token of context.
        chunk: seconds of a chunk of a prompt, however short, without its experts.
        chunk_token: seconds more per token of the chunk.
        chunk_pair: seconds more per token and key that it attends to.
    """

    token: float
    key: float
    chunk: float
    chunk_token: float
    chunk_pair: float


@dataclass(frozen=True)
class ReadCost:
    """Speeds at which records come into view, in bytes per second.

    Attributes:
        ssd, ssd_group: from storage, in fetches of one token and of a prompt.
        memory, memory_group: from the page cache; infinite where its pages are used in place.
    """

    ssd: float
    ssd_group: float
    memory: float
    memory_group: float


@dataclass(frozen=True)
class Costs:
    """All that an estimate needs to know of a machine.

    Attributes:
        bandwidth: bytes of weights per second that are multiplied with one vector.
        flops: floating point operations per second in products with many rows.
        record, row: seconds of a prompt's chunk per touched expert, and per token and expert.
        draw: seconds in which the host draws a token from logits.
        reads: None where the checkpoint is not here and nothing is known of the disk.
        timed: layers were timed, and not predicted from bandwidth and flops.
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
    """Operations of one token in one expert."""
    return 2.0 * needs.expert_weights


def token_bytes(needs: Needs, kind: Kind) -> float:
    """Returns bytes of weights and states that one token reads in a layer of this kind, and what it writes of them."""
    experts = needs.experts_per_token * needs.record if kind.sparse else 0
    return needs.layer[kind] + 2 * needs.work[kind].state + experts


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
