"""Integer formats of other libraries, which are MLX's affine quantisation in another order.

    GPTQ      ``qweight`` [in · bits / 32, out], ``qzeros`` [groups, out · bits / 32], ``scales`` [groups, out]
    AWQ       ``qweight`` [in, out · bits / 32], the rest as in GPTQ; a word has 8 numbers in the order 0, 2, 4, 6, 1, 3, 5, 7
    packed    compressed-tensors: ``weight_packed`` [out, in · bits / 32], ``weight_scale`` [out, groups]

w = scale · (q - zero). In GPTQ, the zero is the stored value plus one. In the packed form, it is half of the range.
Sources: AutoGPTQ's and GPTQModel's ``qlinear``; AutoAWQ's ``packing_utils``;
https://github.com/vllm-project/compressed-tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import CheckpointError
from ..formats import FLOATS, GROUP_SIZES
from .safetensors import TensorInfo, read_header

METHODS = ("gptq", "awq", "auto-round")
_BITS = (2, 4, 8)


@dataclass(frozen=True)
class IntegerForm:
    """The storage of integers in a checkpoint.

    Attributes:
        order: ``"gptq"``, ``"awq"`` or ``"packed"``.
        zero: value that is added to stored zeros; the zero itself if none are stored.
    """

    order: str
    bits: int
    zero: int

    @classmethod
    def of(cls, section: Mapping[str, Any]) -> IntegerForm | None:
        """Reads config.json's ``quantization_config``; returns None if the weights are not integers.

        Raises:
            CheckpointError: the integers have an order that MLX does not support.
        """
        method = section.get("quant_method")
        if method == "auto-round":
            packing = str(section.get("packing_format"))
            method = "gptq" if "gptq" in packing else "awq" if "awq" in packing else packing
        if method == "compressed-tensors":
            if section.get("format") != "pack-quantized":
                return None
            weights = group_weights(section)
            if any(w.get("actorder") in ("group", "dynamic") or w.get("symmetric") is False for w in weights):
                raise _refused("compressed-tensors with actorder or zero points")
            bits = {w.get("num_bits") for w in weights}
            found = _checked(bits.pop() if len(bits) == 1 else sorted(map(str, bits)))
            return cls("packed", found, 1 << (found - 1))
        if method == "gptq":
            if section.get("desc_act"):
                raise _refused("GPTQ with desc_act, whose groups are scattered over a row")
            if (form := section.get("checkpoint_format") or "gptq") not in ("gptq", "gptq_v2"):
                raise _refused(f"GPTQ of format {form!r}")
            return cls("gptq", _checked(section.get("bits")), 0 if form == "gptq_v2" else 1)
        if method == "awq":
            if str(section.get("version", "gemm")).lower() != "gemm":
                raise _refused(f"AWQ of version {section['version']!r}")
            return cls("awq", _checked(section.get("bits", section.get("w_bit"))), 0)
        return None

    def parts(self, weight: TensorInfo, scales: TensorInfo, zeros: TensorInfo | None) -> Iterator[IntegerPart]:
        """Yields the parts in MLX's form: weight, scales and biases.

        Raises:
            CheckpointError: the shapes do not match.
        """
        stored = [list(info.shape) for info in (weight, scales, *([] if zeros is None else [zeros]))]
        if (
            scales.dtype not in FLOATS
            or any(len(shape) != 2 for shape in stored)
            or (self.order != "packed") != bool(zeros)
        ):
            raise _mismatch(weight, stored)
        rows, groups = scales.shape if self.order == "packed" else scales.shape[::-1]
        columns = {
            "packed": weight.shape[1] * 32 // self.bits,
            "gptq": weight.shape[0] * 32 // self.bits,
            "awq": weight.shape[0],
        }[self.order]
        words = rows * columns * self.bits // 32
        if weight.nbytes != 4 * words or (zeros is not None and zeros.shape != (groups, rows * self.bits // 32)):
            raise _mismatch(weight, stored)
        if columns // groups not in GROUP_SIZES or columns % groups:
            raise CheckpointError(
                f"{weight.file}: {weight.name!r} has a scale for {columns / groups:g} weights, expected 32, 64 or 128; convert "
                "the bf16 checkpoint instead"
            )
        yield self._part(weight, "U32", (rows, columns * self.bits // 32))
        yield self._part(scales, scales.dtype, (rows, groups))
        yield self._part(zeros or scales, scales.dtype, (rows, groups))

    def _part(self, info: TensorInfo, dtype: str, shape: tuple[int, ...]) -> IntegerPart:
        return IntegerPart(info.name, dtype, shape, info.file, info.offset, info.nbytes, info.state, self)


@dataclass(frozen=True)
class IntegerPart(TensorInfo):
    """A tensor that is converted to a part of MLX.

    ``dtype`` and ``shape`` describe that part, ``nbytes`` the tensor.
    """

    form: IntegerForm = IntegerForm("packed", 4, 8)  # needs a default, because the fields before have one


def check_order(file: Path) -> None:
    """Raises CheckpointError if a weight file has a ``g_idx`` whose groups are scattered over a row."""
    ending = "g_idx"
    orders = [
        t for name, t in read_header(file, lambda name: name.endswith(ending)).tensors.items() if name.endswith(ending)
    ]
    if not orders:
        return
    with file.open("rb") as stream:
        for order in orders:
            stream.seek(order.offset)
            groups = np.frombuffer(stream.read(order.nbytes), "<i8" if order.dtype == "I64" else "<i4")
            size = max(len(groups) // max(int(groups.max(initial=0)) + 1, 1), 1)
            if groups.any() and (groups != np.arange(len(groups)) // size).any():
                raise CheckpointError(
                    f"{file}: {order.name!r} scatters groups over a row (GPTQ with desc_act), which MLX has no form for; "
                    "convert the bf16 checkpoint instead"
                )


def group_weights(section: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Returns what compressed-tensors' config_groups say about weights."""
    groups = section.get("config_groups")
    found = (
        [group.get("weights") for group in groups.values() if isinstance(group, Mapping)]
        if isinstance(groups, Mapping)
        else []
    )
    return [weights for weights in found if isinstance(weights, Mapping)]


def _checked(bits: Any) -> int:
    if bits not in _BITS:
        raise _refused(f"integers of {bits} bits")
    return int(bits)


def _refused(what: str) -> CheckpointError:
    return CheckpointError(
        f"config.json: quantization_config is {what}, which MLX has no form for; convert the bf16 checkpoint instead"
    )


def _mismatch(weight: TensorInfo, shapes: list[list[int]]) -> CheckpointError:
    return CheckpointError(
        f"{weight.file}: {weight.name!r}, its scales and zeros have the shapes {shapes}, which do not belong together; "
        "download the checkpoint again"
    )
