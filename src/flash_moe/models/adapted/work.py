"""Determines the work of the layers of mlx-lm's networks, from described passes that are never evaluated."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx

from ...nn.layer_work import LayerWork
from .adapted_cache import arrays_of
from .library import expert_modules, module

_LAYER = re.compile(r"\.(\d+)\.")
_SHORT, _LONG = 256, 512  # tokens of two passes; the difference of their caches gives the bytes per token


def layer_of(name: str) -> int | None:
    """Returns the layer of a weight, from its name."""
    found = _LAYER.search(f"{name}.")
    return None if found is None else int(found[1])


def layer_works(network: Any, heads: int, float_bytes: int) -> list[LayerWork]:
    """Returns the work of each layer, without reading weights.

    Args:
        network: mlx-lm's network, without streamed experts.
        heads: total width of all attention heads.
        float_bytes: bytes of a float in activations.
    """
    layers, sparse = len(network.layers), {layer_of(path) for path, _ in expert_modules(network)}
    weights: Counter[int | None] = Counter()
    experts = tuple(f"{path}." for path, _ in expert_modules(network))
    for path, m in network.named_modules():
        if not path.startswith(experts) and isinstance(matrix := m.get("weight"), mx.array) and matrix.ndim > 1:
            weights[layer_of(path)] += matrix.size * 32 // m.bits if "scales" in m else matrix.size
    caches = _cache_bytes(network, float_bytes)
    caches += [("none", 0, 0)] * (layers - len(caches))  # layers without a cache are not in the list
    return [
        LayerWork(kind, i in sparse, per_token, state, 2.0 * weights[i], 4.0 * heads if per_token else 0.0)
        for i, (kind, per_token, state) in enumerate(caches[:layers])
    ]


def _cache_bytes(network: Any, float_bytes: int) -> list[tuple[str, int, int]]:
    """Returns for each cache its kind, its bytes per token, and its bytes that do not grow."""
    short, long = (_passed(network, tokens) for tokens in (_SHORT, _LONG))
    found = []
    for before, after in zip(short, long, strict=True):
        held, more = _bytes(before, float_bytes), _bytes(after, float_bytes)
        per_token = (more - held) // (_LONG - _SHORT)
        state = held - _SHORT * per_token
        if (window := getattr(after, "max_size", None)) is not None:
            per_token, state = 0, more * window // _LONG
        found.append((type(after).__name__, per_token, max(0, state)))
    return found


def _passed(network: Any, tokens: int) -> Sequence[Any]:
    caches: Sequence[Any] = module("models.cache").make_prompt_cache(network)
    experts = [switch for _, switch in expert_modules(network)]
    kinds = [type(switch) for switch in experts]
    try:
        for switch, kind in zip(experts, kinds, strict=True):
            switch.__class__ = type("Skipped", (kind,), {"__call__": _skip})  # MLX on the CPU lacks global scales
        network(mx.zeros((1, tokens), mx.int32), cache=caches)
    finally:
        for switch, kind in zip(experts, kinds, strict=True):
            switch.__class__ = kind
    return caches


def _skip(switch: Any, x: mx.array, indices: mx.array) -> mx.array:
    """Returns an array with the shape of the experts' outputs for x [..., H]: [..., K, H]."""
    return mx.broadcast_to(x[..., None, :], (*indices.shape, x.shape[-1]))


def _bytes(cache: Any, float_bytes: int) -> int:
    return sum(
        a.size * (float_bytes if mx.issubdtype(a.dtype, mx.floating) else a.itemsize) for a in arrays_of([cache])
    )


def held_bytes(resident: Mapping[str, mx.array], float_bytes: int) -> dict[str, int]:
    """Returns the bytes of weights in memory, by layer, for the head, and for all others, with names as in our own
    networks.
    """
    head = [name for name in resident if "lm_head" in name] or [name for name in resident if "embed" in name]
    found: Counter[str] = Counter()
    for name, array in resident.items():
        layer = layer_of(name)
        key = f"layers.{layer}" if layer is not None else "head" if name in head else "others"
        found[key] += array.size * (float_bytes if mx.issubdtype(array.dtype, mx.floating) else array.itemsize)
    return dict(found)
