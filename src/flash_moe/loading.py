"""From the arguments of `Model.load` to values, and from a checkpoint to a network."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

from .checkpoint.files import Checkpoint
from .checkpoint.resident import load_resident
from .errors import ArgumentError
from .experts.store import ExpertStore
from .nn.decoder import Decoder
from .nn.streaming import PLAIN, StreamingOptions
from .nn.weights import Weights

_DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}


def resolve_dtype(name: str | None, checkpoint: Checkpoint) -> mx.Dtype:
    """The dtype of activations, see :meth:`Model.load`. ArgumentError where there is no such dtype."""
    if name is not None:
        if name not in _DTYPES:
            raise ArgumentError(f"dtype is {name!r}, expected one of {', '.join(_DTYPES)}")
        return _DTYPES[name]
    if mx.default_device() == mx.cpu:
        return mx.float32
    stored = checkpoint.resident["norm.weight"].dtype if "norm.weight" in checkpoint.resident else "BF16"
    return {"F32": mx.float32, "F16": mx.float16}.get(stored, mx.bfloat16)


def load_decoder(
    checkpoint: Checkpoint,
    store: ExpertStore,
    experts_per_token: int,
    dtype: mx.Dtype,
    progress: Callable[[int], None] | None = None,
    kernels: bool | None = None,
    streaming: StreamingOptions = PLAIN,
) -> Decoder:
    """The network with its resident weights in memory; arguments are those of :class:`~.nn.decoder.Decoder`.

    Raises:
        CheckpointError: a weight is missing, malformed or does not belong to the others.
    """
    resident = load_resident(checkpoint, dtype)
    weights = Weights(resident.arrays, resident.quantization)
    return Decoder(checkpoint.config, weights, store, experts_per_token, dtype, progress, kernels, streaming)
