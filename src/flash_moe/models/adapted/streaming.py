"""The experts of a network of mlx-lm, streamed from the files of its checkpoint."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from threading import RLock
from typing import Any

import mlx.core as mx

from ...checkpoint.records import RecordTable
from ...checkpoint.safetensors import TensorInfo
from ...errors import ArgumentError, CheckpointError, ConfigError
from ...experts.opening import ExpertIO, open_store
from ...experts.store import ExpertStore
from ...formats import Quantization
from ...ops.experts import DTYPES
from .files import experts_per_token, tensors
from .library import module
from .sources import Key, Rows, Source, layer_records
from .switches import LayerStream, Streamed, stream

_FLOATS = (mx.float32, mx.bfloat16, mx.float16)


def stream_experts(
    model: Any, folder: str | os.PathLike[str], *, expert_io: ExpertIO = "auto", expert_cache: int = 0
) -> ExpertStore:
    """Has a model of mlx-lm read its routed experts from files when a token asks for them.

    Load the model with ``mlx_lm.load(folder, lazy=True)``, so that no expert is in memory before; all other weights are
    read here. Afterwards it is used as ever: with ``mlx_lm.generate``, ``batch_generate``, ``mlx_lm.server`` or a loop of
    your own, in any thread.
    Numbers stay the same bit for bit. It can no longer be trained, compiled as a whole or split over machines.

    Args:
        model: what ``mlx_lm.load`` or ``mlx_lm.utils.load_model`` returned.
        folder: the checkpoint that it was loaded from.
        expert_io: how experts are read, see :meth:`flash_moe.Model.load`.
        expert_cache: bytes of experts kept in memory beyond those of the current token.

    Returns:
        The store: its counters say what was read; ``close()`` it when the model is no longer used.

    Raises:
        ConfigError: mlx-lm is missing or too old, or the model has no experts in SwitchGLU or SwitchMLP modules.
        CheckpointError: the files do not hold the model's experts as it uses them.
        ArgumentError: an argument is out of range, or the model streams already.
    """
    path = Path(folder)
    found = switches(model)
    table = record_table(found, path)
    store = open_store(table, expert_io, experts_per_token(path) or 1, expert_cache)
    attach(found, store)
    mx.eval(model.parameters())  # read by this thread, they can be used by all
    return store


def switches(model: Any) -> list[tuple[str, Any]]:
    """Returns path and module of every expert module, in the order of the layers.

    Raises:
        ConfigError: there is none.
    """
    layers = module("models.switch_layers")
    found = [(path, m) for path, m in model.named_modules() if isinstance(m, (layers.SwitchGLU, layers.SwitchMLP))]
    if not found:
        raise ConfigError(
            f"{type(model).__module__} has no expert modules of mlx-lm's kinds SwitchGLU and SwitchMLP: there is nothing "
            "to stream; use mlx-lm as it is"
        )
    if any(isinstance(m, Streamed) for _, m in found):
        raise ArgumentError("the experts of this model are streamed already; load it again")
    return sorted(found, key=lambda item: [int(p) if p.isdigit() else -1 for p in item[0].split(".")])


def record_table(found: list[tuple[str, Any]], folder: Path) -> RecordTable:
    """Finds the records of all expert modules by the names of their parameters; reads headers only.

    Raises:
        CheckpointError: a parameter is not in the files, or there in another form.
    """
    held = tensors(folder)
    layouts, runs, states, counts = {}, {}, {}, set()
    for layer, (path, switch) in enumerate(found):
        sources = {key: _source(f"{path}.{'.'.join(key)}", array, held) for key, array in _parameters(switch)}
        layouts[layer], runs[layer] = layer_records(sources, _quantization(switch))
        states.update({info.file: info.state for source in sources.values() for info in source.infos})
        counts.add(next(iter(sources.values())).shape[0])
    if len(counts) != 1:
        raise CheckpointError(
            f"the layers have {sorted(counts)} experts, expected as many in each; use mlx-lm as it is"
        )
    return RecordTable(counts.pop(), layouts, False, states, runs)


def attach(found: list[tuple[str, Any]], store: ExpertStore) -> None:
    """Gives every expert module its experts out of the store."""
    turn = RLock()
    for layer, (_, switch) in enumerate(found):
        dtypes = {key: array.dtype for key, array in _parameters(switch)}
        stream(switch, LayerStream(store, layer, type(switch), dtypes, turn))


def _parameters(switch: Any) -> Iterator[tuple[Key, mx.array]]:
    """The parameters of the linear layers of experts, but not those of whatever else hangs on a module."""
    layers = module("models.switch_layers")
    for linear, m in switch.children().items():
        if isinstance(m, (layers.SwitchLinear, layers.QuantizedSwitchLinear)):
            for name, array in m.items():
                if isinstance(array, mx.array):
                    yield (linear, name), array


def _quantization(switch: Any) -> dict[str, Quantization]:
    return {
        linear: Quantization(m.bits, m.group_size, m.mode)
        for linear, m in switch.children().items()
        if isinstance(m, module("models.switch_layers").QuantizedSwitchLinear)
    }


def _source(name: str, array: mx.array, held: Mapping[str, TensorInfo]) -> Source:
    if (info := held.get(name)) is None:
        raise CheckpointError(f"{name} is in no file; convert the checkpoint with mlx_lm.convert")
    stored = DTYPES.get(info.dtype)
    same_type = stored == array.dtype or (stored in _FLOATS and array.dtype in _FLOATS)  # models may be cast
    if info.shape != array.shape or not same_type:
        raise CheckpointError(
            f"{info.file}: tensor {name!r} is {info.dtype} {list(info.shape)}, but the model has {array.dtype} "
            f"{list(array.shape)}; give the folder that the model was loaded from"
        )
    return Rows(info, info.dtype, info.shape)
