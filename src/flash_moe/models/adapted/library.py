"""mlx-lm, which is optional: imported when a model needs it, or one error that says what to install."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ...errors import ConfigError

OLDEST = (0, 32)  # the first with what is used here: infer_quant_config, global scales, caches with a state
_INSTALL = 'pip install "flash-moe[mlx-lm]"'


def module(name: str) -> Any:
    """Returns a module of mlx-lm, such as ``"models.cache"``.

    Raises:
        ConfigError: mlx-lm is missing or too old.
    """
    try:
        found = importlib.import_module(f"mlx_lm.{name}")
        release = version("mlx-lm")
    except ImportError as error:  # PackageNotFoundError is one
        raise ConfigError(f"this needs mlx-lm, which cannot be imported ({error}): {_INSTALL}") from error
    numbers = [int(part) for part in release.split(".")[:2] if part.isdigit()]
    if tuple(numbers) < OLDEST:
        raise ConfigError(f"mlx-lm {release} is too old, expected {OLDEST[0]}.{OLDEST[1]} or newer: {_INSTALL} -U")
    return found


def knows(model_type: str) -> bool:
    """Whether mlx-lm has a network for a ``model_type`` of config.json. ConfigError as for :func:`module`."""
    utils = module("utils")
    name = utils.MODEL_REMAPPING.get(model_type, model_type)
    return name.replace("-", "_").isidentifier() and importlib.util.find_spec(f"mlx_lm.models.{name}") is not None


def load_lazily(folder: Path, changed: Mapping[str, Any] | None = None) -> Any:
    """Returns mlx-lm's network of a checkpoint; no weight has been read.

    Args:
        changed: entries of config.json that are to be others.

    Raises:
        ConfigError, CheckpointError: mlx-lm cannot build or load it.
    """
    model, _ = module("utils").load_model(folder, lazy=True, model_config=None if changed is None else dict(changed))
    return model
