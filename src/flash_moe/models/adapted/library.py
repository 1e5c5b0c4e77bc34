"""Imports mlx-lm, which is optional, when a model needs it; an error says what to install."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ...checkpoint.foreign import foreign_section
from ...checkpoint.names import module_path
from ...checkpoint.packed import MANIFEST, Manifest
from ...dtypes import DTYPES
from ...errors import CheckpointError, ConfigError
from ...formats import GLOBAL_SCALE
from ..config_json import read_config

OLDEST = (0, 32, 2)  # the first version with infer_quant_config, global scales and caches with a state
_INSTALL = 'pip install "flash-moe[mlx-lm]"'


def module(name: str) -> Any:
    """Returns a module of mlx-lm, such as ``"models.cache"``.

    Raises:
        ConfigError: mlx-lm is missing or too old.
    """
    try:
        found = importlib.import_module(f"mlx_lm.{name}")
        release = version("mlx-lm")
    except ImportError as error:  # includes PackageNotFoundError
        raise ConfigError(f"this needs mlx-lm, which cannot be imported ({error}): {_INSTALL}") from error
    numbers = tuple(int(part) for part in release.split(".")[:3] if part.isdigit())
    if numbers < OLDEST:
        raise ConfigError(f"mlx-lm {release} is too old, expected {'.'.join(map(str, OLDEST))} or newer: {_INSTALL} -U")
    return found


def knows(model_type: str) -> bool:
    """Returns whether mlx-lm has a network for a ``model_type``. Raises ConfigError as :func:`module` does."""
    utils = module("utils")
    name = utils.MODEL_REMAPPING.get(model_type, model_type)
    if not name.replace("-", "_").isidentifier() or importlib.util.find_spec(f"mlx_lm.models.{name}") is None:
        return False
    return hasattr(module(f"models.{name}"), "Model")  # other modules are parts of networks


def load_lazily(folder: Path, changed: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Returns mlx-lm's network of a checkpoint, and config.json as mlx-lm interprets it.

    No weight is read. The experts of a packed checkpoint are not weights of this network.

    Args:
        changed: entries of config.json to replace.

    Raises:
        ConfigError, CheckpointError: mlx-lm cannot build or load the network.
    """
    utils, manifest = module("utils"), Manifest.load(folder)
    classes = _with_all_parts if manifest is None else partial(_with_made_up_experts, manifest)
    found: tuple[Any, dict[str, Any]] = utils.load_model(
        folder, lazy=True, model_config=dict(changed), get_model_classes=classes
    )
    return found


def load_checked(folder: Path, changed: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Calls :func:`load_lazily`, and converts errors of mlx-lm's networks about weights to CheckpointError."""
    try:
        return load_lazily(folder, changed)
    except (ConfigError, CheckpointError, MemoryError):
        raise
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        if (section := foreign_section(read_config(folder))) is not None:
            reason = f"it is quantised by {section['quant_method']!r}; run `flash-moe convert` first ({reason:.200})"
        raise CheckpointError(f"mlx-lm cannot load {folder}: {reason:.500}") from error


def _with_all_parts(config: dict[str, Any]) -> tuple[type, type]:
    """Returns the classes of a network that also arranges scales that its ``sanitize`` ignores, in the same way as
    weights.
    """
    model_class, args_class = module("utils")._get_classes(config)
    if not config.get("quantization") or not hasattr(model_class, "sanitize"):
        return model_class, args_class

    def sanitize(self: Any, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        arranged, found = model_class.sanitize, dict(weights)
        found = arranged(self, found)
        for part in ("scales", "biases", "global_scale"):
            modules = {name.removesuffix(f".{part}") for name in found if name.endswith(f".{part}") and name in weights}
            left = {m: f"{m}.{part}" for m in modules if f"{m}.weight" in weights and f"{m}.weight" not in found}
            if not left:
                continue
            others = {name: array for name, array in weights.items() if name not in left.values()}
            moved = arranged(self, others | {f"{m}.weight": weights[name] for m, name in left.items()})
            found = {name: array for name, array in found.items() if name not in left.values()}
            for name, array in moved.items():
                if (old := found.get(name)) is not None and (old.shape, old.dtype) != (array.shape, array.dtype):
                    found[f"{module_path(name)}.{part}"] = array
        _multiply_in(self, found)
        return found

    return type(model_class.__name__, (model_class,), {"sanitize": sanitize}), args_class


def _multiply_in(model: Any, weights: dict[str, mx.array]) -> None:
    """Converts NVFP4 matrices with a global scale to floats if mlx-lm's module does not support that scale.

    MLX cannot trace the conversion from e4m3, so the scales come from a table. The codes are unpacked as mxfp4.
    """
    e4m3 = mx.array(np.array(mx.from_fp8(mx.arange(256, dtype=mx.uint8), dtype=mx.float32)))
    takes = module("utils")._takes_global_scale
    modules = dict(model.named_modules())
    for path in [name.removesuffix(".global_scale") for name in weights if name.endswith(".global_scale")]:
        if path not in modules or not hasattr(modules[path], "to_quantized") or takes(modules[path]):
            continue
        factor = weights.pop(f"{path}.global_scale") / GLOBAL_SCALE
        words, scales = weights.pop(f"{path}.weight"), weights.pop(f"{path}.scales")
        ones = mx.full((*words.shape[:-1], words.shape[-1] // 4), 127, mx.uint8)  # 2 to the power of 0
        numbers = mx.dequantize(words, ones, mode="mxfp4", dtype=mx.float32).reshape(*scales.shape, 16)
        floats = numbers * e4m3[scales][..., None] * factor
        weights[f"{path}.weight"] = floats.reshape(*scales.shape[:-1], -1).astype(mx.bfloat16)


def _with_made_up_experts(manifest: Manifest, config: dict[str, Any]) -> tuple[type, type]:
    """Returns the classes of a network with placeholders for the experts whose records are in a manifest."""
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
    """Returns the path and the module of every SwitchGLU and SwitchMLP of a network, in the order of the layers."""
    layers = module("models.switch_layers")
    found = [(path, m) for path, m in model.named_modules() if isinstance(m, (layers.SwitchGLU, layers.SwitchMLP))]
    return sorted(found, key=lambda item: [int(p) if p.isdigit() else -1 for p in item[0].split(".")])


def modules_of(model: Any, manifest: Manifest) -> list[tuple[str, Any]]:
    """Returns :func:`expert_modules`. Raises CheckpointError if the manifest has a different number of layers."""
    found = expert_modules(model)
    if sorted(manifest.layers) != list(range(len(found))):
        raise CheckpointError(
            f"{MANIFEST} tells of the experts of {len(manifest.layers)} layers, the model has {len(found)}; convert it again"
        )
    return found
