"""Streams the experts of a network of mlx-lm from the files of its checkpoint."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from ...checkpoint.foreign import foreign_section
from ...checkpoint.packed import Manifest
from ...checkpoint.records import RecordTable
from ...dtypes import DTYPES
from ...errors import ArgumentError, CheckpointError, ConfigError
from ...experts.opening import ExpertIO, open_store
from ...experts.store import ExpertStore
from ...formats import Quantization
from ..config_json import read_config
from .headers import experts_per_token, tensors
from .library import expert_modules, module, modules_of
from .stored_arrays import Key, Place, StoredArray, layer_records
from .switches import LayerStream, Shared, Streamed, stream
from .tracing import Computed, Found, traced

_FLOATS = (mx.float32, mx.bfloat16, mx.float16)
_CONVERT = "convert the checkpoint with mlx_lm.convert"


def stream_experts(
    model: Any, folder: str | os.PathLike[str], *, expert_io: ExpertIO = "auto", expert_cache: int = 0
) -> ExpertStore:
    """Makes a model of mlx-lm read its routed experts from files when a token needs them.

    Load the model with ``mlx_lm.load(folder, lazy=True)``, so that its experts are not in memory yet. This function
    reads all other weights. Afterwards, use the model as before: with ``mlx_lm.generate``, ``batch_generate``,
    ``mlx_lm.server`` or your own loop, in any thread. The results stay the same bit for bit. The model can no longer be
    trained, compiled as a whole or split over machines.

    Args:
        model: the result of ``mlx_lm.load`` or ``mlx_lm.utils.load_model``.
        folder: the checkpoint of the model, or its conversion by :func:`flash_moe.convert`.
        expert_io: how experts are read, see :meth:`flash_moe.Model.load`.
        expert_cache: bytes of memory for experts beyond those of the current token.

    Returns:
        The store, which has counters of reads. Call ``close()`` on it when you no longer use the model.

    Raises:
        ConfigError: mlx-lm is missing or too old, or the model has no experts in SwitchGLU or SwitchMLP modules.
        CheckpointError: the files do not contain the model's experts in a usable form.
        ArgumentError: an argument is out of range, or the model already streams its experts.
    """
    path = Path(folder)
    experts = ExpertModules.of(model, path)
    store = open_store(experts.table, expert_io, experts_per_token(path) or 1, expert_cache)
    experts.attach(store)
    mx.eval(model.parameters())  # evaluated in this thread, so that all threads can use them
    return store


@dataclass(frozen=True)
class ExpertModules:
    """The expert modules of a network, in the order of the layers, and the locations of their parameters.

    Attributes:
        modules: path and module of each expert module.
        table: the records of the experts.
        places: the places of the parameters in a record.
    """

    modules: Sequence[tuple[str, Any]]
    table: RecordTable
    places: Sequence[Mapping[Key, Place]]

    @classmethod
    def of(cls, model: Any, folder: Path) -> ExpertModules:
        """Locates the records of a network in a packed or other checkpoint. It reads only headers.

        Raises:
            ConfigError: the network has no expert modules.
            CheckpointError: a parameter is not in the files, or has another shape or dtype there.
            ArgumentError: the experts are already streamed.
        """
        found = modules(model)
        counts = {next(array for _, array in parameters(switch)).shape[0] for _, switch in found}
        if len(counts) != 1:
            raise CheckpointError(
                f"the layers have {sorted(counts)} experts, expected as many in each; use mlx-lm as it is"
            )
        if (manifest := Manifest.load(folder)) is not None:
            modules_of(model, manifest)
            return cls(found, *_packed(found, folder, manifest, counts.pop()))
        sources = _sources(model, found, folder)
        layouts, runs, places, states = {}, {}, [], {}
        for layer, ((_, switch), mine) in enumerate(zip(found, sources, strict=True)):
            layouts[layer], runs[layer], where = layer_records(mine, quantization(switch))
            places.append(where)
            states.update({s.info.file: s.info.state for source in mine.values() for s in source.slices})
        return cls(found, RecordTable(counts.pop(), layouts, False, states, runs), places)

    @property
    def nbytes(self) -> int:
        """The bytes of all parameters of the expert modules."""
        return sum(array.nbytes for _, switch in self.modules for _, array in parameters(switch))

    def attach(self, store: ExpertStore) -> Shared:
        """Makes every module fetch its experts from a store. Returns the state that all modules share."""
        shared = Shared()
        for layer, (_, switch) in enumerate(self.modules):
            dtypes = {key: array.dtype for key, array in parameters(switch)}
            stream(switch, LayerStream(store, layer, type(switch), self.places[layer], dtypes, shared))
        return shared


def modules(model: Any) -> list[tuple[str, Any]]:
    """Returns the path and the module of every expert module, in the order of layers."""
    found = expert_modules(model)
    if not found:
        raise ConfigError(
            f"{type(model).__module__} has no expert modules of mlx-lm's kinds SwitchGLU and SwitchMLP: there is nothing "
            "to stream; use mlx-lm as it is"
        )
    if any(isinstance(m, Streamed) for _, m in found):
        raise ArgumentError("the experts of this model are streamed already; load it again")
    return found


def parameters(switch: Any) -> Iterator[tuple[Key, mx.array]]:
    """Yields the parameters of the linear layers of experts, without other parameters of a module."""
    layers = module("models.switch_layers")
    for linear, m in switch.children().items():
        if isinstance(m, (layers.SwitchLinear, layers.QuantizedSwitchLinear)):
            for name, array in m.items():
                if isinstance(array, mx.array):
                    yield (linear, name), array


def quantization(switch: Any) -> dict[str, Quantization]:
    """Returns the quantisation of the quantised linear layers of an expert module."""
    return {
        linear: Quantization(m.bits, m.group_size, m.mode)
        for linear, m in switch.children().items()
        if isinstance(m, module("models.switch_layers").QuantizedSwitchLinear)
    }


def _packed(
    found: Sequence[tuple[str, Any]], folder: Path, manifest: Manifest, experts: int
) -> tuple[RecordTable, list[dict[Key, Place]]]:
    table, places = RecordTable.packed_in(folder, manifest.layers, experts, manifest.share), []
    for layer, (path, switch) in enumerate(found):
        parts = {(part.linear, part.name): part for part in table.layouts[layer].parts}
        mine = {}
        for key, array in parameters(switch):
            part, shape = parts.get(key), array.shape[1:]
            where = f"{path}.{'.'.join(key)}"
            if part is None or part.shape != (shape or (1,)) or not _fits(DTYPES[part.dtype], array.dtype):
                there = "not there" if part is None else f"{part.dtype} {list(part.shape)}"
                raise CheckpointError(
                    f"{where} is {there} in the records of {folder}, but the model has {array.dtype} {list(shape)}; "
                    "convert the model again"
                )
            mine[key] = Place.whole(part, shape)
        places.append(mine)
    return table, places


def traced_from(folder: Path, model: Any, wanted: Sequence[str]) -> dict[str, Found]:
    """Returns the sources of parameters of a network, without parameters that the network creates itself.

    Raises:
        CheckpointError: mlx-lm cannot map the files to the network's weights.
    """
    held = tensors(folder)
    stored: dict[str, mx.array] = {}
    for file in sorted({info.file for info in held.values()}):
        stored.update(mx.load(str(file)))  # type: ignore[arg-type]
    try:
        return traced(getattr(model, "sanitize", dict), held, stored, wanted)
    except Exception as error:  # any error of a network of mlx-lm about weights that it cannot arrange
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise CheckpointError(f"mlx-lm cannot arrange the weights of {folder}: {reason:.500}; {_CONVERT}") from error


def _sources(model: Any, found: Sequence[tuple[str, Any]], folder: Path) -> list[dict[Key, StoredArray]]:
    names = [f"{path}.{'.'.join(key)}" for path, switch in found for key, _ in parameters(switch)]
    traces = traced_from(folder, model, names)
    return [
        {
            key: _checked(name := f"{path}.{'.'.join(key)}", traces.get(name), array, folder)
            for key, array in parameters(switch)
        }
        for path, switch in found
    ]


def _checked(name: str, source: Found | None, array: mx.array, folder: Path) -> StoredArray:
    if source is None:
        raise CheckpointError(f"{name} is in no file of {folder}; {_CONVERT}")
    if isinstance(source, Computed):
        remedy = _CONVERT if foreign_section(read_config(folder)) is None else "run `flash-moe convert` first"
        raise CheckpointError(
            f"mlx-lm computes {name} while loading {folder} ({source.operation}), so it cannot be streamed; {remedy}"
        )
    if source.shape != array.shape or not _fits(source.dtype, array.dtype):
        info = source.slices[0].info
        raise CheckpointError(
            f"{info.file}: tensor {info.name!r} gives {name} as {source.dtype} {list(source.shape)}, but the model has "
            f"{array.dtype} {list(array.shape)}; give the folder that the model was loaded from"
        )
    return source


def _fits(stored: mx.Dtype, wanted: mx.Dtype) -> bool:
    """Returns whether the dtypes are equal or both floats, because models may be cast."""
    return stored == wanted or (stored in _FLOATS and wanted in _FLOATS)
