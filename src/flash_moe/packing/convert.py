"""Converts a checkpoint to the packed form, one layer at a time."""

from __future__ import annotations

import errno
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..checkpoint.files import INDEX, Checkpoint
from ..checkpoint.packed import MANIFEST, Manifest, PackedLayer, checksum, layer_file, layer_header
from ..checkpoint.records import RecordTable
from ..config import ModelConfig
from ..errors import CheckpointError, DiskSpaceError
from ..experts.reader import RecordReader
from ..record import Quantization, RecordLayout
from .requantize import changed_projections, requantize, target_formats
from .resident import ResidentFiles, save_arrays
from .staging import Staging

_log = logging.getLogger(__name__)
_COPIED = ("generation_config.json", "tokenizer*", "special_tokens_map.json", "vocab.json", "merges.txt",
           "added_tokens.json", "chat_template*", "LICENSE*")  # fmt: skip
_GROUP_BYTES = 64 << 20  # source bytes of the records converted together
Progress = Callable[[int, int], None]


def convert(
    source: Path,
    destination: Path,
    *,
    bits: int | None = None,
    group_size: int = 64,
    progress: Progress | None = None,
) -> list[str]:
    """Writes a packed copy of a checkpoint.

    Experts whose bits and group size stay the same are copied byte for byte. Memory stays below one layer's. The work
    can be killed at any moment: the destination appears when it is complete, and starting again continues.

    Args:
        source: folder of an MLX-quantised, Hugging Face float or packed checkpoint.
        destination: folder to make; must not exist.
        bits: of the experts: 2, 3, 4, 5, 6 or 8. None keeps quantised experts as they are and makes floats 4-bit.
        group_size: weights per scale where something is quantised: 32, 64 or 128.
        progress: called as ``progress(done, total)`` in bytes of the destination.

    Returns:
        Warnings about the result, for people.

    Raises:
        ConfigError, CheckpointError: the source cannot be read, or the destination exists.
        DiskSpaceError: the destination would not fit; nothing was written.
    """
    checkpoint = Checkpoint.open(source)
    table = RecordTable.of(checkpoint)
    wanted = None if bits is None else Quantization(bits, group_size)
    floats = Quantization(4, group_size)
    target = {
        i: RecordLayout.build(layout.hidden_size, layout.intermediate_size, target_formats(layout, wanted, floats))
        for i, layout in table.layouts.items()
    }
    resident = ResidentFiles(checkpoint, Quantization(max(bits or 4, 4), group_size))
    plan = _sources(checkpoint, table) | {"bits": bits, "group_size": group_size}
    _Conversion(checkpoint, table, target, resident, Staging(destination, plan), progress).run()
    return _warnings(table, target)


def _sources(checkpoint: Checkpoint, table: RecordTable) -> dict[str, Any]:
    """What identifies the source; when any of it changes, a half-done conversion is of no use."""
    files = {checkpoint.folder / "config.json", *checkpoint.folder.glob(MANIFEST), *checkpoint.metadata}
    files |= {extent.file for layer in table.layouts for extent in table.extents(layer, 0)}
    states = {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in sorted(files)}
    return {"source": str(checkpoint.folder.resolve()), "files": states}


def _warnings(table: RecordTable, target: dict[int, RecordLayout]) -> list[str]:
    for i, layout in table.layouts.items():
        for name in changed_projections(layout, target[i]):
            old, new = layout.formats[name].quantization, target[i].formats[name].quantization
            if old is not None and new is not None:
                return [
                    f"the experts were requantised from {old.bits} to {new.bits} bits: rounding twice loses far more than "
                    "quantising the original weights once; convert from the bf16 checkpoint if you can"
                ]
    return []


class _Conversion:
    """One run of the conversion over its staging folder."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        table: RecordTable,
        target: dict[int, RecordLayout],
        resident: ResidentFiles,
        staging: Staging,
        progress: Progress | None,
    ) -> None:
        self.checkpoint, self.table, self.target, self.resident = checkpoint, table, target, resident
        self.config: ModelConfig = checkpoint.config
        self.staging, self.progress = staging, progress
        self.done = 0
        records = sum(layout.stride for layout in target.values()) * self.config.num_experts
        self.total = records + resident.nbytes()

    def run(self) -> None:
        self.staging.require_space(self.total)
        try:
            self.staging.begin()
            checksums, weight_map = self._write_resident()
            layers = self._write_layers()
            self._write_descriptions(Manifest(layers, checksums), weight_map)
            self.staging.finish()
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):  # somebody else filled the disk meanwhile
                raise DiskSpaceError(
                    f"the disk of {self.staging.folder} is full; make room and start again: it continues where it stopped"
                ) from error
            raise CheckpointError(f"writing {self.staging.folder} failed: {error}; start again to continue") from error

    def _advance(self, nbytes: int) -> None:
        self.done += nbytes
        if self.progress is not None:
            self.progress(min(self.done, self.total), self.total)

    def _write_resident(self) -> tuple[dict[str, str], dict[str, str]]:
        checksums: dict[str, str] = {}
        weight_map: dict[str, str] = {}
        for name, arrays in self.resident.groups():
            if not arrays:
                continue
            nbytes = sum(array.nbytes for array in arrays.values())
            if (receipt := self.staging.receipt(name)) is None:
                temporary = self.staging.temporary(name)
                save_arrays(temporary, arrays)
                receipt = {"checksum": file_checksum(temporary)}
                self.staging.commit(name, receipt)
            checksums[name] = receipt["checksum"]
            weight_map |= dict.fromkeys(arrays, name)
            self._advance(nbytes)
        return checksums, weight_map

    def _write_layers(self) -> dict[int, PackedLayer]:
        layers = {}
        reader = RecordReader(self.table)
        try:
            for i, layout in self.target.items():
                name = layer_file(i)
                if (receipt := self.staging.receipt(name)) is None:
                    _log.info("packing the experts of layer %d", i)
                    receipt = {"checksums": self._write_layer(reader, i, self.staging.temporary(name))}
                    self.staging.commit(name, receipt)
                else:
                    self._advance(layout.stride * self.config.num_experts)
                layers[i] = PackedLayer(name, layout, tuple(receipt["checksums"]))
        finally:
            reader.close()
        return layers

    def _write_layer(self, reader: RecordReader, layer: int, path: Path) -> list[str]:
        source, target = self.table.layouts[layer], self.target[layer]
        experts, checksums = self.config.num_experts, []
        step = max(1, _GROUP_BYTES // source.stride)
        bank = mx.zeros((min(step, experts), source.stride // 4), dtype=mx.uint32)
        mx.eval(bank)
        buffers = np.array(bank, copy=False).view(np.uint8)
        with path.open("wb") as stream:
            stream.write(layer_header(experts, target))
            for start in range(0, experts, step):
                group = range(start, min(start + step, experts))
                reader.read_all(layer, group, list(buffers[: len(group)]))
                for record in requantize(bank[: len(group)], source, target):
                    checksums.append(checksum(record.data))
                    stream.write(record.data)
                    self._advance(target.stride)
        return checksums

    def _write_descriptions(self, manifest: Manifest, weight_map: dict[str, str]) -> None:
        config: dict[str, Any] = dict(self.checkpoint.raw_config)
        config.pop("quantization_config", None)
        if (section := self.resident.config_section()) is not None:
            config["quantization"] = section
        for pattern in _COPIED:
            for file in self.checkpoint.folder.glob(pattern):
                shutil.copyfile(file, self.staging.folder / file.name)
        self.staging.write_text(INDEX, json.dumps({"metadata": {}, "weight_map": weight_map}))
        self.staging.write_text("config.json", json.dumps(config, indent=2))
        self.staging.write_text(MANIFEST, manifest.dump())


def file_checksum(path: Path) -> str:
    """The checksum of a whole file."""
    with path.open("rb") as stream:
        return checksum(stream.read())
