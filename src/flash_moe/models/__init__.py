"""The families of models that run on this library's own network. Each family has its own file.

To add a family, add a file and a line in :data:`FAMILIES`.
"""

from __future__ import annotations

from pathlib import Path

from ..errors import ConfigError
from .adapted.adapted_files import AdaptedFiles
from .adapted.library import knows
from .config_json import read_config
from .family import Family, ModelFiles
from .qwen3_5 import Qwen35
from .qwen3_next import Qwen3Next

FAMILIES: tuple[Family, ...] = (
    Qwen35(),
    Qwen3Next(),
)

__all__ = [
    "FAMILIES", "AdaptedFiles", "Family", "ModelFiles", "family_of", "is_adapted", "open_checkpoint", "open_model",
]  # fmt: skip
_OWN = {model_type: family for family in FAMILIES for model_type in family.model_types}


def is_adapted(folder: Path) -> bool:
    """Returns whether the model of a checkpoint runs on mlx-lm's network, because this library has no network for it.

    Raises:
        ConfigError: mlx-lm has no network for it either, or is missing or too old.
    """
    model_type = _model_type(folder)
    if model_type in _OWN:
        return False
    if not knows(model_type):
        raise ConfigError(
            f"model_type is {model_type!r}, which neither flash_moe ({', '.join(_OWN)}) nor the installed mlx-lm knows; "
            "a newer mlx-lm may"
        )
    return True


def _model_type(folder: Path) -> str:
    model_type = read_config(folder).get("model_type")
    if not isinstance(model_type, str):
        raise ConfigError(f"config.json: model_type is {model_type!r}, expected a name; download the file again")
    return model_type


def open_model(folder: Path, *, adopt: bool = False) -> ModelFiles:
    """Opens a checkpoint folder with the rules of its family. It reads only config.json and headers.

    Args:
        adopt: whether to accept weights that other libraries have quantised, for conversion.

    Raises:
        ConfigError: config.json is missing, or describes a model that cannot be run.
        CheckpointError: a shard is missing, truncated or malformed, or the index disagrees with the shards.
    """
    return ModelFiles.open_as(family_of(_model_type(folder)), folder, read_config(folder), adopt=adopt)


def open_checkpoint(folder: Path) -> ModelFiles | AdaptedFiles:
    """Opens a checkpoint of any family. The errors are those of :func:`open_model`."""
    return AdaptedFiles.open(folder) if is_adapted(folder) else open_model(folder)


def family_of(model_type: str) -> Family:
    """Returns the family of a ``model_type``. Raises ConfigError if this library has no network for it."""
    if model_type not in _OWN:
        raise ConfigError(
            f"model_type is {model_type!r}, but this is for networks of flash_moe's own: {', '.join(_OWN)}; leave it out for "
            "families that run on mlx-lm's"
        )
    return _OWN[model_type]
