"""Tiny random checkpoints of the families that mlx-lm knows, written as mlx_lm.convert writes them.

``families.json`` has a config.json for each; most sizes are those of mlx-lm's own tests (MIT License, Apple Inc.).
"""

from __future__ import annotations

import copy
import json
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten
from published import PUBLISHED

from flash_moe.shipped import shipped

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from mlx_lm import utils

FAMILIES: Mapping[str, Mapping[str, Any]] = json.loads(Path(__file__).with_name("families.json").read_text())
USUAL = {"gpt_oss": "mxfp4", "kimi_k25": "affine", "deepseek_v3": "mxfp8", "qwen3_moe": "nvfp4"}  # else affine
OWN = ("qwen3_5_moe", "qwen3_next")  # which Model.load runs on networks of its own
GROUP_SIZE = {"affine": 32, "mxfp4": 32, "nvfp4": 16, "mxfp8": 32}
BITS = {"affine": 4, "mxfp4": 4, "nvfp4": 4, "mxfp8": 8}


def write(
    name: str,
    folder: Path,
    mode: str | None = "usual",
    seed: int = 0,
    published: bool = False,
    shards: int = 1,
    **changed: Any,
) -> Path:
    """Writes a checkpoint with random weights.

    Args:
        mode: of quantisation; None for float32.
        published: as the hub has it, under the names of Hugging Face, and not as mlx_lm.convert writes it.
        shards: over which tensors are scattered.
        changed: entries of config.json.
    """
    config = copy.deepcopy(dict(FAMILIES[name])) | changed
    model_class, args_class = utils._get_classes(config)
    mx.random.seed(seed)
    model = model_class(args_class.from_dict(copy.deepcopy(config)))
    model.update(tree_unflatten([(path, _random(array)) for path, array in tree_flatten(model.parameters())]))
    if mode is not None:
        mode = USUAL.get(name, "affine") if mode == "usual" else mode
        predicate = getattr(model, "quant_predicate", None)
        model, config = utils.quantize_model(
            model, config, GROUP_SIZE[mode], BITS[mode], mode=mode, quant_predicate=predicate
        )
    folder.mkdir(parents=True)
    if published or shards > 1:
        weights = dict(tree_flatten(model.parameters()))
        weights = PUBLISHED[name](weights) if published else weights
        names = sorted(weights)
        for i in range(shards):
            file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors" if shards > 1 else "model.safetensors"
            mx.save_safetensors(str(folder / file), {name: weights[name] for name in names[i::shards]})
    else:
        utils.save_model(folder, model)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _random(array: mx.array) -> mx.array:
    """Weights with some variance; norms and biases near what they are, so that none of them is neutral."""
    if not mx.issubdtype(array.dtype, mx.floating):
        return array
    if array.ndim < 2:
        return (array + 0.1 * mx.random.normal(array.shape)).astype(array.dtype)
    return mx.random.normal(array.shape, scale=array.shape[-1] ** -0.5).astype(array.dtype)


def checkpoint(name: str, folder: Path, **options: Any) -> Path:
    """As :func:`write`, with the tokenizer of the demo model."""
    write(name, folder, **options)
    for file in shipped("models/demo").glob("*token*"):
        shutil.copy(file, folder)
    return folder


def plain(folder: Path) -> Any:
    """The network as mlx-lm loads it."""
    return utils.load_model(folder, lazy=True)[0]
