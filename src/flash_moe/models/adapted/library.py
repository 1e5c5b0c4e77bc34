"""mlx-lm, which is optional: imported when a model needs it, or one error that says what to install."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx

from ...checkpoint.foreign import foreign_section
from ...checkpoint.packed import MANIFEST, Manifest
from ...dtypes import DTYPES
from ...errors import CheckpointError, ConfigError
from ..config_json import read_config

OLDEST = (0, 32, 2)  # the first with what is used here: infer_quant_config, global scales, caches with a state
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
    numbers = tuple(int(part) for part in release.split(".")[:3] if part.isdigit())
    if numbers < OLDEST:
        raise ConfigError(f"mlx-lm {release} is too old, expected {'.'.join(map(str, OLDEST))} or newer: {_INSTALL} -U")
    return found


def knows(model_type: str) -> bool:
    """Returns whether mlx-lm has a network for a ``model_type`` of config.json. ConfigError as for :func:`module`."""
    utils = module("utils")
    name = utils.MODEL_REMAPPING.get(model_type, model_type)
    if not name.replace("-", "_").isidentifier() or importlib.util.find_spec(f"mlx_lm.models.{name}") is None:
        return False
    return hasattr(module(f"models.{name}"), "Model")  # others are parts of networks


def load_lazily(folder: Path, changed: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Returns mlx-lm's network of a checkpoint, and config.json as mlx-lm understands it.

    No weight has been read; the experts of a packed checkpoint are no weights at all.

    Args:
        changed: entries of config.json that are to be others.

    Raises:
        ConfigError, CheckpointError: mlx-lm cannot build or load it.
    """
    utils, manifest = module("utils"), Manifest.load(folder)
    classes = utils._get_classes if manifest is None else partial(_with_made_up_experts, manifest)
    found: tuple[Any, dict[str, Any]] = utils.load_model(
        folder, lazy=True, model_config=dict(changed), get_model_classes=classes
    )
    return found


def load_checked(folder: Path, changed: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """As :func:`load_lazily`, with a CheckpointError for what a network of mlx-lm raises about weights that do not fit it."""
    try:
        return load_lazily(folder, changed)
    except (ConfigError, CheckpointError, MemoryError):
        raise
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        if (section := foreign_section(read_config(folder))) is not None:
            reason = (
                f"it is quantised by {section['quant_method']!r}, which flash_moe converts for its own networks only; use a "
                f"checkpoint that mlx_lm.convert has written ({reason:.200})"
            )
        raise CheckpointError(f"mlx-lm cannot load {folder}: {reason:.500}") from error


def _with_made_up_experts(manifest: Manifest, config: dict[str, Any]) -> tuple[type, type]:
    """Returns the classes of a network that finds experts in its checkpoint where a manifest names their records."""
    model_class, args_class = module("utils")._get_classes(config)

    def sanitize(self: Any, weights: dict[str, mx.array]) -> Any:
        for layer, (path, switch) in enumerate(modules_of(self, manifest)):
            experts = next(m.num_experts for m in switch.children().values() if hasattr(m, "num_experts"))
            for part in manifest.layers[layer].layout.parts:
                shape = () if part.name == "global_scale" else part.shape
                weights[f"{path}.{part.key}"] = mx.zeros((experts, *shape), DTYPES[part.dtype])
        return model_class.sanitize(self, weights) if hasattr(model_class, "sanitize") else weights

    return type(model_class.__name__, (model_class,), {"sanitize": sanitize}), args_class


def expert_modules(model: Any) -> list[tuple[str, Any]]:
    """Returns path and module of every SwitchGLU and SwitchMLP of a network, in the order of the layers."""
    layers = module("models.switch_layers")
    found = [(path, m) for path, m in model.named_modules() if isinstance(m, (layers.SwitchGLU, layers.SwitchMLP))]
    return sorted(found, key=lambda item: [int(p) if p.isdigit() else -1 for p in item[0].split(".")])


def modules_of(model: Any, manifest: Manifest) -> list[tuple[str, Any]]:
    """As :func:`expert_modules`; CheckpointError unless a packed checkpoint's manifest has as many layers."""
    found = expert_modules(model)
    if sorted(manifest.layers) != list(range(len(found))):
        raise CheckpointError(
            f"{MANIFEST} tells of the experts of {len(manifest.layers)} layers, the model has {len(found)}; convert it again"
        )
    return found
