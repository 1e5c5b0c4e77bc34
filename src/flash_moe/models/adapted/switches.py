"""mlx-lm's expert modules, SwitchGLU and SwitchMLP, with experts that are fetched when they are asked for."""

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

_SORTED = 64  # indices from which on mlx-lm sorts them; kernels for sorted ones take no strided matrices


class Streamed:
    """Mixed into the class of an expert module whose parameters were taken away: fetches the experts of each call."""

    _stream: LayerStream

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        return self._stream(self, x, indices)


def stream(switch: Any, layer: LayerStream) -> None:
    """Changes the class of an expert module; its own attributes stay, its parameters go."""
    for linear, name in layer.dtypes:
        dict.pop(switch[linear], name)
    switch.__class__ = type(f"Streamed{type(switch).__name__}", (Streamed, type(switch)), {})
    object.__setattr__(switch, "_stream", layer)


@dataclass
class Shared:
    """The state that the layers of a network share.

    Attributes:
        turn: held while records are fetched and described; several threads may run one network.
        passed: called with the number of expert modules that have run, when the next one begins.
        sums: collects the outputs of experts that other machines compute; None for one machine.
    """

    turn: RLock = field(default_factory=RLock)
    passed: Callable[[int], None] | None = None
    sums: Sums | None = None


@dataclass(frozen=True)
class LayerStream:
    """The experts of one layer.

    Attributes:
        kind: the module's own class.
        places: where its parameters lie in a record.
        dtypes: what they have in the network, which may differ from the files.
        shared: what all layers of the network share.
    """

    store: ExpertStore
    layer: int
    kind: type
    places: Mapping[Key, Place]
    dtypes: Mapping[Key, mx.Dtype]
    shared: Shared

    @cached_property
    def _is_stored_so(self) -> bool:
        """Whether the parameters are parts of a record as they are; of a whole bank nothing else is wanted."""
        return all(place.is_part and DTYPES[place.part.dtype] == self.dtypes[key] for key, place in self.places.items())

    def __call__(self, module: Any, x: mx.array, indices: mx.array) -> mx.array:
        """Runs the module's own forward on the experts that ``indices`` [..., K] names for x [..., H]: [..., K, H]."""
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
        """Returns each output from the rank whose expert it is. All other ranks add zeros to it, which changes no bit."""
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
        """Returns rows sorted by expert, as many experts at a time as a fetch may ask for.

        Args:
            own: what is computed, of the shape of ``local``; the output is 0 elsewhere. None for everything.
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
        own = copy.copy(module)  # the module itself is shared by all threads
        for linear in {linear for linear, _ in self.dtypes}:
            own[linear] = copy.copy(module[linear])
        for (linear, name), array in _parameters(bank, self.places, self.dtypes):
            own[linear][name] = array
        if mx.default_device() == mx.cpu:
            for linear in {linear for linear, name in self.dtypes if name == "global_scale"}:
                own[linear] = Scaled(own[linear])
        y: mx.array = self.kind.__call__(own, x, mx.array(rows[local].astype(np.uint32)))
        records.used_by(y)
        mx.async_eval(y)  # so that another thread can wait for it, and the device starts
        return y


class Scaled:
    """A linear layer of experts whose outputs are multiplied with global scales: MLX takes those on a GPU only.

    Args:
        linear: of mlx-lm, which loses its global scales and its biases.
    """

    def __init__(self, linear: Any) -> None:
        self._factors, self._bias = linear.pop("global_scale") / GLOBAL_SCALE, linear.pop("bias", None)
        linear.global_scale = None
        self._linear = linear

    def __call__(self, x: mx.array, indices: mx.array, **options: Any) -> mx.array:
        y: mx.array = self._linear(x, indices, **options) * self._factors[indices][..., None, None]
        return y if self._bias is None else y + mx.expand_dims(self._bias[indices], -2)


def _bank(records: Records, in_place: bool) -> tuple[mx.array, np.ndarray]:
    """Returns records as an array [N, words], and which of its rows each of them is."""
    if records.rows is not None and in_place and not _on_cuda():
        return records.arrays[0], np.array(records.rows)
    stacked = records.stacked()
    return stacked, np.arange(stacked.shape[0])


def _on_cuda() -> bool:
    return mx.default_device() == mx.gpu and not mx.metal.is_available()


def _parameters(
    bank: mx.array, places: Mapping[Key, Place], dtypes: Mapping[Key, mx.Dtype]
) -> Iterator[tuple[Key, mx.array]]:
    """The parameters of a module as views of records [N, words], in these dtypes."""
    count, words = bank.shape
    flat = bank.reshape(-1)
    typed = {"U32": flat}
    for key, place in places.items():
        if (stored := typed.get(place.part.dtype)) is None:
            stored = typed[place.part.dtype] = flat.view(DTYPES[place.part.dtype])
        strides = (4 * words // stored.itemsize, *place.strides)
        start = place.part.offset // stored.itemsize + place.start
        array = mx.as_strided(stored, (count, *place.shape), strides, start)
        if _on_cuda():  # which takes no strided matrices
            array = mx.contiguous(array)
        yield key, array.astype(dtypes[key])
