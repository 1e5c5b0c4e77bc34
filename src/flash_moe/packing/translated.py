"""Translates a checkpoint that another library has quantised to the form of mlx-lm, one weight file at a time.

mlx-lm's networks arrange weights by their names. So each tensor gets MLX's name and form: FP8 is converted to bfloat16,
and all other numbers stay the same. A translated file holds the matrices whose tensors are in the same files of the
source.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeAlias

import mlx.core as mx

from ..checkpoint.arrays import read_bytes
from ..checkpoint.folder import INDEX
from ..checkpoint.foreign import adopted, foreign_section, mlx_global_scale
from ..checkpoint.integers import IntegerForm, IntegerPart, check_order
from ..checkpoint.names import module_path
from ..checkpoint.quantization import QuantizationMap, StatedQuantization
from ..checkpoint.remote import ShardFolder, Shards
from ..checkpoint.safetensors import DTYPE_BITS, TensorInfo, build_header
from ..dtypes import DTYPES
from ..errors import CheckpointError
from ..models import AdaptedFiles, is_adapted
from ..models.adapted.headers import tensors
from ..models.config_json import read_config
from ..ops.foreign_weights import affine_of, from_fp8
from .requantize import as_bytes

Forms: TypeAlias = dict[str, tuple[str, tuple[int, ...]]]  # dtype and shape by name
_SECTIONS = ("quantization_config", "compression_config")
_OTHER_NAMES = (INDEX, "config.json", "hf_quant_config.json")


def needs_translation(folder: Path) -> bool:
    """Returns whether another library quantised a checkpoint in a form that mlx-lm does not load."""
    if not is_adapted(folder) or foreign_section(read_config(folder)) is None:
        return False
    try:
        AdaptedFiles.open(folder)
    except CheckpointError:
        return True
    return False


class LocalFiles:
    """A folder on this machine with the interface of :class:`.remote.Shards`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._names = sorted(file.name for file in folder.glob("*.safetensors"))

    def identity(self) -> dict[str, Any]:
        """Returns data that identifies this source."""
        states = {
            file.name: [file.stat().st_size, file.stat().st_mtime_ns]
            for file in (self._folder / name for name in ("config.json", *self._names))
        }
        return {"source": str(self._folder.resolve()), "files": states}

    def number(self, name: str) -> int:
        return self._names.index(name)

    @contextmanager
    def headers(self) -> Iterator[Path]:
        for name in self._names:
            check_order(self._folder / name)
        yield self._folder

    def keep_in(self, beside: Callable[[str], Path]) -> None:
        """Does nothing: no file is downloaded."""

    def space(self, names: Collection[str]) -> int:
        return 0

    def bring(self, names: Collection[str]) -> None:
        """Does nothing: the files are on this machine."""


@dataclass(frozen=True)
class _Matrix:
    """A unit of translation: a matrix with its scales, or a single other tensor.

    Attributes:
        parts: the source tensors, by MLX's name.
    """

    weight: str
    parts: Mapping[str, TensorInfo]

    @property
    def files(self) -> frozenset[str]:
        return frozenset(info.file.name for info in self.parts.values())

    @property
    def _is_fp8(self) -> bool:
        return len(self.parts) > 1 and self.parts[self.weight].dtype == "F8_E4M3"

    @property
    def forms(self) -> Forms:
        """Returns the forms of the translated tensors."""
        if self._is_fp8:
            return {self.weight: ("BF16", self.parts[self.weight].shape)}
        scalar = [name for name in self.parts if name.endswith(".global_scale")]
        return {
            name: (info.dtype, () if name in scalar and info.shape == (1,) else info.shape)
            for name, info in self.parts.items()
        }

    def translated(self) -> Iterator[Any]:
        """Yields the content of the tensors of :attr:`forms` as buffers."""
        stored = {name: mx.array(read_bytes(info)) for name, info in self.parts.items()}
        weight = self.parts[self.weight]
        if self._is_fp8:
            (scales,) = (n for n in self.parts if n != self.weight)
            dtype, shape = DTYPES[self.parts[scales].dtype], self.parts[scales].shape
            codes = stored[self.weight].reshape(-1, *weight.shape[-2:])
            each = stored[scales].view(dtype).reshape(len(codes), *(shape[-2:] if len(shape) > 1 else (1, 1)))
            for matrix, factors in zip(codes, each, strict=True):
                yield as_bytes(from_fp8(matrix, factors)).data
        elif isinstance(weight, IntegerPart):
            words, steps, zeros = (
                stored[name].view(DTYPES[dtype]).reshape(1, -1)
                for name, dtype in zip(self.parts, ("U32", list(self.parts.values())[1].dtype, "U32"), strict=True)
            )
            form = weight.form
            for array in affine_of(form.order, form.bits, form.zero, weight.shape[0], words, steps, zeros):
                yield as_bytes(array[0]).data
        else:
            for name, array in stored.items():
                if name.endswith(".global_scale"):
                    array = mlx_global_scale(self.parts[name].name, array.view(mx.float32))
                yield as_bytes(array).data


class Translation(ShardFolder):
    """The translated weight files of a checkpoint; counterpart of :class:`.remote.Shards`.

    Args:
        source: the source files.
        folder: folder with the headers of the source files.

    Raises:
        CheckpointError: MLX has no equivalent form for the weights.
    """

    def __init__(self, source: Shards | LocalFiles, folder: Path) -> None:
        self._source, self._from = source, folder
        raw = read_config(folder)
        section = foreign_section(raw) or {}
        form = IntegerForm.of(section)
        self._matrices: dict[str, list[_Matrix]] = {}
        matrices = _matrices(adopted(tensors(folder), section))
        for matrix in sorted(matrices, key=lambda m: m.weight):
            numbers = "_".join(f"{number:05d}" for number in sorted(map(source.number, matrix.files)))
            self._matrices.setdefault(f"model-{numbers}.safetensors", []).append(matrix)
        self._config = _plain(raw)
        quantized = next((m for m in matrices if len(m.parts) > 1 and len(m.forms) > 1), None)
        if quantized is not None:
            weight, scales = list(quantized.parts.values())[:2]
            stated = StatedQuantization(None if form is None else form.bits, None)
            q = QuantizationMap(stated, {}, shapes_decide=True).of([], weight, scales)
            self._config["quantization"] = q.to_json() | {"mode": q.mode}
        forms = {n: {p: form for m in mine for p, form in m.forms.items()} for n, mine in self._matrices.items()}
        self.headers_of = {name: build_header(mine, metadata={"format": "pt"}) for name, mine in forms.items()}
        self.sizes = {
            name: len(self.headers_of[name]) + sum(math.prod(s) * DTYPE_BITS[d] // 8 for d, s in mine.values())
            for name, mine in forms.items()
        }

    def number(self, name: str) -> int:
        return [*self._matrices].index(name)

    @contextmanager
    def headers(self) -> Iterator[Path]:
        """Yields a folder with the headers of the translated files, like :meth:`.Shards.headers`."""
        with TemporaryDirectory(prefix="flash-moe-translated-") as folder:
            self.folder = Path(folder)
            for file in self._from.iterdir():
                if file.is_file() and file.suffix != ".safetensors" and file.name not in _OTHER_NAMES:
                    shutil.copyfile(file, self.folder / file.name)
            (self.folder / "config.json").write_text(json.dumps(self._config))
            for name in self._matrices:
                self.make_hole(name)
            yield self.folder

    def keep_in(self, beside: Callable[[str], Path]) -> None:
        """Keeps files in folders that ``beside`` creates."""
        self.store = beside("translated")
        self._source.keep_in(beside)

    def space(self, names: Collection[str]) -> int:
        """Returns the bytes on the disk for these files, together with their source files."""
        return super().space(names) + self._source.space(self._sources(names))

    def get(self, names: Sequence[str]) -> None:
        """Creates these translated files."""
        self._source.bring(self._sources(names))
        for name in names:
            temporary = self.store / f"{name}.tmp"
            with temporary.open("wb") as stream:
                stream.write(self.headers_of[name])
                for matrix in self._matrices[name]:
                    for content in matrix.translated():
                        stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            temporary.replace(self.store / name)

    def _sources(self, names: Collection[str]) -> frozenset[str]:
        return frozenset[str]().union(*(matrix.files for name in names for matrix in self._matrices[name]))


def _matrices(found: Mapping[str, TensorInfo]) -> list[_Matrix]:
    matrices, done = [], set[str]()
    for scales in (name for name in found if name.endswith(".scales")):
        module = module_path(scales)
        weight = f"{module}.weight" if f"{module}.weight" in found else module
        names = [weight, scales, *(n for n in (f"{module}.biases", f"{module}.global_scale") if n in found)]
        matrices.append(_Matrix(weight, {name: found[name] for name in names}))
        done.update(names)
    return matrices + [_Matrix(name, {name: info}) for name, info in found.items() if name not in done]


def _plain(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Returns config.json without its quantisation sections."""
    plain = {key: value for key, value in raw.items() if key not in _SECTIONS}
    if isinstance(text := plain.get("text_config"), Mapping):
        plain["text_config"] = {key: value for key, value in text.items() if key not in _SECTIONS}
    return plain
