"""Writes the other files of a packed model: resident arrays, config.json, index and manifest."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..checkpoint.folder import INDEX
from ..checkpoint.packed import MANIFEST, Manifest, checksum
from ..checkpoint.safetensors import build_header
from ..dtypes import NAMES
from ..models import AdaptedFiles, ModelFiles
from .requantize import as_bytes
from .staging import Staging

_COPIED = ("generation_config.json", "tokenizer*", "special_tokens_map.json", "vocab.json", "merges.txt",
           "added_tokens.json", "chat_template*", "LICENSE*")  # fmt: skip


def save_arrays(path: Path, arrays: Mapping[str, mx.array]) -> None:
    """Writes arrays to a safetensors file as MLX does, in the order of their names.

    ``mx.save_safetensors`` does not report why a write failed; this function raises OSError.
    """
    tensors = {name: (NAMES[array.dtype], array.shape) for name, array in sorted(arrays.items())}
    with path.open("wb") as stream:
        stream.write(build_header(tensors, metadata={"format": "mlx"}))
        for name in tensors:
            stream.write(as_bytes(arrays[name]).data)


def file_checksum(path: Path) -> str:
    """Returns the checksum of a whole file."""
    with path.open("rb") as stream:
        return checksum(stream.read())


def write_descriptions(
    staging: Staging,
    checkpoint: ModelFiles | AdaptedFiles,
    section: Mapping[str, Any] | None,
    manifest: Manifest,
    weight_map: Mapping[str, str],
) -> None:
    """Writes the manifest, the index and config.json with its quantization ``section``, and copies the tokenizer files."""
    config: dict[str, Any] = json.loads(json.dumps(checkpoint.raw_config))
    for owner in (config, config.get("text_config")):
        if isinstance(owner, dict):
            for key in ("quantization_config", "compression_config"):
                owner.pop(key, None)
    if section is not None:
        config["quantization"] = section
    for pattern in _COPIED:
        for file in checkpoint.folder.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, staging.folder / file.name)
    staging.write_text(INDEX, json.dumps({"metadata": {}, "weight_map": dict(sorted(weight_map.items()))}))
    staging.write_text("config.json", json.dumps(config, indent=2))
    staging.write_text(MANIFEST, manifest.dump())
