"""Opens a checkpoint of another family as a model: mlx-lm's network with our stores for its experts."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_map_with_path

from ...checkpoint.packed import refuse_lost_manifest
from ...checkpoint.records import RecordTable
from ...checkpoint.safetensors import TensorInfo, check_unchanged, read_header
from ...checks import integer, is_default
from ...errors import ArgumentError, ConfigError
from ...experts.opening import ExpertIO, open_store
from ...nn.layer_work import LayerWork
from ...record import ExpertShape, RecordLayout
from ...share import WHOLE, Share
from ..config_json import read_config
from .adapted_network import AdaptedNetwork
from .expert_modules import ExpertModules, parameters, traced_from
from .headers import k_key, tensors, text_config
from .library import load_checked
from .work import held_bytes, layer_works

_OUTPUTS = {("down_proj", "weight"), ("fc2", "weight")}  # linear layers of SwitchGLU and SwitchMLP
_POSITIONS = 1 << 20  # if config.json does not state a context length


@dataclass(frozen=True)
class AdaptedConfig:
    """The dimensions of a model of another family.

    Attributes:
        num_experts_per_tok: the model's own K.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_experts: int
    num_experts_per_tok: int
    max_position_embeddings: int


@dataclass(frozen=True)
class AdaptedFiles:
    """A checkpoint of another family: mlx-lm's network without its weights, and the locations of its experts.

    Attributes:
        raw_config: the content of config.json.
        quantization: its quantisation section as mlx-lm interprets it; None for floats.
        held: the tensors in the files that mlx-lm reads.
        network: mlx-lm's network.
        experts_per_token: the K of the network.
    """

    folder: Path
    raw_config: Mapping[str, Any]
    quantization: Mapping[str, Any] | None
    held: Mapping[str, TensorInfo]
    dimensions: AdaptedConfig
    network: Any
    experts: ExpertModules
    experts_per_token: int
    head = "head"
    _works: dict[int, list[LayerWork]] = field(default_factory=dict, compare=False, repr=False)  # by size of a float

    @classmethod
    def open(cls, folder: Path, experts_per_token: int | None = None, dtype: mx.Dtype | None = None) -> AdaptedFiles:
        """Opens a folder. It reads only config.json and headers.

        Args:
            experts_per_token: K; None, or the default, means the model's own K.
            dtype: dtype of activations and resident weights; None means that of the files.

        Raises:
            ConfigError: mlx-lm is missing or too old, or has no expert modules in this network.
            CheckpointError: the files do not contain the tensors that the network needs.
            ArgumentError: K is out of range, or cannot be changed for this family.
        """
        refuse_lost_manifest(folder)
        raw = read_config(folder)
        changed, k = _chosen(raw, experts_per_token)
        held = tensors(folder)
        model, read = load_checked(folder, changed)
        if dtype is not None:
            _cast(model, dtype)
        experts = ExpertModules.of(model, folder)
        k = k or _attribute(model, raw, ("num_experts_per_tok", "moe_k", "top_k")) or 1
        config = AdaptedConfig(
            model_type=raw["model_type"],
            vocab_size=_needed(model, raw, ("vocab_size", "num_vocab")),
            hidden_size=_needed(model, raw, ("hidden_size", "model_dim")),
            num_hidden_layers=len(model.layers),
            num_experts=experts.table.num_experts,
            num_experts_per_tok=text_config(raw).get(k_key(raw) or "", k),
            max_position_embeddings=_attribute(model, raw, ("max_position_embeddings", "model_max_length"))
            or _POSITIONS,
        )
        return cls(folder, raw, read.get("quantization"), held, config, model, experts, k)

    @property
    def _heads(self) -> int:
        """Returns the total width of all attention heads."""
        heads = _attribute(self.network, self.raw_config, ("num_attention_heads", "n_head", "num_heads")) or 1
        width = _attribute(self.network, self.raw_config, ("head_dim", "v_head_dim")) or 0
        return heads * width or self.dimensions.hidden_size

    def records(self, share: Share | None = WHOLE) -> RecordTable:
        """Locates the records of the experts.

        Args:
            share: the share of the experts that is needed; None for all experts in the folder.

        Raises:
            CheckpointError: the folder contains another share.
        """
        return self.experts.table if share is None else self.experts.table.of_share(share)

    def identity(self) -> str:
        """Returns a digest of the model: config.json, record layouts, and resident weights with samples of their
        vectors.
        """
        table, resident = self.experts.table, sorted(self.resident.items())
        found = hashlib.blake2b(repr((self.raw_config, sorted(table.layouts.items()))).encode(), digest_size=8)
        for name, array in resident:
            found.update(f"{name} {array.dtype} {array.shape}".encode())
            if array.ndim == 1:
                found.update(np.array(array.view(mx.uint8)).tobytes())
        return found.hexdigest()

    @property
    def sum_widths(self) -> dict[int, int]:
        """The total width of the separate outputs of a token's experts, by layer."""
        widths = {}
        for layer, places in enumerate(self.experts.places):
            (rows,) = {place.shape[0] for (linear, name), place in places.items() if (linear, name) in _OUTPUTS}
            widths[layer] = self.experts_per_token * rows
        return widths

    @property
    def shape(self) -> ExpertShape:
        """The number and sizes of the routed experts, from the first layer."""
        layouts, known = self.experts.table.layouts, self.dimensions
        rows = next(iter(layouts[0].linears.values())).rows
        return ExpertShape(known.num_experts, known.num_experts_per_tok, known.hidden_size, rows, tuple(layouts))

    @property
    def stored_dtype(self) -> str:
        """The dtype of activations that the files suggest: ``"float32"``, ``"bfloat16"`` or ``"float16"``."""
        floats = (a.dtype for a in self.resident.values() if mx.issubdtype(a.dtype, mx.floating))
        return str(next(floats, mx.bfloat16)).rpartition(".")[2]

    def experts_for(self, wanted: int | None) -> int:
        """Returns K for a requested number. None and the default mean the model's own K."""
        return (
            self.experts_per_token if wanted is None else _chosen(self.raw_config, wanted)[1] or self.experts_per_token
        )

    def uses_cpu_kernels(self, layouts: Mapping[int, RecordLayout], experts_per_token: int, dtype: mx.Dtype) -> bool:
        """Returns False: mlx-lm's network runs through MLX."""
        return False

    def held_bytes(self, float_bytes: int) -> dict[str, int]:
        """Returns the bytes of the resident weights in memory, by layer and for :attr:`head`."""
        return held_bytes(self.resident, float_bytes)

    def layer_work(self, layer: int, float_bytes: int) -> LayerWork:
        """Returns the work of a layer in addition to its weights; a float in activations has ``float_bytes`` bytes."""
        if float_bytes not in self._works:
            self._works[float_bytes] = layer_works(self.network, self._heads, float_bytes)
        return self._works[float_bytes][layer]

    def check_resident(self, layouts: Mapping[int, RecordLayout]) -> None:
        """Does nothing: opening the files has checked the weights."""

    @property
    def metadata(self) -> dict[Path, Mapping[str, str]]:
        """The safetensors metadata of each file with resident weights."""
        return {file: read_header(file).metadata for file in sorted({info.file for info in self.held.values()})}

    @property
    def resident(self) -> dict[str, mx.array]:
        """The resident weights as lazy arrays, by their names in the network."""
        mine = {f"{path}.{'.'.join(key)}" for path, switch in self.experts.modules for key, _ in parameters(switch)}
        return {name: array for name, array in tree_flatten(self.network.parameters()) if name not in mine}

    @property
    def resident_bytes(self) -> int:
        """The bytes of the resident weights."""
        return sum(array.nbytes for array in self.resident.values())

    def reopened(self) -> AdaptedFiles:
        """Opens the same checkpoint again, with weights from the current files."""
        return replace(self, network=load_checked(self.folder, {})[0])

    def resident_files(self) -> dict[str, frozenset[Path]]:
        """Returns the files that contain the data of each array in :attr:`resident`. It reads only headers."""
        return {name: found.files for name, found in traced_from(self.folder, self.network, [*self.resident]).items()}

    def load(
        self,
        expert_io: ExpertIO,
        expert_cache: int,
        progress: Callable[[int, int], None] | None = None,
        share: Share = WHOLE,
    ) -> AdaptedNetwork:
        """Reads the resident weights and opens the expert store, without reading experts. Call it only once.

        Args:
            expert_io, expert_cache: see :meth:`flash_moe.Model.load`.
            progress: function that is called with the bytes that the resident store has read, and the total.
            share: the share of the experts in the store.

        Raises:
            CheckpointError: a file has changed since its header was read.
            ArgumentError: an argument is out of range.
        """
        table = self.records(share)
        report = None if progress is None else lambda done: progress(done, table.nbytes)
        store = open_store(table, expert_io, self.experts_per_token, expert_cache, report)
        try:
            shared = self.experts.attach(store)
            mx.eval(self.network.parameters())
            check_unchanged(self.held.values())
        except BaseException:
            store.close()
            raise
        return AdaptedNetwork(self.network, store, shared)


def _chosen(raw: Mapping[str, Any], wanted: int | None) -> tuple[dict[str, Any], int | None]:
    """Returns the entries of config.json that another K changes, and K; None if config.json does not state K."""
    key, text = k_key(raw), text_config(raw)
    own = None if key is None else text[key]
    if wanted is None or is_default(wanted):
        return {}, own
    if key is None:
        raise ArgumentError(
            f"experts_per_token is {wanted}, but config.json of this {raw['model_type']} does not say by a known name how "
            "many experts a token uses; leave it out"
        )
    try:
        k = integer("experts_per_token", wanted, 1, own)
    except ArgumentError as error:
        raise ArgumentError(f"{error}, the model's own number") from None
    return ({key: k} if text is raw else {"text_config": {**text, key: k}}), k


def _cast(model: Any, dtype: mx.Dtype) -> None:
    """Casts weights as mlx_lm.convert does: weights that the network needs in float32 are not cast."""
    allowed = getattr(model, "cast_predicate", lambda path: True)

    def cast(path: str, array: mx.array) -> mx.array:
        return array.astype(dtype) if allowed(path) and mx.issubdtype(array.dtype, mx.floating) else array

    model.update(tree_map_with_path(cast, model.parameters()))


def _attribute(model: Any, raw: Mapping[str, Any], names: tuple[str, ...]) -> int | None:
    """Returns the first of these entries in config.json, or else in the network's arguments, which include defaults."""
    text, language = text_config(raw), getattr(model, "language_model", None)
    owners = (getattr(owner, name, None) for owner in (model, language) for name in ("args", "config"))
    filled = [getattr(args, "text_config", args) for args in owners]
    for name in names:
        for owner in (text, raw, *filled):
            value = owner.get(name) if isinstance(owner, Mapping) else getattr(owner, name, None)
            if type(value) is int and value > 0:
                return value
    return None


def _needed(model: Any, raw: Mapping[str, Any], names: tuple[str, ...]) -> int:
    if (value := _attribute(model, raw, names)) is None:
        raise ConfigError(f"config.json lacks {names[0]!r}; is it the original file?")
    return value
