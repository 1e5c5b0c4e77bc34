"""Qwen3-Next: like Qwen3.5, but the projections of Gated DeltaNet are interleaved by key head."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np

from ..checkpoint.names import module_path
from ..config import ModelConfig
from ..errors import CheckpointError
from ..formats import Quantization
from .config_json import Reader
from .family import ModelFiles, ResidentWeights
from .qwen3_5 import Qwen35, text_config


class Qwen3Next(Qwen35):
    """``qwen3_next``."""

    model_types = ("qwen3_next",)

    def config(self, raw: Mapping[str, Any]) -> ModelConfig:
        return replace(super().config(raw), norm_topk_prob=Reader(text_config(raw)).flag("norm_topk_prob", True))

    def in_one_convention(
        self, files: ModelFiles, stored: Mapping[str, mx.array], dtype: mx.Dtype, keep_matrices: bool = False
    ) -> ResidentWeights:
        found = super().in_one_convention(files, stored, dtype, keep_matrices)
        arrays, quantization = dict(found.arrays), dict(found.quantization)
        _split_interleaved(arrays, quantization, files.config)
        return ResidentWeights(arrays, quantization)

    def mlx_name(self, canonical: str) -> str:
        return canonical if canonical.startswith("lm_head.") else "model." + canonical


def _split_interleaved(arrays: dict[str, mx.array], quantization: dict[str, Quantization], config: ModelConfig) -> None:
    """Replaces in_proj_qkvz and in_proj_ba by the four projections of Qwen3.5, which only permutes rows."""
    heads, ratio = config.linear_num_key_heads, config.linear_num_value_heads // config.linear_num_key_heads
    dk, dv = config.linear_key_head_dim, config.linear_value_head_dim * ratio
    for name in [n for n in arrays if ".in_proj_qkvz" in n or ".in_proj_ba" in n]:
        array = arrays.pop(name)
        module, part = module_path(name), name[len(module_path(name)) :]
        if module.endswith("qkvz"):
            q, k, v, z = _row_blocks(heads, (dk, dk, dv, dv))
            split = {"in_proj_qkv": np.concatenate([q, k, v]), "in_proj_z": z}
        else:
            b, a = _row_blocks(heads, (ratio, ratio))
            split = {"in_proj_b": b, "in_proj_a": a}
        rows = sum(len(block) for block in split.values())
        whole = name.endswith(".global_scale")  # of all rows
        if not whole and array.shape[0] != rows:
            raise CheckpointError(f"{name} has {array.shape[0]} rows, but config.json asks for {rows}")
        owner = module.rsplit(".", 1)[0]
        for projection, index in split.items():
            arrays[f"{owner}.{projection}{part}"] = array if whole else array[mx.array(index)]
            if module in quantization:
                quantization[f"{owner}.{projection}"] = quantization[module]


def _row_blocks(heads: int, widths: tuple[int, ...]) -> list[np.ndarray]:
    """Returns the row indices of each block, if every head stores its blocks of ``widths`` rows one after the other."""
    rows = np.arange(heads * sum(widths)).reshape(heads, -1)
    ends = np.cumsum(widths)
    return [rows[:, end - width : end].reshape(-1) for end, width in zip(ends, widths, strict=True)]
