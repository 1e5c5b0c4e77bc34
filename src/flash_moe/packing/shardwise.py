"""Converts a repository on the hub shard by shard, so that the source need not fit on the disk beside the result.

What can be made of the weight files at hand is made: projections of experts, written to their places in the layers' files,
and always-read matrices, kept one by one until all of a layer are there. Then that is noted, and the next files take their
place. Two are on the disk at a time; more only where the parts of one matrix lie in more.
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

from ..checkpoint.integers import IntegerPart
from ..checkpoint.names import module_path
from ..checkpoint.packed import Manifest, PackedLayer, checksum, layer_file, layer_header
from ..checkpoint.records import Extent
from ..checkpoint.remote import Shards
from ..errors import ArgumentError, CheckpointError
from ..models import ModelFiles, is_adapted, open_model
from ..progress import Callback, Progress
from ..record import Part, RecordLayout
from ..share import Share
from .conversion import Widths, warnings
from .descriptions import file_checksum, save_arrays, write_descriptions
from .requantize import Rounding, adopt, changed_projections, rewritten, stored_part
from .resident_files import ResidentFiles
from .staging import Staging

Files = frozenset[str]


@dataclass
class _Work:
    """The work that needs a set of weight files.

    Attributes:
        experts: layer, expert, linear layer, and the parts of it that are made together with where they lie.
        resident: canonical names.
    """

    experts: list[tuple[int, int, str, list[tuple[Part, Extent]]]] = field(default_factory=list)
    resident: list[str] = field(default_factory=list)


def convert_shardwise(
    shards: Shards,
    destination: Path,
    widths: Widths,
    rounding: Rounding,
    options: Mapping[str, Any],
    share: Share,
    progress: Callback | None,
) -> list[str]:
    """Writes a packed copy of a repository; see :func:`.convert.convert`.

    Args:
        options: what else a conversion depends on; share: of the experts that is written.

    Raises:
        HubError: a file could not be had; starting again continues.
    """
    staging = Staging(destination, shards.identity() | dict(options))
    try:
        with shards.headers() as folder:
            conversion = _Conversion(shards, folder, staging, widths, rounding, share, progress)
            with staging.writing():
                conversion.run()
            return warnings(conversion.table.layouts, conversion.target)
    finally:
        staging.release()


class _Conversion:
    def __init__(
        self,
        shards: Shards,
        folder: Path,
        staging: Staging,
        widths: Widths,
        rounding: Rounding,
        share: Share,
        progress: Callback | None,
    ) -> None:
        self.shards, self.folder, self.staging = shards, folder, staging
        self.widths, self.rounding, self.progress = widths, rounding, progress
        if is_adapted(folder):
            raise ArgumentError(
                "this model runs on mlx-lm's network, and mlx-lm takes all files at once; pass keep=True (--keep), and it is "
                "downloaded before"
            )
        self.checkpoint, self.resident = self._open()
        self.table = self.checkpoint.records(share)
        if self.table.packed:
            raise CheckpointError(
                "this repository is packed already; run it as it is, or pass keep=True to requantise it"
            )
        self.target = widths.layouts(self.table.layouts, self.checkpoint.quantization.default is not None)
        self.groups = self.resident.groups()
        records = sum(layout.stride * len(self.table.experts(i)) for i, layout in self.target.items())
        self.total = records + self.resident.nbytes()

    def run(self) -> None:
        works = self._works()
        most = max(sum(self.shards.sizes[name] for name in files) for files in works)
        self.staging.require_space(self.total + most)
        self.staging.begin()
        self.layers, self.matrices = self.staging.beside("layers"), self.staging.beside("matrices")
        self.shards.store = self.staging.beside("source")
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
        write_descriptions(self.staging, self.checkpoint, self.resident.config_section(),
                           Manifest(self._finish_layers(), checksums, self.table.share), weight_map)  # fmt: skip
        self.staging.finish()

    def _open(self) -> tuple[ModelFiles, ResidentFiles]:
        checkpoint = open_model(self.folder, adopt=True)
        floats = self.widths.floats(checkpoint.quantization.default is not None)
        return checkpoint, ResidentFiles(checkpoint, floats, self.rounding)

    def _works(self) -> dict[Files, _Work]:
        """Returns all work, by the files that it needs."""
        works: dict[Files, _Work] = {}
        for layer, source in self.table.layouts.items():
            changed = changed_projections(source, self.target[layer])
            for expert in self.table.experts(layer):
                places = list(zip(source.parts, self.table.extents(layer, expert), strict=True))
                for linear in source.linears:
                    mine = [place for place in places if place[0].linear == linear]
                    ordered = stored_part(self.checkpoint, layer, linear, "weight")
                    whole = linear in changed or isinstance(ordered, IntegerPart)
                    for together in [mine] if whole else [[place] for place in mine]:
                        files = frozenset(extent.file.name for _, extent in together)
                        works.setdefault(files, _Work()).experts.append((layer, expert, linear, together))
        for name in (name for names in self.groups.values() for name in names):
            stored = self.checkpoint.resident
            infos, others = [stored[name]], ["scales"] if stored[name].dtype == "F8_E4M3" else []
            if isinstance(infos[0], IntegerPart):
                others = ["weight", "scales", "biases"]
            infos += [stored[f"{module_path(name)}.{part}"] for part in others]
            works.setdefault(frozenset(info.file.name for info in infos), _Work()).resident.append(name)
        return works

    def _do(self, work: _Work) -> None:
        with ExitStack() as stack:
            sources: dict[Path, Any] = {}
            targets = {i: stack.enter_context(self._layer(i)) for i in {layer for layer, *_ in work.experts}}
            for layer, expert, linear, places in work.experts:
                source, target = self.table.layouts[layer], self.target[layer]
                record = np.zeros(source.stride, np.uint8)
                for _, extent in places:
                    if extent.file not in sources:
                        sources[extent.file] = stack.enter_context(extent.file.open("rb"))
                    _read(sources[extent.file].fileno(), extent, record)
                start = len(self._header(layer)) + self.table.share.place(expert) * target.stride
                for part, data in self._made(layer, linear, places, record, source, target):
                    targets[layer].seek(start + part.offset)
                    targets[layer].write(data)
            for stream in targets.values():
                stream.flush()
                os.fsync(stream.fileno())
        if work.resident:
            _, resident = self._open()  # the files are others than when they were opened before
            for name in work.resident:
                arrays = resident.converted([name])
                temporary = self.matrices / f"{name}.tmp"
                save_arrays(temporary, arrays)
                temporary.replace(self.matrices / f"{name}.safetensors")

    def _made(
        self,
        layer: int,
        linear: str,
        places: list[tuple[Part, Extent]],
        record: np.ndarray,
        source: RecordLayout,
        target: RecordLayout,
    ) -> list[tuple[Part, np.ndarray]]:
        """Returns parts of the target, and their bytes."""
        if any(part.name in ("global_scale", "biases") for part, _ in places):
            adopt(self.checkpoint, layer, source, record[None], [linear])
        if linear not in changed_projections(source, target):
            found = {part.key: record[part.offset : part.offset + part.nbytes] for part, _ in places}
        else:
            found = next(iter(rewritten(mx.array(record.view(np.uint32))[None], source, target, linear, self.rounding)))
        return [(part, found[part.key]) for part in target.parts if part.key in found]

    def _layer(self, layer: int) -> Any:
        """Returns a layer's file as it grows, open for writing."""
        path, target = self.layers / layer_file(layer), self.target[layer]
        header = self._header(layer)
        size = len(header) + len(self.table.experts(layer)) * target.stride
        if not path.exists() or path.stat().st_size != size:
            with path.open("wb") as stream:
                stream.write(header)
                stream.truncate(size)
        return path.open("r+b")

    def _header(self, layer: int) -> bytes:
        return layer_header(len(self.table.experts(layer)), self.target[layer])

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
