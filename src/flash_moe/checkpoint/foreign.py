"""Maps weights that other libraries have quantised to MLX's names and types for the same bytes.

With q and s for the weight and the scale in a file, w is

    Qwen, DeepSeek       q · s with q in e4m3, and one s (``weight_scale_inv``) per block of 128 × 128
    compressed-tensors   q · s with q in e4m3, and one s per row, block or matrix; or q · s / g in NVFP4 (``weight_packed``)
    ModelOpt             q · s with q in e4m3; or q · s · g in NVFP4, with g in ``weight_scale_2``
    all but Qwen         q · s with q in e2m1 or e4m3, and one s in e8m0 per 32 numbers: MXFP4, MXFP8

Integers of GPTQ, AWQ and compressed-tensors are in :mod:`.integers`.

NVFP4 is e2m1 in groups of 16 with scales in e4m3. All three formats are packed as in MLX; only the global scale g
differs. Sources: transformers ``FP8Linear``; https://github.com/vllm-project/compressed-tensors; NVIDIA's
TensorRT-Model-Optimizer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..errors import CheckpointError
from ..formats import FLOATS, FP8_BLOCK, GLOBAL_SCALE, MODES
from . import integers
from .names import module_path
from .safetensors import TensorInfo

METHODS = ("fp8", "compressed-tensors", "modelopt", "quark", *integers.METHODS)  # in quantization_config
_PARTS = {  # endings of names, the longer ones first
    "weight_global_scale": "global_scale",
    "weight_scale_inv": "scales",
    "weight_scale_2": "global_scale",
    "weight_packed": "weight",
    "weight_scale": "scales",
    "scale_inv": "scales",
    "qweight": "weight",
    "qzeros": "biases",
}
_OF_ACTIVATIONS = (".input_scale", ".input_global_scale", ".k_scale", ".v_scale", ".q_scale")
_UNUSED = (*_OF_ACTIVATIONS, ".weight_shape", ".g_idx", ".weight_g_idx")


def foreign_section(raw: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Returns the quantisation section of config.json, if it is from a library whose weights can be converted."""
    text = raw.get("text_config")
    for owner in (raw, text if isinstance(text, Mapping) else {}):
        section = owner.get("quantization_config") or owner.get("compression_config")
        if isinstance(section, Mapping) and section.get("quant_method") in METHODS:
            return section
    return None


def adopted(tensors: Mapping[str, TensorInfo], section: Mapping[str, Any]) -> dict[str, TensorInfo]:
    """Returns the tensors of a checkpoint by canonical name, with MLX's names and types for foreign ones.

    Args:
        section: the quantisation section of config.json; empty if there is none.

    Raises:
        CheckpointError: weights are quantised in an unsupported form, or have scales of another shape.
    """
    if section.get("transform_config"):
        raise CheckpointError(
            "config.json: quantization_config has a transform_config (weights are rotated), expected none; convert the bf16 "
            "checkpoint instead"
        )
    if (scaled := next((t for name, t in tensors.items() if name.endswith(".pre_quant_scale")), None)) is not None:
        raise CheckpointError(
            f"{scaled.file} holds {scaled.name!r}, a factor of the inputs (ModelOpt's AWQ), expected none; convert the bf16 "
            "checkpoint instead"
        )
    form = integers.IntegerForm.of(section)
    blocks = _in_blocks(section)
    found = {_adopted_name(name): info for name, info in tensors.items() if not name.endswith(_UNUSED)}
    for name, info in list(found.items()):
        module = module_path(name)
        if name.endswith((".scales", ".global_scale")) and not info.shape:
            found[name] = replace(info, shape=(1,))
        if not name.endswith(".scales"):
            continue
        key = f"{module}.weight" if f"{module}.weight" in found else module
        if (weight := found.get(key)) is None:
            raise CheckpointError(f"{info.file} holds {info.name!r} but no weight for it; finish the download")
        if (mode := _mode(weight, info)) is not None:
            if mode == "nvfp4" and f"{module}.global_scale" not in found:
                raise CheckpointError(
                    f"{info.file}: NVFP4 weights {weight.name!r} lack their global scale (weight_scale_2 or "
                    "weight_global_scale); the checkpoint is incomplete: finish the download"
                )
            if mode == "nvfp4":
                _check_global_scale(weight, found[f"{module}.global_scale"])
            found[key] = replace(weight, dtype="U32", shape=(*weight.shape[:-1], weight.shape[-1] // 4))
            found[name] = replace(info, dtype="U8")
        elif weight.dtype == "F8_E4M3" and info.dtype in FLOATS:
            _check_fp8(weight, found[name], blocks)
        elif weight.dtype == "I32" and form is not None:
            names = key, name, f"{module}.biases"
            found.update(zip(names, form.parts(weight, info, found.get(names[2])), strict=True))
        elif weight.name.endswith(("weight_packed", "qweight")) or weight.dtype not in (*FLOATS, "U32"):
            raise CheckpointError(
                f"{weight.file}: {weight.name!r} is {weight.dtype} with scales of {info.dtype}, expected e4m3 with scales "
                "of floats (FP8) or e8m0 (MXFP8), or packed e2m1 with scales of e4m3 (NVFP4) or e8m0 (MXFP4); convert the "
                "bf16 checkpoint instead"
            )
    return found


def _in_blocks(section: Mapping[str, Any]) -> bool:
    """Returns whether config.json says that all FP8 weights have a scale for each block of 128 × 128.

    Raises:
        CheckpointError: it says that there are other blocks.
    """
    stated = [section.get("weight_block_size"), *(w.get("block_structure") for w in integers.group_weights(section))]
    for sizes in stated:
        if sizes not in (None, [FP8_BLOCK, FP8_BLOCK]):
            raise CheckpointError(
                f"config.json: quantization_config states blocks of {sizes} weights, expected [128, 128]; convert the bf16 "
                "checkpoint instead"
            )
    return stated[0] is not None


def _check_fp8(weight: TensorInfo, scales: TensorInfo, blocks: bool) -> None:
    *experts, rows, columns = weight.shape if len(weight.shape) > 1 else (0, 0)
    allowed: list[tuple[int, ...]] = [(-(-rows // FP8_BLOCK), -(-columns // FP8_BLOCK))]
    if not blocks:
        allowed += [(rows, 1), (1, 1), (1,)]
    if len(weight.shape) < 2 or scales.shape not in [(*experts, *shape) for shape in allowed]:
        raise CheckpointError(
            f"{scales.file}: {scales.name!r} has scales of shape {list(scales.shape)} for weights of {list(weight.shape)}, "
            f"expected one for each block of 128 × 128{'' if blocks else ', row or matrix'}: "
            f"{[*experts, *allowed[0]]}; download the checkpoint again, or convert the bf16 one"
        )


def _check_global_scale(weight: TensorInfo, scale: TensorInfo) -> None:
    if scale.dtype != "F32" or scale.shape not in (weight.shape[:-2], weight.shape[:-2] or (1,)):
        raise CheckpointError(
            f"{scale.file}: {scale.name!r} is {scale.dtype} {list(scale.shape)} for weights of {list(weight.shape)}, expected "
            "one F32 for each matrix; download the checkpoint again"
        )


def _mode(weight: TensorInfo, scales: TensorInfo) -> str | None:
    """Returns the mode of MLX with the same meaning of the bytes; None if there is none."""
    if not scales.shape or weight.shape[:-1] != scales.shape[:-1] or weight.shape[-1] % 4:
        return None
    if scales.dtype not in ("U8", "F8_E4M3", "F8_E8M0"):
        return None
    codes = {"U8": 4, "F8_E4M3": 8}.get(weight.dtype, 0)
    nbytes = {mode: bits * size // 8 for mode, (bits, size) in MODES.items() if bits == codes}  # numbers of a group
    e4m3 = scales.dtype == "F8_E4M3"
    found = (m for m, size in nbytes.items() if weight.shape[-1] == size * scales.shape[-1] and (m == "nvfp4") == e4m3)
    return next(found, None)


def mlx_global_scale(name: str, value: Any) -> Any:
    """Converts a stored global scale (NumPy or MLX tensor) to the one that MLX uses."""
    if name.endswith("weight_global_scale"):
        return GLOBAL_SCALE / value
    return value * GLOBAL_SCALE if name.endswith("weight_scale_2") else value


def _adopted_name(canonical: str) -> str:
    for ending, part in _PARTS.items():
        if canonical.endswith((f".{ending}", f"_{ending}")):
            return f"{canonical[: -len(ending) - 1]}.{part}"
    return canonical
