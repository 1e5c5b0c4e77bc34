"""Checkpoints as Qwen, NVIDIA and compressed-tensors publish them, and the bf16 ones with the same weights."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
from random_checkpoint import text_config, write_checkpoint

TEXT = text_config(
    hidden_size=192, moe_intermediate_size=160, shared_expert_intermediate_size=96, num_experts=4, num_experts_per_tok=2,
    num_hidden_layers=2, full_attention_interval=2,
)  # fmt: skip
Tensors = dict[str, tuple[str, mx.array]]  # by name: safetensors type and values
Layout = Callable[[str, mx.array], tuple[Tensors, mx.array]]  # tensors of a matrix, and what they stand for
KEPT = ("lm_head", "embed_tokens", "mlp.gate.", "shared_expert_gate", "in_proj_a", "in_proj_b", "conv1d")


def qwen_fp8(name: str, w: mx.array) -> tuple[Tensors, mx.array]:
    """e4m3 with a scale for each block of 128 × 128."""
    rows, columns = w.shape
    padded = mx.pad(w.astype(mx.float32), [(0, -rows % 128), (0, -columns % 128)])
    blocks = padded.reshape(padded.shape[0] // 128, 128, -1, 128)
    scales = (mx.abs(blocks).max(axis=(1, 3)) / 448).astype(mx.bfloat16)
    each = mx.repeat(mx.repeat(scales.astype(mx.float32), 128, 0), 128, 1)[:rows, :columns]
    codes = mx.to_fp8(w.astype(mx.float32) / each)
    stored = {f"{name}.weight": ("F8_E4M3", codes), f"{name}.weight_scale_inv": ("BF16", scales)}
    return stored, (mx.from_fp8(codes, dtype=mx.float32) * each).astype(mx.bfloat16)


def channel_fp8(name: str, w: mx.array) -> tuple[Tensors, mx.array]:
    """compressed-tensors, float-quantized: a scale for each row."""
    scales = mx.abs(w.astype(mx.float32)).max(axis=1, keepdims=True) / 448
    codes = mx.to_fp8(w.astype(mx.float32) / scales)
    stored = {f"{name}.weight": ("F8_E4M3", codes), f"{name}.weight_scale": ("F32", scales)}
    return stored, (mx.from_fp8(codes, dtype=mx.float32) * scales).astype(mx.bfloat16)


def tensor_fp8(name: str, w: mx.array) -> tuple[Tensors, mx.array]:
    """ModelOpt FP8: one scale for a matrix, and one for what it is multiplied with."""
    scale = mx.abs(w.astype(mx.float32)).max() / 448
    codes = mx.to_fp8(w.astype(mx.float32) / scale)
    stored = {f"{name}.weight": ("F8_E4M3", codes), f"{name}.weight_scale": ("F32", scale),
              f"{name}.input_scale": ("F32", mx.array(0.5))}  # fmt: skip
    return stored, (mx.from_fp8(codes, dtype=mx.float32) * scale).astype(mx.bfloat16)


def _nvfp4(w: mx.array) -> tuple[mx.array, mx.array, mx.array, mx.array]:
    scale_2 = mx.abs(w.astype(mx.float32)).max() / (448 * 6)
    words, scales = mx.quantize(w.astype(mx.float32) / scale_2, mode="nvfp4")
    stands_for = mx.dequantize(words, scales, mode="nvfp4", dtype=mx.float32) * scale_2
    return words.view(mx.uint8), scales, scale_2, stands_for


def modelopt_nvfp4(name: str, w: mx.array) -> tuple[Tensors, mx.array]:
    words, scales, scale_2, stands_for = _nvfp4(w)
    return {
        f"{name}.weight": ("U8", words), f"{name}.weight_scale": ("F8_E4M3", scales),
        f"{name}.weight_scale_2": ("F32", scale_2), f"{name}.input_scale": ("F32", mx.array(0.01)),
    }, stands_for  # fmt: skip


def compressed_nvfp4(name: str, w: mx.array) -> tuple[Tensors, mx.array]:
    words, scales, scale_2, stands_for = _nvfp4(w)
    return {
        f"{name}.weight_packed": ("U8", words), f"{name}.weight_scale": ("F8_E4M3", scales),
        f"{name}.weight_global_scale": ("F32", (1 / scale_2).reshape(1)),
        f"{name}.input_global_scale": ("F32", mx.array([7.0])),
    }, stands_for  # fmt: skip


def microscaled(mode: str, weight: str) -> Layout:
    """mxfp4 or mxfp8 under the names of other libraries."""

    def layout(name: str, w: mx.array) -> tuple[Tensors, mx.array]:
        words, scales = mx.quantize(w.astype(mx.float32), mode=mode)
        stored = ("F8_E4M3" if mode == "mxfp8" else "U8", words.view(mx.uint8))
        stands_for = mx.dequantize(words, scales, mode=mode, dtype=mx.float32)
        return {f"{name}.{weight}": stored, f"{name}.weight_scale": ("U8", scales)}, stands_for

    return layout


AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def integers(w: mx.array, bits: int, group: int, symmetric: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes [out, in], scales and zeros [out, groups], such that w is about scale · (code - zero)."""
    groups = np.array(w.astype(mx.float32)).reshape(w.shape[0], -1, group)
    low, high = np.minimum(groups.min(-1), 0), np.maximum(groups.max(-1), 0)
    if symmetric:
        high = np.maximum(-low, high) + 1e-6
        low = -high
    scales = ((high - low) / (2**bits - 1) + 1e-7).astype(np.float16)
    zeros = np.full(scales.shape, 2 ** (bits - 1)) if symmetric else np.rint(-low / scales.astype(np.float32))
    zeros = np.clip(zeros, 1, 2**bits - 1).astype(np.uint32)
    codes = np.rint(groups / scales.astype(np.float32)[..., None]) + zeros[..., None]
    return np.clip(codes, 0, 2**bits - 1).astype(np.uint32).reshape(w.shape), scales, zeros


def words(codes: np.ndarray, bits: int, order: tuple[int, ...] | None = None) -> mx.array:
    """Integers [n, m] in words along the last axis, as int32: the i-th of a word is that of column order[i]."""
    columns = codes.reshape(len(codes), -1, 32 // bits)
    found = np.zeros(columns.shape[:2], np.uint32)
    for i, column in enumerate(order or range(32 // bits)):
        found |= columns[..., column] << np.uint32(bits * i)
    return mx.array(found.view(np.int32))


def integer_layout(order: str, bits: int, group: int, stored_zero: int = 0) -> Layout:
    """GPTQ (of which what is stored as zero is ``stored_zero`` less), AWQ, or compressed-tensors' packed integers."""

    def layout(name: str, w: mx.array) -> tuple[Tensors, mx.array]:
        codes, scales, zeros = integers(w, bits, group, order != "awq")
        values = scales.astype(np.float64)[..., None] * (
            codes.reshape(*scales.shape, -1) - zeros[..., None].astype(int)
        )
        stands_for = mx.array(values.reshape(w.shape).astype(np.float32))
        if order == "packed":
            packed = {f"{name}.weight_packed": ("I32", words(codes, bits)),
                      f"{name}.weight_scale": ("F16", mx.array(scales)),
                      f"{name}.weight_shape": ("I64", mx.array(w.shape, dtype=mx.int64))}  # fmt: skip
            return packed, stands_for
        down = words(codes, bits).T if order == "gptq" else words(codes.T, 4, AWQ_ORDER)
        stored = {
            f"{name}.qweight": ("I32", mx.contiguous(down)),
            f"{name}.scales": ("F16", mx.array(scales.T.copy())),
            f"{name}.qzeros": ("I32", words(zeros.T - stored_zero, bits, AWQ_ORDER if order == "awq" else None)),
        }
        if order == "gptq":
            stored[f"{name}.g_idx"] = ("I32", mx.arange(w.shape[1]) // group)
        return stored, stands_for

    return layout


FP8_CONFIG = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
LAYOUTS: dict[str, tuple[Layout, dict[str, object]]] = {
    "Qwen FP8": (qwen_fp8, FP8_CONFIG),
    "compressed-tensors FP8": (channel_fp8, {"quant_method": "compressed-tensors", "format": "float-quantized"}),
    "ModelOpt FP8": (tensor_fp8, {"quant_method": "modelopt", "quant_algo": "FP8"}),
    "ModelOpt NVFP4": (modelopt_nvfp4, {"quant_method": "modelopt", "quant_algo": "NVFP4"}),
    "compressed-tensors NVFP4": (compressed_nvfp4, {"quant_method": "compressed-tensors",
                                                    "format": "nvfp4-pack-quantized"}),
    "compressed-tensors MXFP4": (microscaled("mxfp4", "weight_packed"), {"quant_method": "compressed-tensors",
                                                                         "format": "mxfp4-pack-quantized"}),
    "Quark MXFP4": (microscaled("mxfp4", "weight"), {"quant_method": "quark"}),
    "GPTQ integers": (integer_layout("gptq", 4, 32, 1), {"quant_method": "gptq", "bits": 4, "group_size": 32,
                                                         "desc_act": False, "sym": True}),
    "GPTQ v2 8-bit integers": (integer_layout("gptq", 8, 32), {"quant_method": "gptq", "bits": 8,
                                                               "checkpoint_format": "gptq_v2"}),
    "AutoRound integers": (integer_layout("gptq", 4, 32, 1), {"quant_method": "auto-round", "bits": 4,
                                                              "packing_format": "auto_round:auto_gptq"}),
    "AWQ integers": (integer_layout("awq", 4, 32), {"quant_method": "awq", "bits": 4, "version": "gemm"}),
    "compressed-tensors integers": (integer_layout("packed", 4, 32), {
        "quant_method": "compressed-tensors", "format": "pack-quantized",
        "config_groups": {"group_0": {"weights": {"num_bits": 4, "group_size": 32, "symmetric": True}}},
    }),
    "ModelOpt MXFP8": (microscaled("mxfp8", "weight"), {"quant_method": "modelopt", "quant_algo": "MXFP8"}),
}  # fmt: skip


def write_foreign(folder: Path, layout: str, *, without: str = "") -> tuple[Path, Path, Tensors]:
    """Writes the checkpoint (less one tensor), and the float one that it stands for.

    Returns:
        Both, and the quantised tensors.
    """
    store, section = LAYOUTS[layout]
    foreign, plain = folder / "foreign", folder / "plain"
    write_checkpoint(plain, TEXT, fused_experts=False)
    shutil.copytree(plain, foreign)
    config = json.loads((plain / "config.json").read_text())
    (foreign / "config.json").write_text(json.dumps(config | {"quantization_config": section}))
    quantized: Tensors = {}
    for file in plain.glob("*.safetensors"):
        tensors = {
            name: array if array.ndim == 1 else array.astype(mx.bfloat16) for name, array in mx.load(str(file)).items()
        }
        stored = {name: ("BF16" if a.dtype == mx.bfloat16 else "F32", a) for name, a in tensors.items()}
        for name, array in list(tensors.items()):
            if name.endswith(".weight") and array.ndim == 2 and not any(part in name for part in KEPT):
                parts, tensors[name] = store(name.removesuffix(".weight"), array)
                del stored[name]
                stored |= parts
                quantized |= parts
        mx.save_safetensors(str(file), tensors, metadata={"format": "pt"})
        stored.pop(without, None)
        save(foreign / file.name, stored)
    for each in (foreign, plain):
        (each / "model.safetensors.index.json").unlink()
    return foreign, plain, quantized


def write_fused_fp8(folder: Path, moe_intermediate_size: int = 128) -> tuple[Path, Path]:
    """As Qwen's FP8 with the experts of a layer in one tensor; the checkpoint, and the float one that it stands for."""
    foreign, plain = folder / "foreign", folder / "plain"
    sizes = {"hidden_size": 256, "moe_intermediate_size": moe_intermediate_size}
    write_checkpoint(plain, TEXT | sizes)
    shutil.copytree(plain, foreign)
    config = json.loads((plain / "config.json").read_text())
    (foreign / "config.json").write_text(json.dumps(config | {"quantization_config": FP8_CONFIG}))
    for file in plain.glob("*.safetensors"):
        tensors = dict(mx.load(str(file)))
        stored = {name: ("F32", array) for name, array in tensors.items()}
        for name in [name for name in tensors if ".experts." in name]:
            experts = [qwen_fp8("x", matrix.astype(mx.bfloat16)) for matrix in tensors[name]]
            for ending, part in (("", "x.weight"), ("_scale_inv", "x.weight_scale_inv")):
                stored[name + ending] = (experts[0][0][part][0], mx.stack([e[0][part][1] for e in experts]))
            tensors[name] = mx.stack([stands_for for _, stands_for in experts])
        mx.save_safetensors(str(file), tensors, metadata={"format": "pt"})
        save(foreign / file.name, stored)
    for each in (foreign, plain):
        (each / "model.safetensors.index.json").unlink()
    return foreign, plain


def save(file: Path, tensors: Tensors) -> None:
    """Writes tensors of any type, those of a byte as uint8 arrays."""
    entries, data = {}, b""
    for name, (dtype, array) in tensors.items():
        end = len(data) + array.nbytes
        entries[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [len(data), end]}
        data += content(array)
    header = json.dumps(entries).encode()
    file.write_bytes(struct.pack("<Q", len(header)) + header + data)


def content(array: mx.array) -> bytes:
    """The bytes of an array."""
    return np.array(mx.contiguous(array).reshape(-1).view(mx.uint8)).tobytes()
