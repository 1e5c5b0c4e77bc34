"""Tables of the slot of each expert for the device, and the set of loaded experts for the host."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np


class SlotTables:
    """A table per layer with the slot of every expert, in an array that the host changes in place.

    No running computation may read a table while it changes. So the host changes tables only after all work of a token
    that runs ahead has been evaluated.

    Args:
        layers: indices of the layers with routed experts.
        experts: number of experts per layer.
    """

    def __init__(self, layers: Sequence[int], experts: int) -> None:
        self._places = {layer: i for i, layer in enumerate(layers)}
        self._loaded = np.zeros((len(layers), experts), bool)
        self._arrays = [mx.zeros(experts, dtype=mx.uint32) for _ in layers]
        mx.eval(self._arrays)
        self._slots = [np.array(array, copy=False) for array in self._arrays]

    def of(self, layer: int) -> mx.array:
        """Returns the slots of a layer's experts, [E] uint32. An expert that is not loaded has an arbitrary slot."""
        return self._arrays[self._places[layer]]

    def load(self, layer: int, expert: int, slot: int) -> None:
        """Marks a record as loaded in a slot."""
        place = self._places[layer]
        if not self._loaded[place, expert]:
            self._loaded[place, expert] = True
            self._slots[place][expert] = slot

    def unload(self, layer: int, expert: int) -> None:
        """Marks a record as not loaded."""
        self._loaded[self._places[layer], expert] = False

    def clear(self) -> None:
        """Marks all records as not loaded."""
        self._loaded[:] = False

    def loaded_layers(self, layers: Sequence[int], ids: np.ndarray) -> int:
        """Returns the number of layers, from the first one, whose experts in ``ids`` [layers, K] are all loaded."""
        places = np.array([self._places[layer] for layer in layers])
        whole = self._loaded[places[:, None], ids].all(axis=1)
        return len(layers) if whole.all() else int(whole.argmin())
