"""What every record must hold, worked out from the tensors alone; nothing of flash_moe is used."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import safetensors

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
Tensors = dict[str, tuple[str, list[int], bytes]]


def stored_tensors(folder: Path) -> Tensors:
    """Dtype, shape and bytes of every tensor in the *.safetensors files of a folder."""
    return {
        name: (tensor["dtype"], tensor["shape"], bytes(tensor["data"]))
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in safetensors.deserialize(file.read_bytes())
    }


def expected_records(folder: Path) -> dict[tuple[int, int], bytes]:
    """The record of every (layer, expert) of a checkpoint that is not packed."""
    config = json.loads((folder / "config.json").read_text())
    text = config.get("text_config", config)
    tensors = {name.partition("layers.")[2]: tensor for name, tensor in stored_tensors(folder).items()}
    records = {}
    for layer in range(text["num_hidden_layers"]):
        for expert in range(text["num_experts"]):
            records[layer, expert] = _record(tensors, f"{layer}.mlp.", expert, text["num_experts"])
    return records


def _record(tensors: Tensors, prefix: str, expert: int, experts: int) -> bytes:
    record = b""
    for projection in PROJECTIONS:
        for part in ("weight", "scales", "biases"):
            data = _part(tensors, prefix, expert, experts, projection, part)
            record += data + bytes(-len(data) % 64)
    return record + bytes(-len(record) % 16384)


def _part(tensors: Tensors, prefix: str, expert: int, experts: int, projection: str, part: str) -> bytes:
    def share(name: str, pieces: int, piece: int) -> bytes:
        data = tensors[name][2] if name in tensors or not name.endswith(".biases") else b""  # affine modes only
        size = len(data) // pieces
        return data[piece * size : (piece + 1) * size]

    if f"{prefix}switch_mlp.{projection}.weight" in tensors:
        return share(f"{prefix}switch_mlp.{projection}.{part}", experts, expert)
    if part != "weight":
        return b""
    if f"{prefix}experts.{expert}.{projection}.weight" in tensors:
        return share(f"{prefix}experts.{expert}.{projection}.weight", 1, 0)
    if projection == "down_proj":
        return share(f"{prefix}experts.down_proj", experts, expert)
    return share(f"{prefix}experts.gate_up_proj", 2 * experts, 2 * expert + (projection == "up_proj"))


def rewrite(file: Path, change: Callable[[dict[str, np.ndarray]], object]) -> None:
    """Loads the tensors of a file, lets ``change`` alter the dictionary, and saves them again with their metadata."""
    from safetensors.numpy import load_file, save_file

    with safetensors.safe_open(file, framework="np") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    change(tensors)
    save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, file, metadata=metadata)
