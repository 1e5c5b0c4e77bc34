"""The interface of a family of models, and a checkpoint that is read with the rules of its family."""

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
from ..nn.needed_kernels import check_weights, needed_kernels
from ..nn.network import Dimensions
from ..nn.streaming_options import PLAIN, StreamingOptions
from ..nn.timed import TimedLayer
from ..nn.weights import Weights
from ..ops.dispatch import Case
from ..ops.foreign_weights import affine_of, from_fp8
from ..record import RecordLayout
from ..share import WHOLE, Share

_SAMPLE = 4096  # bytes of each weight that the identity covers


@dataclass(frozen=True)
class ResidentWeights:
    """The resident arrays by canonical name, and the quantisation of each quantised module."""

    arrays: Mapping[str, mx.array]
    quantization: Mapping[str, Quantization]


@dataclass(frozen=True)
class ModelFiles(Checkpoint):
    """A checkpoint folder of a known family.

    Attributes:
        family: the family, which defines the conventions of the weights.
        config: the dimensions of its network.
    """

    family: Family
    config: ModelConfig

    @classmethod
    def open_as(cls, family: Family, folder: Path, raw: Mapping[str, Any], *, adopt: bool = False) -> ModelFiles:
        """Opens a folder as a checkpoint of ``family``. The arguments are those of :meth:`Checkpoint.open`."""
        config = family.config(raw)

        def names(name: str) -> str | None:
            return config.used(family.canonical_name(name))

        return cls.open(folder, raw, config.experts, names=names, adopt=adopt, family=family, config=config)

    @property
    def dimensions(self) -> Dimensions:
        """The dimensions that code outside the network uses."""
        return self.config

    @property
    def stored_dtype(self) -> str:
        """The dtype of activations that the files suggest: ``"float32"``, ``"bfloat16"`` or ``"float16"``."""
        stored = self.resident["norm.weight"].dtype if "norm.weight" in self.resident else "BF16"
        return {"F32": "float32", "F16": "float16"}.get(stored, "bfloat16")

    def experts_for(self, wanted: int | None) -> int:
        """Returns K for a requested number; see :func:`~flash_moe.checks.resolve_experts_per_token`."""
        return resolve_experts_per_token(wanted, self.config.num_experts_per_tok)

    @property
    def head(self) -> str:
        """The canonical path of the output head."""
        return "embed_tokens" if self.config.tie_word_embeddings else "lm_head"

    def layer_work(self, layer: int, float_bytes: int) -> LayerWork:
        """Returns the work of a layer in addition to its weights; a float in activations has ``float_bytes`` bytes."""
        return layer_work(self.config, layer, float_bytes)

    def held_bytes(self, float_bytes: int) -> dict[str, int]:
        """Returns the bytes of each resident tensor in memory; a float in activations has ``float_bytes`` bytes."""
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
        """Returns whether the network runs through the CPU kernels; see :func:`~.nn.cpu_choice.uses_cpu_kernels`."""
        return uses_cpu_kernels(self.config, layouts, experts_per_token, dtype, kernels)

    def layerwise(self, dtype: mx.Dtype) -> Layerwise:
        """Returns the network for use one layer at a time; each layer is read on use."""
        resident = self.load_resident(dtype)
        return Layerwise(self.config, resident.arrays, resident.quantization)

    def timed_layer(
        self, layer: int, arrays: Mapping[str, mx.array], store: ExpertStore, experts_per_token: int, dtype: mx.Dtype
    ) -> TimedLayer:
        """Returns a single layer that uses the given arrays instead of stored ones."""
        cpu = self.uses_cpu_kernels(store.layouts, experts_per_token, dtype)
        found = self.family.in_one_convention(self, arrays, dtype, cpu)
        weights = Weights(found.arrays, found.quantization, join=not cpu).at("layers").at(layer)
        arguments = self.config, layer, weights, store, experts_per_token, dtype
        if not cpu:
            return TimedLayer(*arguments)
        from ..nn.cpu_timed import CpuTimedLayer

        return CpuTimedLayer(*arguments)

    def records(self, share: Share | None = WHOLE) -> RecordTable:
        """Locates the records of the experts. It reads only headers.

        Args:
            share: the share of the experts that is needed; None for all experts in the folder.

        Raises:
            CheckpointError: the experts of a layer are missing or incomplete, or have the wrong dtype or shape.
        """
        table = self.family.records(self)
        return table if share is None else table.of_share(share)

    def read_resident(self) -> dict[str, mx.array]:
        """Returns all resident weights as lazy arrays in their stored form, with FP8 dequantised and integers in MLX's
        order.

        Raises:
            CheckpointError: a tensor has an unsupported dtype.
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
        """Returns all resident weights in the convention of the network; see :meth:`Family.in_one_convention`.

        Raises:
            CheckpointError: a tensor has an unsupported dtype or an invalid shape, or its quantisation is missing.
        """
        return self.family.in_one_convention(self, self.read_resident(), dtype, keep_matrices)

    @property
    def sum_widths(self) -> dict[int, int]:
        """The width of the sum of a token's experts, by layer."""
        return dict.fromkeys(self.shape.layers, self.shape.hidden_size)

    def identity(self, layouts: Mapping[int, RecordLayout]) -> str:
        """Returns a digest of the model: dimensions, record layouts, and the first bytes of each resident weight."""
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
        """Returns the cases of all kernels that the network could use. It reads only headers.

        Args:
            layouts: the record layouts, by layer.

        Raises:
            CheckpointError: see :meth:`load_network`.
        """
        weights = self._described(dtype)
        return needed_kernels(self.config, weights, layouts, experts_per_token, dtype, streaming, sums)

    def check_resident(self, layouts: Mapping[int, RecordLayout], stored: Mapping[str, mx.array] | None = None) -> None:
        """Checks that the network has its weights, from headers or ``stored``, the result of :meth:`read_resident`.

        Its errors are those of :meth:`load_network`.
        """
        check_weights(self.config, self._described(mx.float32, stored), layouts)

    def _described(self, dtype: mx.Dtype, stored: Mapping[str, mx.array] | None = None) -> Weights:
        if stored is None:
            stored = {name: mx.zeros(info.shape, dtype=DTYPES[info.dtype]) for name, info in self.resident.items()}
        found = self.family.in_one_convention(self, stored, dtype)
        return Weights(found.arrays, found.quantization)

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
        """Loads the resident weights and returns the network. The arguments are those of :class:`~.nn.decoder.Decoder`.

        Raises:
            CheckpointError: a weight is missing or malformed or does not match the others, or a file changed meanwhile.
        """
        cpu = self.uses_cpu_kernels(store.layouts, experts_per_token, dtype, kernels)
        resident = self.load_resident(dtype, keep_matrices=cpu)
        weights = Weights(resident.arrays, resident.quantization, join=not cpu)
        try:
            decoder = Decoder(self.config, weights, store, experts_per_token, dtype, progress, kernels, streaming, sums)
        except RuntimeError:
            check_unchanged(self.resident.values())  # the error may be that a file ends too early
            raise
        check_unchanged(self.resident.values())
        if cpu:
            decoder.run_on_cpu(threads)
        return decoder


class Family(ABC):
    """The conventions of a family's checkpoints.

    Attributes:
        model_types: values of ``model_type`` in config.json.
        float32: suffixes of names of arrays that stay in float32 regardless of the dtype of activations.
    """

    model_types: tuple[str, ...]
    float32: tuple[str, ...] = ()

    @abstractmethod
    def config(self, raw: Mapping[str, Any]) -> ModelConfig:
        """Reads the dimensions from the content of config.json.

        Raises:
            ConfigError: config.json describes a model that cannot be run.
        """

    def canonical_name(self, name: str) -> str | None:
        """Maps a name in the files to the canonical name; None for tensors that text decoding does not need."""
        return canonical_name(name)

    def records(self, files: ModelFiles) -> RecordTable:
        """Locates the records of the experts; see :meth:`ModelFiles.records`."""
        return RecordTable.of(files)

    @abstractmethod
    def in_one_convention(
        self, files: ModelFiles, stored: Mapping[str, mx.array], dtype: mx.Dtype, keep_matrices: bool = False
    ) -> ResidentWeights:
        """Converts stored arrays, of all or some layers, to the convention of the network.

        Float arrays are cast to ``dtype``. With ``keep_matrices``, matrices keep their stored dtype.

        Raises:
            CheckpointError: the quantisation of a tensor is missing, or its shape is invalid.
        """

    @abstractmethod
    def mlx_name(self, canonical: str) -> str:
        """Returns mlx-lm's name for a canonical name."""

    @abstractmethod
    def mlx_array(self, files: ModelFiles, name: str, array: mx.array) -> mx.array:
        """Converts a stored array to the form of mlx-lm."""
