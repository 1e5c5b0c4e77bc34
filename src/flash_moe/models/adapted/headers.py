"""Reads the headers of the files that mlx-lm loads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...checkpoint.safetensors import TensorInfo, read_header
from ...errors import CheckpointError
from ..config_json import read_config

INDEX = "model.safetensors.index.json"
_K_KEYS = (
    "num_experts_per_tok", "num_experts_per_token", "moe_num_experts_per_tok", "moe_topk", "moe_top_k", "moe_k",
    "top_k_experts", "num_selected_experts", "experts_per_token",
)  # fmt: skip


def tensors(folder: Path) -> dict[str, TensorInfo]:
    """Returns all tensors by name in the files that mlx-lm loads: ``model*.safetensors``.

    Raises:
        CheckpointError: a file is malformed, or the index does not match the files.
    """
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder} holds no model*.safetensors file; expected the weights of a model there")
    index = folder / INDEX
    if index.exists() and len(files) > 1:
        try:
            named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{index} cannot be read ({error!r}); download it again") from error
        if wrong := named.symmetric_difference(file.name for file in files):
            raise CheckpointError(
                f"{index} and the files beside it disagree about {', '.join(sorted(map(str, wrong)))}; "
                "finish the download or remove what is stale"
            )
    held: dict[str, TensorInfo] = {}
    for file in files:
        for name, info in read_header(file).tensors.items():
            if name in held:
                raise CheckpointError(f"tensor {name!r} is in {held[name].file} and in {file}; remove the stale file")
            held[name] = info
    return held


def text_config(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the section of config.json for the language model."""
    text = raw.get("text_config")
    return text if isinstance(text, Mapping) else raw


def k_key(raw: Mapping[str, Any]) -> str | None:
    """Returns the key of K in config.json; None if it is unknown."""
    text = text_config(raw)
    return next((key for key in _K_KEYS if type(text.get(key)) is int), None)


def experts_per_token(folder: Path) -> int | None:
    """Returns the model's own K; None if config.json does not state it."""
    raw = read_config(folder)
    key = k_key(raw)
    return None if key is None else text_config(raw)[key]
