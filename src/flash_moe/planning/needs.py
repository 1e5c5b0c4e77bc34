"""The needs of a checkpoint: bytes of memory, bytes and operations per token; and the division of memory."""

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

_KEPT_SHARE, _KEPT_LEAST = 0.1, 2 << 30  # minimum bytes of memory for the system and for activations


class Kind(NamedTuple):
    """A kind of layer: its mixer, and whether it has routed experts."""

    mixer: str
    sparse: bool


@dataclass(frozen=True)
class Needs:
    """The needs of a model; sizes are in bytes.

    Attributes:
        resident: weights that stay in memory, with floats in the dtype of activations.
        head: weights of the output head.
        layer: mean resident weights of one layer of each kind.
        layers: number of layers of each kind.
        work: work of a layer of each kind, in addition to its weights.
        record: mean size of the record of an expert. expert_layers: number of layers with routed experts.
        expert_weights: number of weights of one expert.
        experts: size of all routed experts.
        slots: size of the bank of slots; 0 if records are mapped.
        capacity: number of records in one fetch of prefill.
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
        """The expert bytes that one token requests."""
        return round(self.experts_per_token * self.record * self.expert_layers)

    @property
    def kv_per_token(self) -> int:
        """The bytes of keys and values per token."""
        return sum(n * self.work[kind].kv_per_token for kind, n in self.layers.items())

    @property
    def state(self) -> int:
        """The bytes of the caches that do not grow with the context."""
        return sum(n * self.work[kind].state for kind, n in self.layers.items())


def needs(
    checkpoint: ModelFiles | AdaptedFiles,
    table: RecordTable,
    experts_per_token: int,
    float_bytes: int,
    expert_io: ExpertIO,
) -> Needs:
    """Computes the needs from the headers of a checkpoint.

    Args:
        float_bytes: bytes of a float in activations: 4 on the CPU, 2 for bfloat16 and float16.
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
        total: memory of the machine.
        kept: memory for the system, other programs and activations.
        resident, cache, slots: resident weights; caches for the context; the bank of slots.
        left: memory in which the page cache can keep experts; negative if the model does not fit.
        largest_context: number of tokens whose caches use all of the remaining memory, or the model's own limit; 0 if
            the model does not fit.
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
        context: number of tokens that memory must have room for.
        total: bytes of memory of the machine.
        used: bytes that other programs use now, if known.
    """
    kept = max(round(_KEPT_SHARE * total), _KEPT_LEAST, used)
    room = total - kept - need.resident - need.slots - need.state
    limit = need.dimensions.max_position_embeddings
    largest = min(limit, room // need.kv_per_token) if need.kv_per_token else limit
    keys = context * need.kv_per_token
    cache, left = need.state + keys, room - keys
    return Memory(total, kept, need.resident, cache, need.slots, left, largest if room >= 0 else 0)


def decode_hits(need: Needs, left: int, probabilities: np.ndarray) -> float:
    """Returns the expected share of a token's expert bytes in memory, if ``left`` bytes can hold experts."""
    if not need.record:
        return 1.0
    return hit_rate(probabilities, max(0, left) / need.record / need.expert_layers)


def prompt_hits(need: Needs, left: int, touched: float) -> float:
    """Returns the share of the ``touched`` expert bytes that a prompt finds in memory.

    A prompt passes through the layers one after the other. If its experts do not all fit, LRU has just dropped those
    that it needs next.
    """
    return 1.0 if left >= need.experts else 0.0 if left < touched else left / need.experts
