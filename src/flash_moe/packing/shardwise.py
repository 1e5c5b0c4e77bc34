"""Converts a repository on the hub shard by shard, so that the disk need not hold source and result together.

From the weight files on the disk, it converts as much as possible. Projections of experts are written to their places
in the files of the layers. Resident matrices are kept one by one until a layer is complete. Then the progress is
recorded, and the next files replace these. At most two files are on the disk at a time, unless the parts of one matrix
are in more files.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..checkpoint.packed import Manifest, PackedLayer, checksum, layer_file, layer_header
from ..checkpoint.records import Extent
from ..checkpoint.remote import ShardFolder, Shards
from ..errors import CheckpointError
from ..progress import Callback, Progress
from ..record import Part
from ..share import Share
from .conversion import Widths, open_source, warnings
from .descriptions import file_checksum, save_arrays, write_descriptions
from .requantize import Rounding, changed_projections, rewritten
from .staging import Staging
from .translated import LocalFiles, Translation, needs_translation

Files = frozenset[str]


@dataclass
class _Work:
    """The work that needs a set of weight files.

    Attributes:
        experts: for each layer, expert and linear layer, the parts that are converted together, with the locations of
            their data.
        resident: names of resident weights.
    """

    experts: list[tuple[int, int, str, list[Part], list[Extent]]] = field(default_factory=list)
    resident: list[str] = field(default_factory=list)


def convert_shardwise(
    shards: Shards | LocalFiles,
    destination: Path,
    widths: Widths,
    rounding: Rounding,
    options: Mapping[str, Any],
    share: Share,
    progress: Callback | None,
) -> list[str]:
    """Converts a repository to the packed form; see :func:`.convert.convert`.

    Args:
        options: further options that the conversion depends on. share: the share of the experts to write.

    Raises:
        HubError: a file could not be downloaded; call again to continue.
    """
    staging = Staging(destination, shards.identity() | dict(options))
    try:
        with ExitStack() as stack:
            folder = stack.enter_context(shards.headers())
            files: ShardFolder | LocalFiles = shards
            if needs_translation(folder):
                files = translation = Translation(shards, folder)
                folder = stack.enter_context(translation.headers())
            conversion = _ShardwiseConversion(files, folder, staging, widths, rounding, share, progress)
            with staging.writing():
                conversion.run()
            return warnings(conversion.source)
    finally:
        staging.release()


class _ShardwiseConversion:
    def __init__(
        self,
        shards: ShardFolder | LocalFiles,
        folder: Path,
        staging: Staging,
        widths: Widths,
        rounding: Rounding,
        share: Share,
        progress: Callback | None,
    ) -> None:
        self.shards, self.staging = shards, staging
        self.rounding, self.progress = rounding, progress
        self.source = open_source(folder, widths, rounding, share)
        self.table, self.target = self.source.table, self.source.target
        if self.table.packed:
            raise CheckpointError(
                "this repository is packed already; run it as it is, or pass keep=True to requantise it"
            )
        self.groups = self.source.resident.groups()
        records = sum(layout.stride * len(self.table.experts(i)) for i, layout in self.target.items())
        self.total = records + self.source.resident.nbytes()

    def run(self) -> None:
        works = self._works()
        most = max(self.shards.space(files) for files in works)
        self.staging.require_space(self.total + most)
        self.staging.begin()
        self.layers, self.matrices = self.staging.beside("layers"), self.staging.beside("matrices")
        self.shards.keep_in(self.staging.beside)
        for done, files in enumerate(sorted(works, key=sorted), start=1):
            note = "shards-" + "-".join(str(self.shards.number(name)) for name in sorted(files))
            if not self.staging.noted(note):
                self.shards.bring(files)
                self._do(works[files])
                self.staging.note(note)
            if self.progress is not None:
                self.progress(Progress("convert", done * self.total // len(works), self.total, "bytes"))
        self.shards.bring(())
        checksums, weight_map = self._finish_resident()
        section, manifest = (
            self.source.resident.config_section(),
            Manifest(self._finish_layers(), checksums, self.table.share),
        )
        write_descriptions(self.staging, self.source.checkpoint, section, manifest, weight_map)
        self.staging.finish()

    def _works(self) -> dict[Files, _Work]:
        """Returns all work, by the set of files that it needs."""
        works: dict[Files, _Work] = {}
        for layer in self.table.layouts:
            units = list(self.source.units(layer))
            for expert in self.table.experts(layer):
                extents = self.table.extents(layer, expert)
                for linear, parts, indices in units:
                    mine = [extents[i] for i in indices]
                    files = frozenset(extent.file.name for extent in mine)
                    works.setdefault(files, _Work()).experts.append((layer, expert, linear, parts, mine))
        for name in (name for names in self.groups.values() for name in names):
            files = frozenset(file.name for file in self.source.resident.files(name))
            works.setdefault(files, _Work()).resident.append(name)
        return works

    def _do(self, work: _Work) -> None:
        with ExitStack() as stack:
            sources: dict[Path, Any] = {}
            targets = {i: stack.enter_context(self._layer(i)) for i in {layer for layer, *_ in work.experts}}
            for layer, expert, linear, parts, extents in work.experts:
                record, target = np.zeros(self.table.layouts[layer].stride, np.uint8), self.target[layer]
                for extent in extents:
                    if extent.file not in sources:
                        sources[extent.file] = stack.enter_context(extent.file.open("rb"))
                    _read(sources[extent.file].fileno(), extent, record)
                start = len(self._header(layer)) + self.table.share.place(expert) * target.stride
                for part, data in self._made(layer, linear, parts, record):
                    targets[layer].seek(start + part.offset)
                    targets[layer].write(data)
            for stream in targets.values():
                stream.flush()
                os.fsync(stream.fileno())
        if work.resident:
            resident = self.source.reopened()  # other files than at the previous opening
            for name in work.resident:
                arrays = resident.converted([name])
                temporary = self.matrices / f"{name}.tmp"
                save_arrays(temporary, arrays)
                temporary.replace(self.matrices / f"{name}.safetensors")

    def _made(self, layer: int, linear: str, parts: list[Part], record: np.ndarray) -> list[tuple[Part, np.ndarray]]:
        """Returns the target parts, with their bytes, for parts of a converted record."""
        source, target = self.source.records.layouts[layer], self.target[layer]
        (record,) = self.source.records.prepare(layer, record[None], [linear])
        if linear not in changed_projections(source, target):
            found = {part.key: record[part.offset : part.offset + part.nbytes] for part in parts}
        else:
            words = mx.array(record.view(np.uint32))[None]
            found = next(iter(rewritten(words, source, target, linear, self.rounding, self.source.losses)))
        return [(part, found[part.key]) for part in target.parts if part.key in found]

    def _layer(self, layer: int) -> Any:
        """Returns the unfinished file of a layer, open for writing."""
        path, target = self.layers / layer_file(layer), self.target[layer]
        header = self._header(layer)
        size = len(header) + len(self.table.experts(layer)) * target.stride
        if not path.exists() or path.stat().st_size != size:
            with path.open("wb") as stream:
                stream.write(header)
                stream.truncate(size)
        return path.open("r+b")

    def _header(self, layer: int) -> bytes:
        return layer_header(layer, len(self.table.experts(layer)), self.target[layer])

    def _finish_resident(self) -> tuple[dict[str, str], dict[str, str]]:
        checksums: dict[str, str] = {}
        weight_map: dict[str, str] = {}
        for file, names in self.groups.items():
            if (receipt := self.staging.receipt(file)) is None:
                if not names:
                    continue
                arrays: dict[str, Any] = {}
                for name in names:
                    arrays.update(mx.load(str(self.matrices / f"{name}.safetensors")))  # type: ignore[arg-type]
                save_arrays(self.staging.temporary(file), arrays)
                receipt = {"checksum": file_checksum(self.staging.temporary(file)), "tensors": sorted(arrays)}
                self.staging.commit(file, receipt)
            for name in names:
                (self.matrices / f"{name}.safetensors").unlink(missing_ok=True)
            checksums[file] = receipt["checksum"]
            weight_map |= dict.fromkeys(receipt["tensors"], file)
        return checksums, weight_map

    def _finish_layers(self) -> dict[int, PackedLayer]:
        layers = {}
        for i, target in self.target.items():
            name = layer_file(i)
            if (receipt := self.staging.receipt(name)) is None:
                grown = self.layers / name
                path = grown if grown.exists() else self.staging.folder / name
                with path.open("rb") as stream:
                    stream.seek(len(self._header(i)))
                    checksums = [checksum(stream.read(target.stride)) for _ in self.table.experts(i)]
                receipt = {"checksums": checksums}
                self.staging.adopt(path, name, receipt)
            layers[i] = PackedLayer(name, target, tuple(receipt["checksums"]))
        return layers


def _read(fd: int, extent: Extent, record: np.ndarray) -> None:
    data = os.pread(fd, extent.nbytes, extent.offset)
    if len(data) != extent.nbytes:
        raise CheckpointError(f"{extent.file} ends early; start again to get it once more")
    record[extent.at : extent.at + extent.nbytes] = np.frombuffer(data, np.uint8)
