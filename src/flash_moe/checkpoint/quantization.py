"""Which tensors of a checkpoint are quantised, and how: config.json's ``quantization`` with its per-tensor overrides."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import CheckpointError
from ..record import Quantization
from .names import canonical_name

_DEFAULT = Quantization(4, 64)  # of mlx.core.quantize in affine mode


@dataclass(frozen=True)
class QuantizationMap:
    """The default quantisation of a checkpoint and the modules that differ from it."""

    default: Quantization | None
    overrides: Mapping[str, Quantization]

    @classmethod
    def from_config(cls, raw: Mapping[str, Any]) -> QuantizationMap:
        """Reads ``quantization`` (or the older ``quantization_config``) of config.json.

        Raises:
            CheckpointError: a mode other than affine, or an entry that is malformed.
        """
        section = raw.get("quantization") or raw.get("quantization_config")
        if section is None:
            return cls(None, {})
        if not isinstance(section, Mapping) or "bits" not in section:
            method = section.get("quant_method", section) if isinstance(section, Mapping) else section
            raise CheckpointError(
                f"config.json: quantization is {method!r}; expected MLX's affine form with bits and group_size. "
                "Use the bf16 checkpoint or one written by mlx_lm.convert"
            )
        overrides = {}
        for key, value in section.items():
            if isinstance(value, Mapping) and (name := canonical_name(key)) is not None:
                overrides[name] = _entry(key, {**section, **value})
        return cls(_entry("quantization", section), overrides)

    def of(self, module: str) -> Quantization:
        """How the module with this canonical path is quantised, given that the file holds scales for it."""
        found = self.overrides.get(module, self.default)
        if found is None:
            raise CheckpointError(
                f"{module} has scales, but config.json has no quantization section; restore the original config.json"
            )
        return found


def _entry(key: str, value: Mapping[str, Any]) -> Quantization:
    mode = value.get("mode", "affine")
    if mode != "affine":
        raise CheckpointError(f"config.json: {key} is quantised in mode {mode!r}; only 'affine' is supported")
    bits, group_size = value.get("bits"), value.get("group_size")
    # mlx_lm writes null for what was left to MLX's default
    return Quantization(
        _DEFAULT.bits if bits is None else bits, _DEFAULT.group_size if group_size is None else group_size
    )
