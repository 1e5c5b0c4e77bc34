"""What running a checkpoint takes, whatever the machine: bytes in memory, bytes and operations per token."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

from ..checkpoint.records import RecordTable
from ..config import FULL_ATTENTION, ModelConfig
from ..experts.opening import ExpertIO, fetch_capacity
from ..experts.slots import slot_count
from ..models import ModelFiles

_FLOAT32 = ("A_log", "dt_bias")  # kept in float32 whatever the activations have


class Kind(NamedTuple):
    """What tells layers apart: their mixer, and whether they have routed experts."""

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
        record: of one expert, the mean of all layers. expert_layers: layers with routed experts.
        experts: of all routed experts.
        slots: the bank into which experts are read; 0 where they are mapped.
        capacity: records fetched together in prefill.
        kv_per_token: keys and values of one token. state: what does not grow with the context.
        layer_state: recurrent state of one linear layer.
    """

    config: ModelConfig
    experts_per_token: int
    resident: int
    head: int
    layer: dict[Kind, float]
    layers: dict[Kind, int]
    record: float
    expert_layers: int
    experts: int
    slots: int
    capacity: int
    kv_per_token: int
    state: int
    layer_state: int

    @property
    def bytes_per_token(self) -> int:
        """Of the experts that one token asks for."""
        return round(self.experts_per_token * self.record * self.expert_layers)


def layer_kind(config: ModelConfig, layer: int) -> Kind:
    """The kind of a layer."""
    return Kind(config.layer_types[layer], config.sparse_layers[layer])


def needs(
    checkpoint: ModelFiles, table: RecordTable, experts_per_token: int, float_bytes: int, expert_io: ExpertIO
) -> Needs:
    """Reads it off the headers.

    Args:
        float_bytes: of one float as activations have it: 4 on the CPU, 2 for bfloat16 and float16.
        expert_io: ``"mapped"``, ``"slots"`` or ``"resident"``.
    """
    config = checkpoint.config
    held: Counter[str] = Counter()
    for name, info in checkpoint.resident.items():
        size = 4 if info.dtype == "U32" or name.endswith(_FLOAT32) else 1 if info.dtype == "U8" else float_bytes
        part = ".".join(name.split(".")[:2]) if name.startswith("layers.") else name.split(".")[0]
        held[part] += math.prod(info.shape) * size
    layers: Counter[Kind] = Counter()
    layer_bytes: Counter[Kind] = Counter()
    for i in range(config.num_hidden_layers):
        layers[layer_kind(config, i)] += 1
        layer_bytes[layer_kind(config, i)] += held[f"layers.{i}"]
    attention = config.layer_types.count(FULL_ATTENTION)
    channels = 2 * config.key_dim + config.value_dim
    delta = 4 * config.value_dim * config.linear_key_head_dim
    delta += (config.linear_conv_kernel_dim - 1) * channels * float_bytes
    capacity = fetch_capacity(table, experts_per_token)
    experts, slots = table.nbytes, slot_count(table, capacity) * table.max_stride
    return Needs(
        config=config,
        experts_per_token=experts_per_token,
        resident=sum(held.values()),
        head=held["embed_tokens" if config.tie_word_embeddings else "lm_head"],
        layer={kind: layer_bytes[kind] / count for kind, count in layers.items()},
        layers=dict(layers),
        record=experts / max(1, table.count),
        expert_layers=len(table.layouts),
        experts=experts,
        slots={"slots": slots, "mapped": 0, "resident": experts}[expert_io],
        capacity=capacity,
        kv_per_token=attention * 2 * config.num_key_value_heads * config.head_dim * float_bytes,
        state=(config.num_hidden_layers - attention) * delta,
        layer_state=delta,
    )
