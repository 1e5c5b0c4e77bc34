"""The families of models that have a network of their own; what is special to one lies in its file.

Adding a family takes a file and a line of :data:`FAMILIES`.
"""

from __future__ import annotations

from pathlib import Path

from ..config import read_config
from ..errors import ConfigError
from .family import Family, ModelFiles
from .qwen3_5 import Qwen35
from .qwen3_next import Qwen3Next

FAMILIES: tuple[Family, ...] = (
    Qwen35(),
    Qwen3Next(),
)

__all__ = ["FAMILIES", "Family", "ModelFiles", "open_model"]


def open_model(folder: Path, *, adopt: bool = False) -> ModelFiles:
    """Opens a checkpoint folder by the rules of its family; reads config.json and headers only.

    Args:
        adopt: take weights that other libraries have quantised, to convert them.

    Raises:
        ConfigError: config.json is missing, or describes a model that cannot be run.
        CheckpointError: a shard is missing, truncated or malformed, or the index disagrees with the shards.
    """
    raw = read_config(folder)
    known = {model_type: family for family in FAMILIES for model_type in family.model_types}
    if not isinstance(model_type := raw.get("model_type"), str) or model_type not in known:
        raise ConfigError(f"model_type is {model_type!r}; flash_moe runs {', '.join(known)}")
    return ModelFiles.open_as(known[model_type], folder, raw, adopt=adopt)
