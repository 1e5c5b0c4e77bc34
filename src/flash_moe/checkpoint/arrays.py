"""The resident weights as MLX arrays under canonical names, as stored in the files.

The arrays are lazy: the files are read when an array is first evaluated.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np

from ..dtypes import DTYPES
from ..errors import CheckpointError
from ..formats import FLOATS
from .folder import Checkpoint
from .integers import IntegerPart
from .names import module_path
from .safetensors import TensorInfo, check_unchanged


def read_arrays(checkpoint: Checkpoint) -> dict[str, mx.array]:
    """Returns the resident tensors as lazy arrays, by canonical name, exactly as stored. Tensors that are to be
    reordered are flat.

    Raises:
        CheckpointError: a tensor has an unsupported dtype, or a file has changed since its header was read.
    """
    for name, info in checkpoint.resident.items():
        if (
            info.dtype not in (*FLOATS, "U32")
            and not (info.dtype == "U8" and name.endswith(".scales"))
            and not (info.dtype == "F8_E4M3" and f"{module_path(name)}.scales" in checkpoint.resident)
        ):
            raise CheckpointError(
                f"{info.file}: {info.name!r} is {info.dtype}, expected {', '.join(FLOATS)} or packed U32; "
                "use the bf16 checkpoint or one written by mlx_lm.convert"
            )
    check_unchanged(checkpoint.resident.values())
    arrays: dict[str, mx.array] = {}
    for file in sorted({info.file for info in checkpoint.resident.values()}):
        try:
            stored: Any = mx.load(str(file))
        except RuntimeError:  # a tensor that is not needed has a dtype that MLX does not support
            stored = {}
        for name, info in checkpoint.resident.items():
            if info.file == file:
                array = stored[info.name] if info.name in stored else mx.array(read_bytes(info))
                if array.dtype != DTYPES[info.dtype]:
                    array = array.view(DTYPES[info.dtype])
                arrays[name] = array.reshape(-1 if isinstance(info, IntegerPart) else info.shape)
    return arrays


def read_bytes(info: TensorInfo) -> np.ndarray:
    """Reads the bytes of a tensor from its file immediately. Raises CheckpointError if they cannot be read."""
    try:
        words = np.fromfile(info.file, np.uint8, info.nbytes, offset=info.offset)
    except OSError as error:
        raise CheckpointError(f"{info.file} cannot be read: {error}") from error
    if words.nbytes != info.nbytes:
        raise CheckpointError(f"{info.file} ends within {info.name!r}; the file is truncated: download it again")
    return words
