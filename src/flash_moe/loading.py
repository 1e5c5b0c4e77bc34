"""From the arguments of `Model.load` to values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from .errors import ArgumentError, MemoryLimitError
from .experts.banks import can_lie_by_part
from .experts.opening import ExpertIO, held_bytes
from .limits import group_limit, resident_bytes
from .models import ModelFiles
from .models.adapted.loading import AdaptedFiles, AdaptedModel
from .nn.streaming import PLAIN, StreamingOptions
from .ops.dispatch import kernels as allowed_kernels
from .ops.dispatch import kernels_wanted, on_gpu, use_kernel
from .progress import Progress, ProgressOption, following
from .proofs.prover import prove
from .record import RecordLayout

_WORK = 64 << 20  # bytes: activations and caches of a short prompt
_DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}


def resolve_dtype(name: str | None, checkpoint: ModelFiles | AdaptedFiles) -> mx.Dtype:
    """The dtype of activations, see :meth:`Model.load`. ArgumentError where there is no such dtype."""
    if name is not None:
        return _named(name)
    if mx.default_device() == mx.cpu:
        return mx.float32
    return _named(checkpoint.stored_dtype)


def open_adapted(
    folder: Path,
    experts_per_token: int | None,
    expert_io: ExpertIO,
    expert_cache: int,
    dtype: str | None,
    progress: ProgressOption,
    **refused: Any,
) -> AdaptedModel:
    """Opens a model that runs on mlx-lm's network; arguments are those of :meth:`Model.load`.

    Args:
        refused: options that there are none of.

    Raises:
        ArgumentError: one of these was given, or an argument is out of range.
    """
    for name, value in refused.items():
        if value:
            raise ArgumentError(
                f"{name} is {value}, but this model runs on mlx-lm's network, which has no such option; leave it out"
            )
    compute = None if dtype is None and mx.default_device() != mx.cpu else _named(dtype or "float32")
    with following(progress) as told:

        def read(done: int, total: int) -> None:
            if told is not None:
                told(Progress("experts", done, total, "bytes"))

        files = AdaptedFiles.open(folder, experts_per_token, compute)
        check_memory(
            files.resident_bytes, held_bytes(files.records(), expert_io, files.experts_per_token, expert_cache)
        )
        return files.load(expert_io, expert_cache, read)


def _named(name: str) -> mx.Dtype:
    if name not in _DTYPES:
        raise ArgumentError(f"dtype is {name!r}, expected one of {', '.join(_DTYPES)}")
    return _DTYPES[name]


def prove_kernels(
    checkpoint: ModelFiles,
    layouts: Mapping[int, RecordLayout],
    experts_per_token: int,
    dtype: mx.Dtype,
    streaming: StreamingOptions = PLAIN,
    progress: Callable[[int, int], None] | None = None,
    kernels: bool | None = None,
) -> bool:
    """Has all kernels that a network could use prove themselves on a GPU, unless the user has decided about them.

    Args:
        layouts: of the records, by layer.
        progress: called with the number of kernels that are decided, and of all.
        kernels: what the user decided; see :func:`~flash_moe.ops.dispatch.kernels`.

    Returns:
        Whether banks are to lie by part: on a GPU where the experts of a token do not run as kernels.

    Raises:
        CheckpointError: a weight is missing, malformed or does not belong to the others.
    """
    with allowed_kernels(kernels):
        if not on_gpu():
            return False
        cases = checkpoint.kernel_cases(layouts, experts_per_token, dtype, streaming)
        if kernels_wanted() is None:
            prove(cases, progress)
        if any(case[0] == "experts" and use_kernel(case[0], *case[1:]) for case in cases):
            return False
    stored = {mx.float32: "F32", mx.float16: "F16", mx.bfloat16: "BF16"}[dtype]
    return can_lie_by_part(list(layouts.values()), stored)


def check_memory(weights: int, experts: int) -> None:
    """Compares what a model takes at the least with what the control group of this process allows.

    Args:
        weights: bytes of the always-read weights; experts: bytes of the experts that are held in memory.

    Raises:
        MemoryLimitError: it allows less; the system would end the process.
    """
    limit = group_limit()
    need = resident_bytes() + weights + experts + _WORK
    if limit is not None and need > limit:
        raise MemoryLimitError(
            f"the model needs at least {need / 1e6:,.0f} MB ({weights / 1e6:,.0f} of always-read weights, "
            f"{experts / 1e6:,.0f} of experts, the rest for the program), but the control group of this process allows "
            f"{limit / 1e6:,.0f}; raise its limit, or use a smaller expert_cache, fewer experts_per_token or another expert_io"
        )
