"""Writes a packed checkpoint with the dimensions of Qwen3.5-397B-A17B that takes almost no disk space.

    python tools/sparse_checkpoint.py FOLDER [--largest]

All weights are holes in sparse files: 217 GB of zeros that the file system does not store; with ``--largest`` those of
Qwen3.8-2.4T-A95B, 1.3 TB. Loading it and running a token touches everything that the real model would touch.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from random_checkpoint import tensor_shapes, text_config, write_tokenizer

from flash_moe.checkpoint.folder import INDEX
from flash_moe.checkpoint.names import module_path
from flash_moe.checkpoint.packed import MANIFEST, Manifest, PackedLayer, checksum, layer_file, layer_header
from flash_moe.checkpoint.safetensors import build_header
from flash_moe.formats import ProjectionFormat, Quantization, part_shapes
from flash_moe.models.qwen3_5 import Qwen35
from flash_moe.record import PROJECTIONS, RecordLayout

FULL_SIZE: dict[str, Any] = text_config(
    vocab_size=248_320, hidden_size=4096, num_hidden_layers=60, num_attention_heads=32, num_key_value_heads=2,
    head_dim=256, linear_num_key_heads=16, linear_num_value_heads=64, linear_key_head_dim=128,
    linear_value_head_dim=128, num_experts=512, num_experts_per_tok=10, moe_intermediate_size=1024,
    shared_expert_intermediate_size=1024, max_position_embeddings=262_144,
)  # fmt: skip
LARGEST = FULL_SIZE | text_config(
    vocab_size=248_320, hidden_size=8192, num_hidden_layers=92, num_attention_heads=64, num_key_value_heads=4,
    head_dim=256, linear_num_key_heads=16, linear_num_value_heads=128, linear_key_head_dim=128,
    linear_value_head_dim=128, num_experts=512, num_experts_per_tok=10, moe_intermediate_size=2048,
    shared_expert_intermediate_size=2048, max_position_embeddings=262_144,
)  # fmt: skip
mlx_name = Qwen35().mlx_name
QUANTIZATION, GATES = Quantization(4, 64), Quantization(8, 64)


def write_sparse(
    folder: Path, text: dict[str, Any], expert_bits: int = 4, resident_bits: int = 4, *, nested: bool = True
) -> Path:
    """Writes the checkpoint: groups of 64, bfloat16 scales, 8-bit gates, everything else but the experts 4 bits.

    Args:
        expert_bits: of the experts; 32 for plain float32.
        resident_bits: of everything else but gates.
        nested: whether config.json describes a model that sees, too, or the text model alone.
    """
    folder.mkdir(parents=True)
    section: dict[str, Any] = {"group_size": 64, "bits": resident_bits, "mode": "affine"}
    weight_map = {}
    resident: dict[str, dict[str, tuple[str, tuple[int, ...]]]] = {}
    for name, shape in tensor_shapes(text).items():
        if ".experts." in name:
            continue
        file = f"model-{name.split('.')[1] if name.startswith('layers.') else 'rest'}.safetensors"
        for own_name, dtype, stored_shape in stored(name, shape, section, Quantization(resident_bits, 64)):
            resident.setdefault(file, {})[own_name] = (dtype, stored_shape)
            weight_map[own_name] = file
    for file, tensors in resident.items():
        write_holes(folder / file, build_header(tensors, metadata={"format": "mlx"}), nbytes(tensors))
    fmt = (
        ProjectionFormat("F32", None) if expert_bits == 32 else ProjectionFormat("BF16", Quantization(expert_bits, 64))
    )
    layout = RecordLayout.build(text["hidden_size"], text["moe_intermediate_size"], dict.fromkeys(PROJECTIONS, fmt))
    checksums = (checksum(bytes(layout.stride)),) * text["num_experts"]
    layers = {}
    for i in range(text["num_hidden_layers"]):
        header = layer_header(i, text["num_experts"], layout)
        write_holes(folder / layer_file(i), header, text["num_experts"] * layout.stride)
        layers[i] = PackedLayer(layer_file(i), layout, checksums)
    (folder / MANIFEST).write_text(Manifest(layers).dump())
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = {"model_type": "qwen3_5_moe", "text_config": text} if nested else text | {"model_type": "qwen3_5_moe_text"}
    config["quantization"] = section
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(folder)
    return folder


def stored(
    name: str, shape: tuple[int, ...], section: dict[str, Any], q: Quantization
) -> list[tuple[str, str, tuple[int, ...]]]:
    """Name, type and shape of each tensor that an MLX checkpoint stores for one of Hugging Face's."""
    if name.endswith("conv1d.weight"):
        return [(mlx_name(name), "BF16", (shape[0], shape[2], 1))]
    if len(shape) == 1:
        return [(mlx_name(name), "BF16", shape)]
    module = module_path(name)
    if name.endswith(("mlp.gate.weight", "shared_expert_gate.weight")):
        q = GATES
        section[mlx_name(module)] = {"group_size": q.group_size, "bits": q.bits}
    return [
        (mlx_name(f"{module}.{kind}"), dtype, part)
        for kind, (dtype, part) in part_shapes(*shape, ProjectionFormat("BF16", q)).items()
    ]


def nbytes(tensors: dict[str, tuple[str, tuple[int, ...]]]) -> int:
    last = json.loads(build_header(tensors)[8:])
    return max(entry["data_offsets"][1] for entry in last.values())


def write_holes(path: Path, header: bytes, nbytes: int) -> None:
    with path.open("wb") as stream:
        stream.write(header)
        stream.truncate(len(header) + nbytes)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--largest", action="store_true")
    arguments = parser.parse_args()
    folder, text = arguments.folder, LARGEST if arguments.largest else FULL_SIZE
    if folder.exists():
        sys.exit(f"{folder} exists already; choose another folder, or delete it")
    write_sparse(folder, text, nested=not arguments.largest)
    apparent = sum(file.stat().st_size for file in folder.iterdir())
    stored = sum(file.stat().st_blocks for file in folder.iterdir()) * 512
    print(f"{folder}: {apparent / 1e9:.1f} GB apparent, {stored / 1e6:.1f} MB on disk")


if __name__ == "__main__":
    main()
