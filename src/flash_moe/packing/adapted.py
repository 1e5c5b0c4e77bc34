"""Prepares checkpoints of mlx-lm's families for packing: their records and all other weights."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map

from ..formats import Quantization
from ..models import AdaptedFiles
from ..models.adapted.expert_modules import parameters, quantization
from ..record import Part, RecordLayout
from .resident_files import resident_file
from .rounding import check_finite, without_tiny

_LAYER = re.compile(r"\.(\d+)\.")


class AdaptedRecords:
    """The records of a checkpoint, with one part per parameter, independent of the form of the files.

    Attributes:
        layouts: the record layouts, by layer.
    """

    def __init__(self, files: AdaptedFiles) -> None:
        self._stored, self._places = files.records(None).layouts, files.experts.places
        self.layouts = {}
        for layer, (_, switch) in enumerate(files.experts.modules):
            places = self._places[layer]
            parts = [(*key, places[key].part.dtype, places[key].shape or (1,)) for key, _ in parameters(switch)]
            self.layouts[layer] = RecordLayout.of(parts, quantization(switch))

    def prepare(self, layer: int, records: np.ndarray, linears: Collection[str] | None = None) -> np.ndarray:
        """Converts records [N, stride] uint8 from the form in the files to that of :attr:`layouts`.

        Args:
            linears: the linear layers to convert; None for all.
        """
        layout, places = self.layouts[layer], self._places[layer]
        if layout == self._stored[layer]:
            return records
        out = np.zeros((len(records), layout.stride), np.uint8)
        for part in (part for part in layout.parts if linears is None or part.linear in linears):
            values = np.ascontiguousarray(places[part.linear, part.name].of(records))
            out[:, part.offset : part.offset + part.nbytes] = values.reshape(len(records), -1).view(np.uint8)
        return out

    def stored_part(self, layer: int, part: Part) -> int:
        """Returns the index of the stored part that a part of :attr:`layouts` is made of."""
        return self._stored[layer].parts.index(self._places[layer][part.linear, part.name].part)

    def is_whole(self, layer: int, linear: str) -> bool:
        """Returns False: each part can be prepared without the others of its linear layer."""
        return False


class AdaptedResident:
    """The resident weights of a conversion, under mlx-lm's names; counterpart of
    :class:`.resident_files.ResidentFiles`.

    Args:
        floats: quantisation of float matrices, with mlx-lm's rules; None keeps them as floats.
        target: the layouts of the records to write, which config.json must describe.
    """

    def __init__(self, files: AdaptedFiles, floats: Quantization | None, target: Mapping[int, RecordLayout]) -> None:
        self._files = files
        self._section: dict[str, Any] = dict(files.quantization or {})
        self._floats: dict[str, mx.array] = {}  # what quantised weights are made of, by name
        experts = {
            f"{path}.{linear}": (layer, linear, quantization(switch).get(linear))
            for layer, (path, switch) in enumerate(files.experts.modules)
            for linear in target[layer].linears
        }
        if files.quantization is None and floats is not None:
            self._section = floats.to_json() | {"mode": floats.mode}
            self._quantize(files.network, floats, experts)
        for path, (layer, linear, old) in experts.items():
            if (new := target[layer].quantization.get(linear)) is not None and new != (old or floats):
                self._section[path] = new.to_json()
        self._arrays = files.resident
        files.network.update(tree_map(lambda _: mx.zeros(0), files.network.parameters()))  # frees evaluated arrays

    def groups(self) -> dict[str, list[str]]:
        """Returns the names for each output file: one file per decoder layer, and one for all other weights."""
        groups: dict[str, list[str]] = {}
        for name in sorted(self._arrays):
            layer = _LAYER.search(name)
            groups.setdefault(resident_file(None if layer is None else int(layer[1])), []).append(name)
        return groups

    @cached_property
    def _needed(self) -> dict[str, frozenset[Path]]:
        return self._files.resident_files()

    def files(self, name: str) -> frozenset[Path]:
        """Returns the files that contain the data of an array."""
        return self._needed[name] if name in self._needed else self._needed[f"{name.rpartition('.')[0]}.weight"]

    def nbytes(self) -> int:
        """Returns the total bytes of the files without headers. Call it before any group is converted."""
        return sum(array.nbytes for array in self._arrays.values())

    def config_section(self) -> dict[str, Any] | None:
        """Returns the quantisation section for config.json."""
        return self._section or None

    def converted(self, names: Iterable[str]) -> dict[str, mx.array]:
        """Returns the arrays to write for these names. Each name can be converted only once.

        Raises:
            NumericalError: an array is NaN or infinite.
        """
        out = {}
        for name in names:
            out[name] = self._arrays.pop(name)
            check_finite(self._floats.pop(name, out[name]), name)
        return out

    def _quantize(self, network: Any, q: Quantization, experts: Mapping[str, Any]) -> None:
        """Quantises as mlx_lm.convert does. The network's own settings for a module are written to config.json."""
        predicate = getattr(network, "quant_predicate", None)

        def wanted(path: str, m: nn.Module) -> Any:
            if path in experts or not hasattr(m, "to_quantized") or m.weight.shape[-1] % q.group_size:
                return False
            found = True if predicate is None else predicate(path, m)
            if isinstance(found, dict):
                self._section[path] = found
            if found:
                m.weight = m.weight if q.is_affine else without_tiny(m.weight)
                self._floats[f"{path}.weight"] = m.weight
            return found

        nn.quantize(network, q.group_size, q.bits, mode=q.mode, class_predicate=wanted)
