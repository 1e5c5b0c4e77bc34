"""The interface of a family of models, and a checkpoint that is read by its rules."""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..checkpoint.arrays import read_arrays
from ..checkpoint.folder import Checkpoint
from ..checkpoint.foreign import mlx_global_scale
from ..checkpoint.integers import IntegerPart
from ..checkpoint.names import canonical_name, module_path
from ..checkpoint.records import RecordTable
from ..checkpoint.safetensors import check_unchanged
from ..checks import resolve_experts_per_token
from ..config import ModelConfig
from ..dtypes import DTYPES
from ..experts.store import ExpertStore
from ..formats import Quantization
from ..machines.sums import Sums
from ..nn.cpu_choice import uses_cpu_kernels
from ..nn.decoder import Decoder
from ..nn.layer_work import LayerWork, layer_work
from ..nn.layerwise import Layerwise
from ..nn.needed_kernels import needed_kernels
from ..nn.network import Dimensions
from ..nn.streaming_options import PLAIN, StreamingOptions
from ..nn.timed import TimedLayer
from ..nn.weights import Weights
from ..ops.dispatch import Case
from ..ops.foreign_weights import affine_of, from_fp8
from ..record import RecordLayout
from ..share import WHOLE, Share

_SAMPLE = 4096  # bytes of a weight that its identity takes


@dataclass(frozen=True)
class ResidentWeights:
    """Arrays by canonical name, and how each quantised module is quantised."""

    arrays: Mapping[str, mx.array]
    quantization: Mapping[str, Quantization]


@dataclass(frozen=True)
class ModelFiles(Checkpoint):
    """A checkpoint folder of a known family.

    Attributes:
        family: whose conventions its weights follow.
        config: the dimensions of its network.
    """

    family: Family
    config: ModelConfig

    @classmethod
    def open_as(cls, family: Family, folder: Path, raw: Mapping[str, Any], *, adopt: bool = False) -> ModelFiles:
        """Opens a folder as a checkpoint of ``family``; arguments are those of :meth:`Checkpoint.open`."""
        config = family.config(raw)
        return cls.open(
            folder, raw, config.experts, names=family.canonical_name, adopt=adopt, family=family, config=config
        )

    @property
    def dimensions(self) -> Dimensions:
        """What is known of the model outside of its network."""
        return self.config

    @property
    def stored_dtype(self) -> str:
        """The dtype of activations that the files suggest: ``"float32"``, ``"bfloat16"`` or ``"float16"``."""
        stored = self.resident["norm.weight"].dtype if "norm.weight" in self.resident else "BF16"
        return {"F32": "float32", "F16": "float16"}.get(stored, "bfloat16")

    def experts_for(self, wanted: int | None) -> int:
        """Returns K where ``wanted`` is asked for; see :func:`~flash_moe.checks.resolve_experts_per_token`."""
        return resolve_experts_per_token(wanted, self.config.num_experts_per_tok)

    @property
    def head(self) -> str:
        """The canonical path of the matrix that turns hidden states into logits."""
        return "embed_tokens" if self.config.tie_word_embeddings else "lm_head"

    def layer_work(self, layer: int, float_bytes: int) -> LayerWork:
        """Returns what a layer takes beside its weights, with activations of ``float_bytes`` bytes."""
        return layer_work(self.config, layer, float_bytes)

    def held_bytes(self, float_bytes: int) -> dict[str, int]:
        """Returns bytes that each tensor but the experts' takes in memory, with activations of ``float_bytes`` bytes."""
        sizes = {"U32": 4, "U8": 1}
        return {
            name: math.prod(info.shape)
            * (4 if name.endswith(self.family.float32) else sizes.get(info.dtype, float_bytes))
            for name, info in self.resident.items()
        }

    def uses_cpu_kernels(
        self,
        layouts: Mapping[int, RecordLayout],
        experts_per_token: int,
        dtype: mx.Dtype,
        kernels: bool | None = None,
    ) -> bool:
        """Returns whether the network runs through the kernels of the CPU; see
        :func:`~.nn.cpu_choice.uses_cpu_kernels`.
        """
        return uses_cpu_kernels(self.config, layouts, experts_per_token, dtype, kernels)

    def layerwise(self, dtype: mx.Dtype) -> Layerwise:
        """Returns the network one layer at a time, each read when it is used."""
        resident = self.load_resident(dtype)
        return Layerwise(self.config, resident.arrays, resident.quantization)

    def timed_layer(
        self, layer: int, arrays: Mapping[str, mx.array], store: ExpertStore, experts_per_token: int, dtype: mx.Dtype
    ) -> TimedLayer:
        """Returns a layer by itself, with these arrays for its stored ones."""
        cpu = self.uses_cpu_kernels(store.layouts, experts_per_token, dtype)
        found = self.family.in_one_convention(self, arrays, dtype, cpu)
        weights = Weights(found.arrays, found.quantization, join=not cpu).at("layers").at(layer)
        arguments = self.config, layer, weights, store, experts_per_token, dtype
        if not cpu:
            return TimedLayer(*arguments)
        from ..nn.cpu_timed import CpuTimedLayer

        return CpuTimedLayer(*arguments)

    def records(self, share: Share | None = WHOLE) -> RecordTable:
        """Where the experts' records are; reads headers only.

        Args:
            share: of the experts that are needed; None for what the folder holds.

        Raises:
            CheckpointError: a layer's experts are missing, incomplete, or of the wrong dtype or shape.
        """
        table = self.family.records(self)
        return table if share is None else table.of_share(share)

    def read_resident(self) -> dict[str, mx.array]:
        """Returns all weights but the routed experts, lazily, as stored; FP8 as what it stands for, integers in MLX's
        order.

        Raises:
            CheckpointError: a tensor has a dtype that no weight has.
        """
        arrays = read_arrays(self)
        for name, info in self.resident.items():
            if info.dtype == "F8_E4M3":
                arrays[name] = from_fp8(arrays[name], arrays.pop(f"{module_path(name)}.scales"))
            elif name.endswith(".global_scale"):
                arrays[name] = mlx_global_scale(info.name, arrays[name])
            elif isinstance(info, IntegerPart) and name.endswith(".weight"):
                names = [name, *(f"{module_path(name)}.{part}" for part in ("scales", "biases"))]
                weight, scales, zeros = (arrays[part].reshape(1, -1) for part in names)
                form, rows = info.form, info.shape[0]
                made = affine_of(form.order, form.bits, form.zero, rows, weight, scales, zeros.view(mx.uint32))
                arrays.update(zip(names, (array[0] for array in made), strict=True))
        return arrays

    def load_resident(self, dtype: mx.Dtype, keep_matrices: bool = False) -> ResidentWeights:
        """Returns all weights but the routed experts, in one convention; see :meth:`Family.in_one_convention`.

        Raises:
            CheckpointError: a tensor has a dtype that no weight has, lacks its quantisation, or has an impossible shape.
        """
        return self.family.in_one_convention(self, self.read_resident(), dtype, keep_matrices)

    @property
    def sum_widths(self) -> dict[int, int]:
        """Numbers that a token's experts add up to, by layer."""
        return dict.fromkeys(self.shape.layers, self.shape.hidden_size)

    def identity(self, layouts: Mapping[int, RecordLayout]) -> str:
        """Returns a digest of the model: dimensions, forms of the records, and how each always-read weight begins."""
        found = hashlib.blake2b(repr((self.config, sorted(layouts.items()))).encode(), digest_size=8)
        for name, info in sorted(self.resident.items()):
            found.update(f"{name} {info.dtype} {info.shape}".encode())
            with info.file.open("rb") as file:
                file.seek(info.offset)
                found.update(file.read(min(info.nbytes, _SAMPLE)))
        return found.hexdigest()

    def kernel_cases(
        self,
        layouts: Mapping[int, RecordLayout],
        experts_per_token: int,
        dtype: mx.Dtype,
        streaming: StreamingOptions = PLAIN,
        sums: Sums | None = None,
    ) -> list[Case]:
        """Returns the cases of all kernels that the network could use; only headers are needed.

        Args:
            layouts: of the records, by layer.

        Raises:
            CheckpointError: as :meth:`load_network`.
        """
        empty = {name: mx.zeros(info.shape, dtype=DTYPES[info.dtype]) for name, info in self.resident.items()}
        found = self.family.in_one_convention(self, empty, dtype)
        weights = Weights(found.arrays, found.quantization)
        return needed_kernels(self.config, weights, layouts, experts_per_token, dtype, streaming, sums)

    def load_network(
        self,
        store: ExpertStore,
        experts_per_token: int,
        dtype: mx.Dtype,
        progress: Callable[[int], None] | None = None,
        kernels: bool | None = None,
        streaming: StreamingOptions = PLAIN,
        threads: int | None = None,
        sums: Sums | None = None,
    ) -> Decoder:
        """Returns the network with its resident weights in memory; arguments are those of
        :class:`~.nn.decoder.Decoder`.

        Raises:
            CheckpointError: a weight is missing, malformed or does not belong to the others, or a file was changed meanwhile.
        """
        cpu = self.uses_cpu_kernels(store.layouts, experts_per_token, dtype, kernels)
        resident = self.load_resident(dtype, keep_matrices=cpu)
        weights = Weights(resident.arrays, resident.quantization, join=not cpu)
        try:
            decoder = Decoder(self.config, weights, store, experts_per_token, dtype, progress, kernels, streaming, sums)
        except RuntimeError:
            check_unchanged(self.resident.values())  # it may say that a file ends too early
            raise
        check_unchanged(self.resident.values())
        if cpu:
            decoder.run_on_cpu(threads)
        return decoder


class Family(ABC):
    """The conventions of a family's checkpoints.

    Attributes:
        model_types: what config.json calls it.
        float32: endings of names of arrays that stay in float32 whatever the activations have.
    """

    model_types: tuple[str, ...]
    float32: tuple[str, ...] = ()

    @abstractmethod
    def config(self, raw: Mapping[str, Any]) -> ModelConfig:
        """Reads the dimensions from the content of config.json.

        Raises:
            ConfigError: it describes a model that cannot be run.
        """

    def canonical_name(self, name: str) -> str | None:
        """Turns a name of the files into a canonical one; None for tensors that text decoding does not need."""
        return canonical_name(name)

    def records(self, files: ModelFiles) -> RecordTable:
        """Finds the experts' records; see :meth:`ModelFiles.records`."""
        return RecordTable.of(files)

    @abstractmethod
    def in_one_convention(
        self, files: ModelFiles, stored: Mapping[str, mx.array], dtype: mx.Dtype, keep_matrices: bool = False
    ) -> ResidentWeights:
        """Brings arrays as ``files`` stores them, all or those of some layers, to what the network takes.

        Floating point arrays are cast to ``dtype``; with ``keep_matrices`` those of matrices stay as they are stored.

        Raises:
            CheckpointError: a tensor lacks its quantisation, or has an impossible shape.
        """

    @abstractmethod
    def mlx_name(self, canonical: str) -> str:
        """Returns the name that mlx-lm gives to a canonical one."""

    @abstractmethod
    def mlx_array(self, files: ModelFiles, name: str, array: mx.array) -> mx.array:
        """Returns a stored array as mlx-lm would store it."""
