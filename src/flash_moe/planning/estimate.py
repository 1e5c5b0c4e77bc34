"""Predicts the time of a token and of a prompt, term by term, from needs and costs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ..generation.chunks import prefill_chunk
from .costs import ALONE, Costs, Group, ReadCost, expert_flops, token_bytes
from .hit_rate import distinct, hit_rate
from .needs import Needs


@dataclass(frozen=True)
class Seconds:
    """The predicted time of a token or a prompt; the terms add up.

    Attributes:
        ssd: wait for records that are not in memory.
        page_cache: wait for records to be copied from the page cache.
        memory: reads of weights at the speed of matrix-vector products; 0 for prompts.
        compute: arithmetic at the speed of large products; 0 for tokens.
        overhead: the rest: launches, waits for indices, small operations, unpacking of quantised weights, and sampling.
        network: sums over several machines.
    """

    ssd: float
    page_cache: float
    memory: float
    compute: float
    overhead: float
    network: float = 0.0

    @property
    def total(self) -> float:
        """The sum of all terms."""
        return sum(dataclasses.astuple(self))


def decode_seconds(needs: Needs, costs: Costs, context: int, hits: float, held: float, group: Group = ALONE) -> Seconds:
    """Predicts the time of one token.

    Args:
        context: number of tokens before it.
        hits: share of the requested expert bytes that are in memory.
        held: share of the requested expert bytes in the store's own memory, for which nothing is read or copied.
        group: the machines, which all wait for the one that has most of a layer's experts.
    """
    layers = sum(n * (costs.layers[kind].token + context * costs.layers[kind].key) for kind, n in needs.layers.items())
    head = needs.head / costs.bandwidth
    weights = head + sum(n * token_bytes(needs, kind) / costs.bandwidth for kind, n in needs.layers.items())
    memory = min(weights, layers + head)
    busiest = group.busiest(needs.experts_per_token)
    asked = needs.bytes_per_token * busiest
    elsewhere = min(memory, (needs.bytes_per_token - asked) / costs.bandwidth)  # on other machines
    network = needs.expert_layers * group.sum_seconds(4 * needs.dimensions.hidden_size)
    reads = costs.reads or ReadCost(math.nan, math.nan, math.inf, math.inf)
    missing, copied = (1 - hits) * asked, max(0.0, hits - held) * asked
    ssd = missing / reads.ssd if missing else 0.0
    overhead = layers + head - memory + costs.draw
    return Seconds(ssd, copied / reads.memory, memory - elsewhere, 0.0, overhead, network)


def held_share(needs: Needs, probabilities: np.ndarray) -> float:
    """Returns the share of requests whose record is in the bank of slots."""
    if not needs.slots or not needs.record:
        return 0.0
    return hit_rate(probabilities, needs.slots / needs.record / needs.expert_layers)


def prefill_seconds(
    needs: Needs,
    costs: Costs,
    prompt: int,
    hits: float,
    probabilities: np.ndarray,
    *,
    keeps: bool,
    memory: int,
    group: Group = ALONE,
) -> Seconds:
    """Predicts the time of a prompt up to its logits.

    Args:
        hits: share of the used records that are in the page cache.
        keeps: whether the records of a chunk stay in memory for the next chunk.
        memory: bytes of memory of the machine, which determine the chunk size.
        group: the machines; each computes an equal part of the experts.
    """
    wait = ssd = layers = compute = network = 0.0
    for tokens, context in _chunks(prompt, prefill_chunk(needs.dimensions, needs.experts_per_token, memory)):
        touched = distinct(probabilities, tokens)
        again = _both(probabilities, tokens, context) / touched if keeps else 0.0
        found = hits + (1 - hits) * again
        touched, rows = touched / group.machines, tokens * needs.experts_per_token / group.machines
        network += needs.expert_layers * group.sum_seconds(4 * tokens * needs.dimensions.hidden_size)
        experts = touched * costs.record + rows * costs.row
        for kind, count in needs.layers.items():
            cost, work, pairs = costs.layers[kind], needs.work[kind], tokens * (context + tokens)
            seconds = cost.chunk + tokens * cost.chunk_token + pairs * cost.chunk_pair
            operations = tokens * work.flops + pairs * work.pair_flops
            if kind.sparse:
                seconds += experts
                operations += rows * expert_flops(needs)
                waited = count * _wait(needs, costs.reads, touched, found, experts)
                wait += waited
                ssd += waited * _ssd_share(costs.reads, found)
            layers += count * seconds
            compute += count * operations / costs.flops
    layers += needs.head / costs.bandwidth + costs.draw
    compute = min(compute, layers)
    return Seconds(ssd, wait - ssd, 0.0, compute, layers - compute, network)


def _chunks(prompt: int, size: int) -> Iterator[tuple[int, int]]:
    """Yields the number of tokens of each chunk, and of tokens before it."""
    for start in range(0, prompt, size):
        yield min(size, prompt - start), start


def _both(probabilities: np.ndarray, tokens: int, others: int) -> float:
    """Returns the expected number of experts of a layer that both groups of tokens use."""
    return distinct(probabilities, tokens) + distinct(probabilities, others) - distinct(probabilities, tokens + others)


def _wait(needs: Needs, reads: ReadCost | None, touched: float, hits: float, experts: float) -> float:
    """Returns the seconds that a layer waits for records: for the whole first group, then for reads that do not overlap
    with computing.
    """
    seconds = touched * needs.record * _seconds_per_byte(reads, hits)
    groups = max(1, math.ceil(touched / needs.capacity))
    return seconds / groups + (groups - 1) * max(0.0, (seconds - experts) / groups)


def _seconds_per_byte(reads: ReadCost | None, hits: float) -> float:
    if reads is None:
        return math.nan if hits < 1 else 0.0
    return ((1 - hits) / reads.ssd_group if hits < 1 else 0.0) + hits / reads.memory_group


def _ssd_share(reads: ReadCost | None, hits: float) -> float:
    """Returns the share of a wait that is due to the SSD."""
    if reads is None or hits == 1:
        return 0.0 if hits == 1 else 1.0
    return (1 - hits) / reads.ssd_group / _seconds_per_byte(reads, hits)
