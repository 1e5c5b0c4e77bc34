"""mlx-lm's expert modules, SwitchGLU and SwitchMLP, with experts that are fetched on use."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from threading import RLock
from typing import Any

import mlx.core as mx
import numpy as np

from ...dtypes import DTYPES
from ...experts.store import ExpertStore, Records
from ...formats import GLOBAL_SCALE
from ...machines.sums import Sums
from .stored_arrays import Key, Place

_SORTED = 64  # number of indices above which mlx-lm sorts them; its kernels for sorted indices need contiguous matrices


class Streamed:
    """A mixin for an expert module without parameters, which fetches the experts of each call."""

    _stream: LayerStream

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        return self._stream(self, x, indices)


def stream(switch: Any, layer: LayerStream) -> None:
    """Changes the class of an expert module and removes its parameters. Its other attributes stay."""
    for linear, name in layer.dtypes:
        dict.pop(switch[linear], name)
    switch.__class__ = type(f"Streamed{type(switch).__name__}", (Streamed, type(switch)), {})
    object.__setattr__(switch, "_stream", layer)


@dataclass
class Shared:
    """The state that the layers of a network share.

    Attributes:
        turn: lock for fetching records and describing their use, because several threads may run one network.
        passed: function that is called when an expert module begins, with the number of modules that have run.
        sums: collects the outputs of experts on other machines; None for a single machine.
    """

    turn: RLock = field(default_factory=RLock)
    passed: Callable[[int], None] | None = None
    sums: Sums | None = None


@dataclass(frozen=True)
class LayerStream:
    """The streamed experts of one layer.

    Attributes:
        kind: the original class of the module.
        places: the places of its parameters in a record.
        dtypes: dtypes of the parameters in the network, which may differ from the files.
        shared: the state that all layers of the network share.
    """

    store: ExpertStore
    layer: int
    kind: type
    places: Mapping[Key, Place]
    dtypes: Mapping[Key, mx.Dtype]
    shared: Shared

    @cached_property
    def _is_stored_so(self) -> bool:
        """Whether all parameters are whole parts of a record, so that a bank by part can be used directly."""
        return all(place.is_part and DTYPES[place.part.dtype] == self.dtypes[key] for key, place in self.places.items())

    def __call__(self, module: Any, x: mx.array, indices: mx.array) -> mx.array:
        """Runs the original module on x [..., H] with the experts in ``indices`` [..., K]; the result is [..., K, H]."""
        chosen = np.array(indices)
        experts, local = np.unique(chosen, return_inverse=True)
        local = local.reshape(indices.shape)
        with self.shared.turn:
            if self.shared.passed is not None:
                self.shared.passed(self.layer)
            if self.shared.sums is not None:
                return self._of_all_ranks(self.shared.sums, module, x, chosen)
            if len(experts) <= self.store.capacity:
                return self._run(module, x, experts.tolist(), local)
            return self._in_groups(module, x, experts, local)

    def _of_all_ranks(self, sums: Sums, module: Any, x: mx.array, chosen: np.ndarray) -> mx.array:
        """Returns each output from the rank that owns the expert. All other ranks add zeros, which changes no bit."""
        own = sums.share.owns(self.layer, chosen)
        part = mx.zeros((*chosen.shape, sums.widths[self.layer] // chosen.shape[-1]), dtype=x.dtype)
        if own.any():
            experts, found = np.unique(chosen[own], return_inverse=True)
            local = np.zeros_like(chosen)
            local[own] = found.reshape(-1)
            part = self._in_groups(module, x, experts, local, own)
        return sums.add(part, self.layer, chosen).astype(part.dtype)

    def _in_groups(
        self, module: Any, x: mx.array, experts: np.ndarray, local: np.ndarray, own: np.ndarray | None = None
    ) -> mx.array:
        """Computes rows sorted by expert, in groups of at most as many experts as a fetch may request.

        Args:
            own: mask of the outputs to compute, with the shape of ``local``; other outputs are 0. None for all.
        """
        capacity, k = self.store.capacity, local.shape[-1]
        order = np.argsort(local, axis=None, kind="stable")
        if own is not None:
            order = order[own.reshape(-1)[order]]
        sorted_local = local.reshape(-1)[order]
        rows = x.reshape(-1, x.shape[-1])
        outputs = []
        for first in range(0, len(experts), capacity):
            start, stop = np.searchsorted(sorted_local, (first, first + capacity))
            mine = rows[mx.array(order[start:stop] // k)]
            group = experts[first : first + capacity].tolist()
            outputs.append(self._run(module, mine, group, sorted_local[start:stop, None] - first)[:, 0])
            if following := experts[first + capacity : first + 2 * capacity].tolist():
                self.store.prefetch(self.layer, following)
        inverse = np.full(local.size, order.size)
        inverse[order] = np.arange(order.size)
        if order.size < local.size:
            outputs.append(mx.zeros_like(outputs[0][:1]))
        y = mx.concatenate(outputs)[mx.array(inverse)]
        return y.reshape(*local.shape, -1)

    def _run(self, module: Any, x: mx.array, experts: Sequence[int], local: np.ndarray) -> mx.array:
        records = self.store.fetch(self.layer, experts)
        bank, rows = _bank(records, in_place=self._is_stored_so and local.size < _SORTED)
        own = copy.copy(module)  # all threads share the module itself
        for linear in {linear for linear, _ in self.dtypes}:
            own[linear] = copy.copy(module[linear])
        for (linear, name), array in _parameters(bank, self.places, self.dtypes):
            own[linear][name] = array
        if mx.default_device() == mx.cpu:
            for linear in {linear for linear, name in self.dtypes if name == "global_scale"}:
                own[linear] = Scaled(own[linear])
        y: mx.array = self.kind.__call__(own, x, mx.array(rows[local].astype(np.uint32)))
        records.used_by(y)
        mx.async_eval(y)  # starts the device, and lets another thread wait for the result
        return y


class Scaled:
    """A linear layer of experts that multiplies its outputs with global scales, which MLX supports only on a GPU.

    Args:
        linear: layer of mlx-lm, whose global scales and biases are moved to this object.
    """

    def __init__(self, linear: Any) -> None:
        self._factors, self._bias = linear.pop("global_scale") / GLOBAL_SCALE, linear.pop("bias", None)
        linear.global_scale = None
        self._linear = linear

    def __call__(self, x: mx.array, indices: mx.array, **options: Any) -> mx.array:
        y: mx.array = self._linear(x, indices, **options) * self._factors[indices][..., None, None]
        return y if self._bias is None else y + mx.expand_dims(self._bias[indices], -2)


def _bank(records: Records, in_place: bool) -> tuple[mx.array, np.ndarray]:
    """Returns the records as an array [N, words], and the row of each record in it."""
    if records.rows is not None and in_place and not _on_cuda():
        return records.arrays[0], np.array(records.rows)
    stacked = records.stacked()
    return stacked, np.arange(stacked.shape[0])


def _on_cuda() -> bool:
    return mx.default_device() == mx.gpu and not mx.metal.is_available()


def _parameters(
    bank: mx.array, places: Mapping[Key, Place], dtypes: Mapping[Key, mx.Dtype]
) -> Iterator[tuple[Key, mx.array]]:
    """Yields the parameters of a module as views of records [N, words], in the given dtypes."""
    count, words = bank.shape
    flat = bank.reshape(-1)
    typed = {"U32": flat}
    for key, place in places.items():
        if (stored := typed.get(place.part.dtype)) is None:
            stored = typed[place.part.dtype] = flat.view(DTYPES[place.part.dtype])
        strides = (4 * words // stored.itemsize, *place.strides)
        start = place.part.offset // stored.itemsize + place.start
        array = mx.as_strided(stored, (count, *place.shape), strides, start)
        if _on_cuda():  # it needs contiguous matrices
            array = mx.contiguous(array)
        yield key, array.astype(dtypes[key])
