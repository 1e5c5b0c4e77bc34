"""Writes the resident weights of a packed model: ordinary MLX safetensors, one file per decoder layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..checkpoint.integers import IntegerPart
from ..checkpoint.names import module_path
from ..checkpoint.quantization import quantization_section
from ..dtypes import NAMES
from ..formats import Quantization
from ..models import ModelFiles
from ..record import RecordLayout
from .affine import packed
from .requantize import Rounding, searched
from .rounding import check_finite, nearest

_GATES = ("mlp.gate", "shared_expert_gate")  # few weights with a large effect: quantised as in mlx_lm
_GATE_QUANTIZATION = Quantization(8, 64)
_BLOCK = 1 << 24  # weights that are converted together; 64 MiB as float32


def resident_file(layer: int | None = None) -> str:
    """Returns the name of the file with the resident weights of a layer, or with those outside all layers."""
    return "model-resident.safetensors" if layer is None else f"model-resident-{layer:05d}.safetensors"


class ResidentFiles:
    """The resident weights of a conversion.

    Args:
        quantization: quantisation of float weights; None keeps them as floats. Quantised weights are kept.
        rounding: ``"search"`` or ``"nearest"``.
        losses: as for :func:`.rounding.nearest`.
    """

    def __init__(
        self, checkpoint: ModelFiles, quantization: Quantization | None, rounding: Rounding, losses: dict[str, float]
    ) -> None:
        self._checkpoint, self._family, self._rounding = checkpoint, checkpoint.family, rounding
        self._losses = losses
        self._arrays, self._default = checkpoint.read_resident(), quantization
        self._quantization = {
            name.removesuffix(".weight"): q
            for name in self._arrays
            if (q := self._wanted(name, quantization)) is not None
        }

    def check(self, layouts: Mapping[int, RecordLayout]) -> None:
        """Checks that the network has all of its weights; see :meth:`ModelFiles.check_resident`."""
        self._checkpoint.check_resident(layouts, self._arrays)

    def groups(self) -> dict[str, list[str]]:
        """Returns the canonical names for each output file: one file per decoder layer, and one for all other weights."""
        names = sorted(self._arrays)
        groups = {resident_file(): [name for name in names if not name.startswith("layers.")]}
        for i in range(self._checkpoint.dimensions.num_hidden_layers):
            mine = [name for name in names if name.startswith(f"layers.{i}.")]
            groups[resident_file(i)] = mine
        return {file: mine for file, mine in groups.items() if mine}

    def files(self, name: str) -> frozenset[Path]:
        """Returns the files that contain the data of an array."""
        stored = self._checkpoint.resident
        others = ["scales"] if stored[name].dtype == "F8_E4M3" else []
        if isinstance(stored[name], IntegerPart):
            others = ["weight", "scales", "biases"]
        return frozenset(stored[each].file for each in (name, *(f"{module_path(name)}.{part}" for part in others)))

    def nbytes(self) -> int:
        """Returns the total bytes of the files without headers. Call it before any group is converted."""
        total = 0
        for name, array in self._arrays.items():
            q = self._quantization.get(module_path(name))
            if q is None or not name.endswith(".weight"):
                total += array.nbytes
            else:
                per_group = 2 * array.itemsize if q.is_affine else 1
                total += array.size * q.bits // 8 + per_group * array.size // q.group_size
        return total

    def config_section(self) -> dict[str, Any] | None:
        """Returns the quantisation section for config.json."""
        section: dict[str, Any] = {}
        found = dict(self._quantization)
        stored, quantization = self._checkpoint.resident, self._checkpoint.quantization
        if quantization.shapes_decide:  # quantised by another library: config.json has no MLX section yet
            scales = {module_path(name): info for name, info in stored.items() if name.endswith(".scales")}
            found |= {
                module: quantization.of([module], stored[f"{module}.weight"], info)
                for module, info in scales.items()
                if stored[f"{module}.weight"].dtype == "U32"
            }
        else:
            section |= quantization_section(self._checkpoint.raw_config) or {}
        for module, q in sorted(found.items()):
            section = (self._default or q).to_json() | {"mode": (self._default or q).mode} | section
            scaled = {"global_scale": True} if f"{module}.global_scale" in stored else {}
            section[self._family.mlx_name(module + ".")[:-1]] = q.to_json() | scaled
        return section or None

    def converted(self, names: Iterable[str]) -> dict[str, mx.array]:
        """Returns the arrays to write for these canonical names. Each name can be converted only once.

        Raises:
            NumericalError: an array is NaN or infinite.
        """
        out: dict[str, mx.array] = {}
        for name in names:
            array = self._arrays.pop(name)  # removed, because an evaluated array takes memory
            array = self._family.mlx_array(self._checkpoint, name, array)
            q = self._quantization.get(module_path(name)) if name.endswith(".weight") else None
            if q is None:
                check_finite(array, name)
                out[self._family.mlx_name(name)] = array
                continue
            parts = _quantized(array, q, self._rounding, name, self._losses)
            for kind, part in zip(("weight", "scales", "biases"), parts, strict=False):
                out[self._family.mlx_name(f"{module_path(name)}.{kind}")] = part
        return out

    def _wanted(self, name: str, default: Quantization | None) -> Quantization | None:
        """Returns the quantisation for a tensor; None if it is quantised already or not a matrix."""
        array, module = self._arrays[name], module_path(name)
        if default is None or not name.endswith(".weight") or array.ndim != 2 or f"{module}.scales" in self._arrays:
            return None
        q = _GATE_QUANTIZATION if module.endswith(_GATES) else default
        return None if array.shape[1] % q.group_size else q


def _quantized(
    array: mx.array, q: Quantization, rounding: Rounding, name: str, losses: dict[str, float]
) -> list[mx.array]:
    """Returns the words and scales of a matrix [rows, columns], and the biases in affine mode."""
    if rounding == "nearest" or not q.is_affine:
        return nearest(array, q, name, losses)
    blocks, step = [], max(1, _BLOCK // array.shape[1])
    for start in range(0, array.shape[0], step):
        weights = np.array(array[start : start + step].astype(mx.float32))
        found = searched(weights, q, NAMES[array.dtype])
        words = packed(found.codes.reshape(weights.shape), q.bits)
        floats = (mx.array(values).astype(array.dtype) for values in (found.scales, found.biases))
        blocks.append([mx.array(words), *floats])
    return [mx.concatenate(list(column)) for column in zip(*blocks, strict=True)]
