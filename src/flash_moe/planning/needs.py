"""The needs of a checkpoint on any machine: bytes in memory, bytes and operations per token; and how they share it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ..checkpoint.records import RecordTable
from ..experts.opening import ExpertIO, fetch_capacity
from ..experts.slots import slot_count
from ..models import AdaptedFiles, ModelFiles
from ..nn.layer_work import LayerWork
from ..nn.network import Dimensions
from .hit_rate import hit_rate

_KEPT_SHARE, _KEPT_LEAST = 0.1, 2 << 30  # of memory, for the system and for activations, at the least


class Kind(NamedTuple):
    """A kind of layers: their mixer, and whether they have routed experts."""

    mixer: str
    sparse: bool


@dataclass(frozen=True)
class Needs:
    """Sizes in bytes.

    Attributes:
        resident: weights that stay in memory, as they are held there (floats in the dtype of activations).
        head: those of them that turn a hidden state into logits.
        layer: resident weights of one layer of each kind, on average.
        layers: how many layers there are of each kind.
        work: what a layer of each kind takes beside its weights.
        record: of one expert, the mean of all layers. expert_layers: layers with routed experts.
        expert_weights: numbers in the matrices of one expert.
        experts: of all routed experts.
        slots: the bank into which experts are read; 0 where they are mapped.
        capacity: records fetched together in prefill.
    """

    dimensions: Dimensions
    experts_per_token: int
    resident: int
    head: int
    layer: dict[Kind, float]
    layers: dict[Kind, int]
    work: dict[Kind, LayerWork]
    record: float
    expert_layers: int
    expert_weights: float
    experts: int
    slots: int
    capacity: int

    @property
    def bytes_per_token(self) -> int:
        """Of the experts that one token asks for."""
        return round(self.experts_per_token * self.record * self.expert_layers)

    @property
    def kv_per_token(self) -> int:
        """Keys and values of one token."""
        return sum(n * self.work[kind].kv_per_token for kind, n in self.layers.items())

    @property
    def state(self) -> int:
        """What of the caches does not grow with the context."""
        return sum(n * self.work[kind].state for kind, n in self.layers.items())


def needs(
    checkpoint: ModelFiles | AdaptedFiles,
    table: RecordTable,
    experts_per_token: int,
    float_bytes: int,
    expert_io: ExpertIO,
) -> Needs:
    """Reads it off the headers.

    Args:
        float_bytes: of one float as activations have it: 4 on the CPU, 2 for bfloat16 and float16.
        expert_io: ``"mapped"``, ``"slots"`` or ``"resident"``.
    """
    held: Counter[str] = Counter()
    for name, nbytes in checkpoint.held_bytes(float_bytes).items():
        held[".".join(name.split(".")[:2]) if name.startswith("layers.") else name.split(".")[0]] += nbytes
    layers: Counter[Kind] = Counter()
    layer_bytes: Counter[Kind] = Counter()
    work: dict[Kind, LayerWork] = {}
    for i in range(checkpoint.dimensions.num_hidden_layers):
        found = checkpoint.layer_work(i, float_bytes)
        kind = Kind(found.mixer, found.sparse)
        layers[kind] += 1
        layer_bytes[kind] += held[f"layers.{i}"]
        work[kind] = found
    capacity = fetch_capacity(table, experts_per_token)
    experts, slots = table.nbytes, slot_count(table, capacity) * table.max_stride
    return Needs(
        dimensions=checkpoint.dimensions,
        experts_per_token=experts_per_token,
        resident=sum(held.values()),
        head=held[checkpoint.head],
        layer={kind: layer_bytes[kind] / count for kind, count in layers.items()},
        layers=dict(layers),
        work=work,
        record=experts / max(1, table.count),
        expert_layers=len(table.layouts),
        expert_weights=sum(layout.weights for layout in table.layouts.values()) / max(1, len(table.layouts)),
        experts=experts,
        slots={"slots": slots, "mapped": 0, "resident": experts}[expert_io],
        capacity=capacity,
    )


@dataclass(frozen=True)
class Memory:
    """The division of a machine's memory.

    Attributes:
        total: of the machine.
        kept: by the system and other programs, and room for activations.
        resident, cache, slots: weights; keys, values and states at the context; the bank that experts are read into.
        left: for the page cache to keep experts in; below 0 where the model does not fit.
        largest_context: tokens that leave the page cache nothing, or the model's own limit; 0 where nothing fits.
    """

    total: int
    kept: int
    resident: int
    cache: int
    slots: int
    left: int
    largest_context: int

    @property
    def fits(self) -> bool:
        return self.left >= 0


def share_memory(need: Needs, context: int, total: int, used: int = 0) -> Memory:
    """Divides a machine's memory.

    Args:
        context: tokens to have room for.
        total: bytes of the machine.
        used: bytes that other programs hold now, where that is known.
    """
    kept = max(round(_KEPT_SHARE * total), _KEPT_LEAST, used)
    room = total - kept - need.resident - need.slots - need.state
    limit = need.dimensions.max_position_embeddings
    largest = min(limit, room // need.kv_per_token) if need.kv_per_token else limit
    keys = context * need.kv_per_token
    cache, left = need.state + keys, room - keys
    return Memory(total, kept, need.resident, cache, need.slots, left, largest if room >= 0 else 0)


def decode_hits(need: Needs, left: int, probabilities: np.ndarray) -> float:
    """Returns share of a token's expert bytes that are expected in memory where ``left`` bytes can hold experts."""
    if not need.record:
        return 1.0
    return hit_rate(probabilities, max(0, left) / need.record / need.expert_layers)


def prompt_hits(need: Needs, left: int, touched: float) -> float:
    """Returns share of the ``touched`` bytes of experts that a prompt finds in memory.

    It goes through the layers one after the other, so where not all that it touches fits, what it needs next has just
    been forgotten.
    """
    return 1.0 if left >= need.experts else 0.0 if left < touched else left / need.experts
