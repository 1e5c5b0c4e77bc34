"""The slot of each expert, for the device; and the set of loaded experts, for the host."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np


class SlotTables:
    """Per layer, the slot of every expert, in arrays that the host changes in place.

    Nothing that reads them may be under way when they change: a token that runs ahead is evaluated as a whole before the
    host looks at it.

    Args:
        layers: with routed experts.
        experts: of a layer.
    """

    def __init__(self, layers: Sequence[int], experts: int) -> None:
        self._places = {layer: i for i, layer in enumerate(layers)}
        self._loaded = np.zeros((len(layers), experts), bool)
        self._arrays = [mx.zeros(experts, dtype=mx.uint32) for _ in layers]
        mx.eval(self._arrays)
        self._slots = [np.array(array, copy=False) for array in self._arrays]

    def of(self, layer: int) -> mx.array:
        """Returns the slots of a layer's experts, [E] uint32; of those that are not loaded, some slot."""
        return self._arrays[self._places[layer]]

    def load(self, layer: int, expert: int, slot: int) -> None:
        """Notes that a record is in its slot, all bytes read."""
        place = self._places[layer]
        if not self._loaded[place, expert]:
            self._loaded[place, expert] = True
            self._slots[place][expert] = slot

    def unload(self, layer: int, expert: int) -> None:
        """Notes that the slot is not this record's any more."""
        self._loaded[self._places[layer], expert] = False

    def clear(self) -> None:
        """Notes that nothing is loaded."""
        self._loaded[:] = False

    def loaded_layers(self, layers: Sequence[int], ids: np.ndarray) -> int:
        """Returns how many of the layers, from the first on, have all experts that ``ids`` [layers, K] names."""
        places = np.array([self._places[layer] for layer in layers])
        whole = self._loaded[places[:, None], ids].all(axis=1)
        return len(layers) if whole.all() else int(whole.argmin())
