"""Determines the quantisation of each tensor, from config.json's ``quantization`` and the tensors.

The dtype of the scales decides the kind of mode: scales of one byte belong to mxfp4, nvfp4 or mxfp8, others are affine.
Statements of config.json about a module must agree with the tensors. Without a statement, the shapes decide.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import CheckpointError
from ..formats import GROUP_SIZES, MODES, QUANTIZED_BITS, Quantization
from .names import canonical_name, expert_module, expert_tensor, module_path
from .safetensors import TensorInfo

_DEFAULT = Quantization(4, 64)  # defaults of mlx.core.quantize in affine mode
_REMEDY = (
    "Use the bf16 checkpoint or one written by mlx_lm.convert; `flash-moe convert` also takes FP8, NVFP4, GPTQ and AWQ"
)
_FOREIGN_TENSORS = {  # suffixes of names that other libraries use for quantised weights
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
    """The statements of config.json about a module; a field is None if there is none."""

    bits: int | None
    group_size: int | None
    mode: str | None = None
    global_scale: bool = False

    def allows(self, found: Quantization) -> bool:
        """Returns whether the statements agree with a quantisation."""
        pairs = (self.bits, found.bits), (self.group_size, found.group_size), (self.mode, found.mode)
        return all(stated is None or stated == value for stated, value in pairs)


@dataclass(frozen=True)
class QuantizationMap:
    """The default quantisation of a checkpoint, and the overrides of modules by canonical path.

    Attributes:
        shapes_decide: whether a module without a statement in config.json may be quantised.
    """

    default: StatedQuantization | None
    overrides: Mapping[str, StatedQuantization]
    shapes_decide: bool = False

    @classmethod
    def from_config(
        cls, raw: Mapping[str, Any], names: Callable[[str], str | None] = canonical_name
    ) -> QuantizationMap:
        """Reads the quantization section of config.json.

        As in MLX, an override inherits no values from the section.

        Args:
            names: function that maps a name in the file to the canonical name, or to None if the module is not needed.

        Raises:
            CheckpointError: MLX does not support the quantisation, or an entry is malformed.
        """
        if (section := quantization_section(raw)) is None:
            return cls(None, {})
        overrides: dict[str, StatedQuantization] = {}
        for key, value in section.items():
            if not isinstance(value, Mapping) or (name := names(key)) is None:
                continue
            expert = expert_tensor(name)
            module = module_path(name) if expert is None else expert_module(expert.layer, expert.projection)
            overrides[module] = _entry(key, value)
        return cls(_entry("quantization", section), overrides)

    def stated(self, modules: Iterable[str]) -> StatedQuantization | None:
        """Returns the override of the first of these paths that has one; None if none has."""
        return next((self.overrides[name] for name in modules if name in self.overrides), None)

    def of(self, modules: Iterable[str], weight: TensorInfo, scales: TensorInfo) -> Quantization:
        """Returns the quantisation of a module, given its packed weight and its scales.

        Args:
            modules: canonical paths under which config.json may have an override, the most specific first.

        Raises:
            CheckpointError: config.json has no quantization section, or contradicts the tensors.
        """
        override = self.stated(modules)
        stated = override or self.default or (StatedQuantization(None, None) if self.shapes_decide else None)
        if stated is None:
            raise CheckpointError(
                f"{scales.file} holds {scales.name!r}, but config.json has no quantization section; "
                "restore the original config.json"
            )
        # A row of n weights takes n · bits / 32 words and n / group_size scales.
        words, groups = (info.shape[-1] if info.shape else 0 for info in (weight, scales))
        product = 32 * words // groups if groups else 0
        if scales.dtype == "U8":
            found = _byte_scaled(product, scales)
            if override is not None and not override.allows(found):
                raise _contradiction(scales, found.mode, override)
            return found
        if stated.mode not in (None, "affine"):
            if override is not None:
                raise _contradiction(scales, "affine", override)
            stated = StatedQuantization(None, None)  # the mode differs from that of the section, so the shapes decide
        return _completed(stated, product)

    def check_default(self, modules: Iterable[tuple[Iterable[str], TensorInfo]]) -> None:
        """Raises CheckpointError if no module that the section applies to has its mode.

        Args:
            modules: canonical paths and scales of each quantised module.
        """
        spoken_for = [scales for paths, scales in modules if self.stated(paths) is None]
        if self.default is None or not spoken_for:
            return
        if not any((scales.dtype == "U8") == (self.default.mode not in (None, "affine")) for scales in spoken_for):
            raise _contradiction(spoken_for[0], f"dtype {spoken_for[0].dtype}", self.default)


def _byte_scaled(product: int, scales: TensorInfo) -> Quantization:
    """Returns the mode with scales of one byte whose bits times group size equal ``product``."""
    for mode, (bits, group_size) in MODES.items():
        if bits * group_size == product:
            return Quantization(bits, group_size, mode)
    raise CheckpointError(
        f"{scales.file}: {scales.name!r} has one byte for each {product} bits of weights, expected 64 (nvfp4), 128 (mxfp4) "
        "or 256 (mxfp8); scales and weights do not belong together: download the checkpoint again"
    )


def _contradiction(scales: TensorInfo, found: str, stated: StatedQuantization) -> CheckpointError:
    said = ", ".join(f"{name} {value}" for name, value in vars(stated).items() if value)
    return CheckpointError(
        f"{scales.file}: {scales.name!r} is {scales.dtype} {list(scales.shape)}, of {found}, but config.json says {said}; "
        "restore the original config.json"
    )


def quantization_section(raw: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Returns MLX's quantization section of config.json; None if the checkpoint is not quantised.

    Raises:
        CheckpointError: the section comes from another library, such as GPTQ, AWQ, AutoRound or compressed-tensors.
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
    """Raises CheckpointError if another library quantised the weights, even if config.json does not say so."""
    for info in tensors:
        if (method := _foreign_method(info)) is not None:
            raise CheckpointError(
                f"{info.file} holds {info.name!r}, which is {method}, expected floats or MLX's weight, scales and "
                f"biases. {_REMEDY}"
            )


def is_quantized_by_others(tensors: Iterable[TensorInfo]) -> bool:
    """Returns whether a library other than MLX quantised the weights."""
    return any(_foreign_method(info) is not None for info in tensors)


def _foreign_method(info: TensorInfo) -> str | None:
    return next((method for ending, method in _FOREIGN_TENSORS.items() if info.name.endswith(ending)), None)


def _entry(key: str, value: Mapping[str, Any]) -> StatedQuantization:
    bits, group_size, mode = (value.get(name) for name in ("bits", "group_size", "mode"))
    if mode not in (None, "affine"):
        try:
            q = Quantization.of_mode(mode)
            q = Quantization(q.bits if bits is None else bits, q.group_size if group_size is None else group_size, mode)
        except CheckpointError as error:
            raise CheckpointError(f"config.json: {key} is {error}") from None
        bits, group_size = q.bits, q.group_size
    # mlx_lm writes null for the defaults of MLX
    return StatedQuantization(bits, group_size, mode, value.get("global_scale") is True)


def _completed(stated: StatedQuantization, product: int) -> Quantization:
    """Completes the statements so that bits times group size equal ``product``, else with MLX's defaults."""
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
