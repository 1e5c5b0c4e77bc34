"""The always-read weights as MLX arrays under canonical names, brought to one convention.

Conventions after loading: RMSNorm weights multiply as they are (Hugging Face stores w - 1); convolutions are
[taps, C]; Gated DeltaNet has separate in_proj_qkv, in_proj_z, in_proj_b and in_proj_a (Qwen3-Next interleaves them by
key head). Arrays are lazy: the file is read when they are first evaluated.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from ..config import ModelConfig
from ..errors import CheckpointError
from ..record import FLOATS, Quantization
from .files import Checkpoint
from .names import is_zero_centred_norm, module_path
from .safetensors import TensorInfo

_FLOAT32 = ("A_log", "dt_bias")
_DTYPES = {"BF16": mx.bfloat16, "F16": mx.float16, "F32": mx.float32, "U32": mx.uint32}


@dataclass(frozen=True)
class ResidentWeights:
    """Arrays by canonical name, and how each quantised module is quantised."""

    arrays: Mapping[str, mx.array]
    quantization: Mapping[str, Quantization]


def load_resident(checkpoint: Checkpoint, dtype: mx.Dtype) -> ResidentWeights:
    """All weights but the routed experts; floating point ones are cast to ``dtype``.

    Raises:
        CheckpointError: a tensor has a dtype that no weight has, or lacks its quantisation.
    """
    return in_one_convention(checkpoint, read_arrays(checkpoint), dtype)


def in_one_convention(checkpoint: Checkpoint, stored: Mapping[str, mx.array], dtype: mx.Dtype) -> ResidentWeights:
    """Arrays as ``checkpoint`` stores them, all or those of some layers, in the convention of this library.

    Raises:
        CheckpointError: a tensor lacks its quantisation, or has an impossible shape.
    """
    zero_centred = checkpoint.zero_centred_norms
    arrays: dict[str, mx.array] = {}
    quantization: dict[str, Quantization] = {}
    for name, array in stored.items():
        if array.dtype != mx.uint32:
            array = array.astype(mx.float32 if name.endswith(_FLOAT32) or zero_centred else dtype)
        if zero_centred and is_zero_centred_norm(name):
            array = array + 1.0
        if name.endswith("conv1d.weight"):
            array = _taps_first(array, checkpoint.resident[name], zero_centred)
        arrays[name] = array if array.dtype == mx.uint32 or name.endswith(_FLOAT32) else array.astype(dtype)
        if name.endswith(".scales"):
            module = module_path(name)
            if (weight := checkpoint.resident.get(f"{module}.weight")) is None:
                raise CheckpointError(f"the checkpoint has {name} but no {module}.weight; download it again")
            quantization[module] = checkpoint.quantization.of([module], weight, checkpoint.resident[name])
    if checkpoint.config.model_type == "qwen3_next":
        _split_interleaved(arrays, quantization, checkpoint.config)
    return ResidentWeights(arrays, quantization)


def read_arrays(checkpoint: Checkpoint) -> dict[str, mx.array]:
    """The resident tensors exactly as stored, lazily, by canonical name.

    Raises:
        CheckpointError: a tensor has a dtype that no weight has.
    """
    for info in checkpoint.resident.values():
        if info.dtype not in (*FLOATS, "U32"):
            raise CheckpointError(
                f"{info.file}: {info.name!r} is {info.dtype}, expected {', '.join(FLOATS)} or packed U32; "
                "use the bf16 checkpoint or one written by mlx_lm.convert"
            )
    arrays: dict[str, mx.array] = {}
    for file in sorted({info.file for info in checkpoint.resident.values()}):
        try:
            stored: Any = mx.load(str(file))
        except RuntimeError:  # a tensor that nobody needs has a dtype that MLX does not know
            stored = {}
        for name, info in checkpoint.resident.items():
            if info.file == file:
                arrays[name] = stored[info.name] if info.name in stored else _read(info)
    return arrays


def _read(info: TensorInfo) -> mx.array:
    """A tensor out of its file, at once."""
    try:
        words = np.fromfile(info.file, np.uint8, info.nbytes, offset=info.offset)
    except OSError as error:
        raise CheckpointError(f"{info.file} cannot be read: {error}") from error
    if words.nbytes != info.nbytes:
        raise CheckpointError(f"{info.file} ends within {info.name!r}; the file is truncated: download it again")
    return mx.array(words).view(_DTYPES[info.dtype]).reshape(info.shape)


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


def _split_interleaved(arrays: dict[str, mx.array], quantization: dict[str, Quantization], config: ModelConfig) -> None:
    """Replaces Qwen3-Next's in_proj_qkvz and in_proj_ba by the four projections of Qwen3.5 (rows are only permuted)."""
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
        if array.shape[0] != rows:
            raise CheckpointError(f"{name} has {array.shape[0]} rows, but config.json asks for {rows}")
        owner = module.rsplit(".", 1)[0]
        for projection, index in split.items():
            arrays[f"{owner}.{projection}{part}"] = array[mx.array(index)]
            if module in quantization:
                quantization[f"{owner}.{projection}"] = quantization[module]


def _row_blocks(heads: int, widths: tuple[int, ...]) -> list[np.ndarray]:
    """Row indices of each block when every head stores ``widths`` rows one block after the other."""
    rows = np.arange(heads * sum(widths)).reshape(heads, -1)
    ends = np.cumsum(widths)
    return [rows[:, end - width : end].reshape(-1) for end, width in zip(ends, widths, strict=True)]
