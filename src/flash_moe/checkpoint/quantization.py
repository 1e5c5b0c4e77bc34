"""Which tensors of a checkpoint are quantised, and how: config.json's ``quantization`` with its per-module overrides.

What config.json states is checked against the shapes of the stored tensors; what it leaves open, the shapes decide.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import CheckpointError
from ..formats import GROUP_SIZES, QUANTIZED_BITS, Quantization
from .names import canonical_name, expert_module, expert_tensor, module_path
from .safetensors import TensorInfo

_DEFAULT = Quantization(4, 64)  # of mlx.core.quantize in affine mode
_REMEDY = "Use the bf16 checkpoint or one written by mlx_lm.convert"
_FOREIGN_TENSORS = {  # endings of names that other libraries use for quantised weights
    ".qweight": "GPTQ or AWQ",
    ".qzeros": "GPTQ or AWQ",
    ".weight_packed": "compressed-tensors",
    ".weight_scale": "FP8 or NVFP4",
    "_scale_inv": "FP8",
    "_blocks": "Hugging Face's MXFP4",
    ".absmax": "bitsandbytes",
    ".SCB": "bitsandbytes",
}


@dataclass(frozen=True)
class StatedQuantization:
    """What config.json states about a module; None for what it leaves open."""

    bits: int | None
    group_size: int | None


@dataclass(frozen=True)
class QuantizationMap:
    """The default quantisation of a checkpoint and the modules that differ from it, by canonical path."""

    default: StatedQuantization | None
    overrides: Mapping[str, StatedQuantization]

    @classmethod
    def from_config(cls, raw: Mapping[str, Any]) -> QuantizationMap:
        """Reads the quantization section of config.json.

        As in MLX, an override takes nothing from the section: what it leaves open is not the section's value.

        Raises:
            CheckpointError: a quantisation that is not MLX's affine one, or an entry that is malformed.
        """
        if (section := quantization_section(raw)) is None:
            return cls(None, {})
        overrides: dict[str, StatedQuantization] = {}
        for key, value in section.items():
            if not isinstance(value, Mapping) or (name := canonical_name(key)) is None:
                continue
            expert = expert_tensor(name)
            module = module_path(name) if expert is None else expert_module(expert.layer, expert.projection)
            overrides[module] = _entry(key, value)
        return cls(_entry("quantization", section), overrides)

    def of(self, modules: Iterable[str], weight: TensorInfo, scales: TensorInfo) -> Quantization:
        """Returns how a module is quantised, given its packed weight and its scales.

        Args:
            modules: canonical paths under which config.json may have an override, the most exact first.

        Raises:
            CheckpointError: config.json has no quantization section, or states what MLX does not have.
        """
        stated = next((self.overrides[name] for name in modules if name in self.overrides), self.default)
        if stated is None:
            raise CheckpointError(
                f"{scales.file} holds {scales.name!r}, but config.json has no quantization section; "
                "restore the original config.json"
            )
        # A row of n weights takes n · bits / 32 words and n / group_size scales.
        words, groups = (info.shape[-1] if info.shape else 0 for info in (weight, scales))
        return _completed(stated, 32 * words // groups if groups else 0)


def quantization_section(raw: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Returns MLX's quantization section of config.json, or None where the checkpoint is not quantised.

    Raises:
        CheckpointError: the section is of another library, such as GPTQ, AWQ, AutoRound or compressed-tensors.
    """
    text = raw.get("text_config")
    for owner in (raw, text if isinstance(text, Mapping) else {}):
        for key in ("quantization", "quantization_config", "compression_config"):
            if not (section := owner.get(key)):
                continue
            method = section.get("quant_method") if isinstance(section, Mapping) else section
            if not isinstance(section, Mapping) or method not in (None, "mlx") or "bits" not in section:
                raise CheckpointError(
                    f"config.json: {key} is {section if method is None else method!r}, expected MLX's affine form with "
                    f"bits and group_size. {_REMEDY}"
                )
            return section
    return None


def refuse_foreign_tensors(tensors: Iterable[TensorInfo]) -> None:
    """Raises CheckpointError where another library than MLX has quantised the weights, whatever config.json states."""
    for info in tensors:
        for ending, method in _FOREIGN_TENSORS.items():
            if info.name.endswith(ending):
                raise CheckpointError(
                    f"{info.file} holds {info.name!r}, which is {method}, expected floats or MLX's weight, scales and "
                    f"biases. {_REMEDY}"
                )


def _entry(key: str, value: Mapping[str, Any]) -> StatedQuantization:
    mode = value.get("mode") or "affine"
    if mode != "affine":
        raise CheckpointError(f"config.json: {key} is quantised in mode {mode!r}; only 'affine' is supported")
    return StatedQuantization(value.get("bits"), value.get("group_size"))  # mlx_lm writes null for MLX's defaults


def _completed(stated: StatedQuantization, product: int) -> Quantization:
    """What is stated, completed such that bits times group size is ``product``, else by MLX's defaults."""
    bits, group_size = stated.bits, stated.group_size
    if bits is None and group_size is None:
        group_size = _DEFAULT.group_size
    if bits is None and group_size in GROUP_SIZES and product // group_size in QUANTIZED_BITS:
        bits = product // group_size
    if group_size is None and bits in QUANTIZED_BITS and product // bits in GROUP_SIZES:
        group_size = product // bits
    return Quantization(
        _DEFAULT.bits if bits is None else bits, _DEFAULT.group_size if group_size is None else group_size
    )
