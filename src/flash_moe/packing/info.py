"""Describes a checkpoint in numbers, from its headers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..models import open_checkpoint
from ..record import RecordLayout


@dataclass(frozen=True)
class Info:
    """The description of a checkpoint.

    Attributes:
        form: ``"packed"``, ``"MLX quantised"`` or ``"float"``.
        expert_formats: for each distinct record layout, its description, e.g. ``"4-bit, groups of 64"``, and its number
            of layers.
        bits_per_weight: bits per weight of the experts, including scales and biases; 0 without experts.
        record_bytes: bytes of the largest record.
        resident_bytes, expert_bytes: bytes of the resident weights, and of the routed experts in the folder.
        bytes_per_token: expert bytes per token at ``experts_per_token``, for all machines together.
        share: the share of the experts in the folder, as "I/N"; None for all.
    """

    path: str
    model_type: str
    form: str
    layers: int
    attention_layers: int
    hidden_size: int
    vocab_size: int
    context: int
    experts: int
    model_experts_per_token: int
    experts_per_token: int
    expert_formats: dict[str, int]
    bits_per_weight: float
    record_bytes: int
    resident_bytes: int
    expert_bytes: int
    bytes_per_token: int
    share: str | None = None


def describe(folder: Path, experts_per_token: int | None = None) -> Info:
    """Describes a checkpoint folder.

    Args:
        experts_per_token: K for ``bytes_per_token``; None means the model's own.

    Raises:
        ConfigError, CheckpointError: the folder has no checkpoint that the library can run.
        ArgumentError: K is not from 1 to the model's own.
    """
    checkpoint = open_checkpoint(folder)
    table, known = checkpoint.records(None), checkpoint.dimensions
    k = checkpoint.experts_for(experts_per_token)
    checkpoint.check_resident(table.layouts)
    layers = [checkpoint.layer_work(i, 2) for i in range(known.num_hidden_layers)]
    formats: dict[str, int] = {}
    for layout in table.layouts.values():
        text = _format(layout)
        formats[text] = formats.get(text, 0) + 1
    quantized = any(fmt.quantization for layout in table.layouts.values() for fmt in layout.formats.values())
    return Info(
        path=str(folder),
        model_type=known.model_type,
        form="packed" if table.packed else "MLX quantised" if quantized else "float",
        layers=known.num_hidden_layers,
        attention_layers=sum(layer.kv_per_token > 0 for layer in layers),
        hidden_size=known.hidden_size,
        vocab_size=known.vocab_size,
        context=known.max_position_embeddings,
        experts=known.num_experts,
        model_experts_per_token=known.num_experts_per_tok,
        experts_per_token=k,
        expert_formats=formats,
        bits_per_weight=_bits_per_weight(list(table.layouts.values())),
        record_bytes=table.max_stride,
        resident_bytes=sum(info.nbytes for info in checkpoint.resident.values()),
        expert_bytes=table.nbytes,
        bytes_per_token=k * sum(layout.stride for layout in table.layouts.values()),
        share=None if table.share.is_whole else str(table.share),
    )


def _bits_per_weight(layouts: list[RecordLayout]) -> float:
    """Returns the mean over all layers, which have the same number of weights."""
    return sum(layout.bits_per_weight for layout in layouts) / max(len(layouts), 1)


def _format(layout: RecordLayout) -> str:
    texts = {}
    for name, fmt in layout.formats.items():
        q = fmt.quantization
        texts[name] = f"{q}{' with a global scale' if fmt.global_scale else ''}" if q else fmt.dtype
    if len({*texts.values()}) == 1:
        return next(iter(texts.values()))
    return "; ".join(f"{name} {text}" for name, text in texts.items())
