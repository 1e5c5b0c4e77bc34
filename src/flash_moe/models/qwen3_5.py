"""Qwen3.5-MoE and its successors of the same architecture (Qwen3.6, Qwen3.8): the conventions of their checkpoints.

Hugging Face stores RMSNorm weights as w - 1, except that of the gated norm, and convolutions as [C, 1, taps]; mlx-lm
stores w and [C, taps, 1]. The network takes w and [taps, C].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx

from ..checkpoint.names import module_path
from ..checkpoint.safetensors import TensorInfo
from ..config import ModelConfig
from ..errors import CheckpointError
from ..formats import Quantization
from .family import Family, ModelFiles, ResidentWeights

_FLOAT32 = ("A_log", "dt_bias", ".global_scale")
_ZERO_CENTRED = ("input_layernorm.weight", "post_attention_layernorm.weight", "q_norm.weight", "k_norm.weight")


class Qwen35(Family):
    """``qwen3_5_moe``."""

    model_types: tuple[str, ...] = ("qwen3_5_moe", "qwen3_5_moe_text")

    def config(self, raw: Mapping[str, Any]) -> ModelConfig:
        return ModelConfig.from_dict(raw)

    def in_one_convention(
        self, files: ModelFiles, stored: Mapping[str, mx.array], dtype: mx.Dtype, keep_matrices: bool = False
    ) -> ResidentWeights:
        hugging_face = not files.follows_mlx
        arrays: dict[str, mx.array] = {}
        quantization: dict[str, Quantization] = {}
        for name, array in stored.items():
            keeps = keep_matrices and _is_of_matrix(name, array)
            is_float = array.dtype not in (mx.uint32, mx.uint8)
            if is_float and not keeps:
                array = array.astype(mx.float32 if name.endswith(_FLOAT32) or hugging_face else dtype)
            if hugging_face and _is_zero_centred(name):
                array = array + 1.0
            if name.endswith("conv1d.weight"):
                array = _taps_first(array, files.resident[name], hugging_face)
            as_stored = not is_float or keeps or name.endswith(_FLOAT32)
            arrays[name] = array if as_stored else array.astype(dtype)
            if name.endswith(".scales"):
                module = module_path(name)
                if (weight := files.resident.get(f"{module}.weight")) is None:
                    raise CheckpointError(f"the checkpoint has {name} but no {module}.weight; download it again")
                found = quantization[module] = files.quantization.of([module], weight, files.resident[name])
                if not found.is_affine and f"{module}.biases" in files.resident:
                    raise CheckpointError(f"{name} is U8, as in mode {found.mode}, but there is {module}.biases, too")
        return ResidentWeights(arrays, quantization)

    def mlx_name(self, canonical: str) -> str:
        return "language_model." + (canonical if canonical.startswith("lm_head.") else "model." + canonical)

    def mlx_array(self, files: ModelFiles, name: str, array: mx.array) -> mx.array:
        if files.follows_mlx:
            return array
        if _is_zero_centred(name):
            return (array.astype(mx.float32) + 1.0).astype(array.dtype)
        return array.moveaxis(2, 1) if name.endswith("conv1d.weight") else array


def _is_of_matrix(canonical: str, array: mx.array) -> bool:
    """Whether an array is of a linear layer's or an embedding's matrix; convolutions have three dimensions."""
    return array.ndim == 2 and canonical.endswith((".weight", ".scales", ".biases"))


def _is_zero_centred(canonical: str) -> bool:
    return canonical.endswith(_ZERO_CENTRED) or canonical == "norm.weight"


def _taps_first(array: mx.array, info: TensorInfo, hugging_face: bool) -> mx.array:
    """A stored convolution, [C, 1, taps] in Hugging Face's convention and [C, taps, 1] in MLX's, as [taps, C]."""
    axis = 1 if hugging_face else 2
    if array.ndim != 3 or array.shape[axis] != 1:
        expected = "[C, 1, taps]" if hugging_face else "[C, taps, 1]"
        raise CheckpointError(
            f"{info.file}: {info.name!r} has shape {list(info.shape)}, expected {expected} with the taps of config.json; "
            "config.json and weights do not belong together"
        )
    return array.squeeze(axis).T
