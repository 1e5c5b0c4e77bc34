"""Converts a checkpoint to the packed form, one layer at a time."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import mlx.core as mx
import numpy as np

from ..checkpoint.hub import resolve
from ..checkpoint.integers import check_order
from ..checkpoint.packed import Manifest, PackedLayer, checksum, layer_file, layer_header
from ..checkpoint.remote import Shards
from ..errors import ArgumentError, HubError
from ..experts.host_memory import new_bank
from ..experts.reader import RecordReader
from ..models import AdaptedFiles, is_adapted
from ..progress import Callback, Progress, ProgressOption, following
from ..share import WHOLE, Share
from .calibration import Calibration
from .conversion import Mode, Source, Widths, fingerprint, identity, open_source, warnings
from .descriptions import file_checksum, save_arrays, write_descriptions
from .requantize import Rounding, changed_projections, requantize
from .shardwise import convert_shardwise
from .staging import Staging
from .translated import LocalFiles, needs_translation

_log = logging.getLogger(__name__)
_GROUP_BYTES = 64 << 20  # source bytes of records that are converted together


def convert(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    bits: int | None = None,
    expert_bits: int | None = None,
    down_bits: int | None = None,
    group_size: int = 64,
    mode: Mode | None = None,
    rounding: Rounding = "search",
    calibration: Sequence[Sequence[int]] | None = None,
    share: str | None = None,
    keep: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
    progress: ProgressOption = True,
) -> list[str]:
    """Converts a checkpoint to the packed form.

    Experts with unchanged bits and group size are copied byte for byte. Memory use stays below the size of one layer.
    You can interrupt the conversion at any time and call it again to continue. The destination appears when it is
    complete.

    Args:
        source: folder of a checkpoint, or a repository on the hub ("org/name"): quantised by MLX, floats, packed, or
            quantised by other libraries (Qwen's own FP8, compressed-tensors, ModelOpt, Quark, GPTQ, AWQ). FP8 is
            converted to floats first; NVFP4, MXFP4, MXFP8 and integers keep their values.
        destination: folder to create; it must not exist.
        bits: 2, 3, 4, 5, 6 or 8. Floats outside the experts get at least 4. None keeps the bits of quantised weights
            and quantises floats to 4 bits.
        expert_bits: bits of the experts; None means ``bits``.
        down_bits: bits of the experts' down projections, which affect quality most; None means ``expert_bits``.
        group_size: weights per scale for quantised matrices: 32, 64 or 128.
        mode: ``"mxfp4"``, ``"nvfp4"`` or ``"mxfp8"`` selects one of these modes of MLX, with fixed bits and group size,
            for everything except routers and gates. None or ``"affine"`` uses ``bits``.
        rounding: ``"search"`` searches for the scales and biases with the smallest error; ``"nearest"`` takes those of
            MLX.
        calibration: token ids of texts, for instance from :func:`flash_moe.evaluation.calibration_tokens`. Each expert
            is quantised for its inputs in these texts. None rounds each weight separately.
        share: "I/N" writes only the experts of rank I in a group of N machines (see docs/machines.md). None writes all.
        keep: whether to download a repository completely to the hub's cache and keep it there. Otherwise, it is
            converted shard by shard, with at most two of its files on the disk at a time; FP8 for a network of mlx-lm
            also needs a translated file of twice a shard's size. A calibration needs the complete repository.
        revision, token: as for :func:`.hub.resolve`.
        progress: whether to report the progress, in bytes of the destination; see :meth:`flash_moe.Model.load`.

    Returns:
        Warnings for the user about the result.

    Raises:
        ConfigError, CheckpointError: the source cannot be read, or the destination exists.
        ArgumentError: the rounding or the share is invalid, or the calibration is empty or has no effect.
        DiskSpaceError: the destination does not fit on the disk. Nothing was written.
        NumericalError: weights, or activations of the calibration, are NaN or infinite.
    """
    destination = Path(destination)
    widths = Widths(bits, expert_bits, down_bits, group_size, mode)
    if rounding not in get_args(Rounding):
        raise ArgumentError(f"rounding is {rounding!r}, expected one of {', '.join(get_args(Rounding))}")
    part = WHOLE if share is None else Share.parse(share)
    options: dict[str, Any] = {
        "bits": [bits, expert_bits, down_bits],
        "group_size": group_size,
        "mode": mode,
        "rounding": rounding,
        "calibration": calibration and fingerprint(calibration),
    }
    if not part.is_whole:
        options["share"] = str(part)
        if calibration is not None:
            raise ArgumentError(
                f"a calibration runs all experts, but share is {share!r}; convert the whole model, and then that with a share"
            )
    try:
        folder = resolve(
            source, revision=revision, token=token, local_files_only=not keep and calibration is None, progress=progress
        )
    except HubError:
        if keep or calibration is not None:
            raise
        shards: Shards | LocalFiles = Shards(os.fspath(source), revision=revision, token=token)
    else:
        shards = LocalFiles(folder)
    if calibration is None and (isinstance(shards, Shards) or needs_translation(folder)):
        with following(progress) as report:
            return convert_shardwise(shards, destination, widths, rounding, options, part, report)
    if calibration is not None and is_adapted(folder):
        raise ArgumentError(
            "this model runs on mlx-lm's network, and a calibration needs one of flash_moe's own; leave it out"
        )
    opened = open_source(folder, widths, rounding, part)
    for file in opened.checkpoint.metadata:
        check_order(file)
    calibrated = None
    if calibration is not None:
        if not any(changed_projections(layout, opened.target[i]) for i, layout in opened.records.layouts.items()):
            raise ArgumentError(
                "no expert is to be quantised, so calibration changes nothing; say to how many bits, or leave it out"
            )
        if rounding == "nearest" or mode not in (None, "affine"):
            what = f"mode {mode!r}" if rounding != "nearest" else "rounding 'nearest'"
            raise ArgumentError(f"{what} takes no calibration; leave one of the two out")
        assert not isinstance(opened.checkpoint, AdaptedFiles)
        calibrated = Calibration(opened.checkpoint, opened.table, opened.target, calibration)
    staging = Staging(destination, identity(opened.checkpoint, opened.table) | options)
    try:
        with following(progress) as report:
            _WholeConversion(opened, staging, rounding, calibrated, report).run()
    finally:
        staging.release()
    return warnings(opened)


class _WholeConversion:
    """One run of a conversion in its staging folder."""

    def __init__(
        self,
        source: Source,
        staging: Staging,
        rounding: Rounding,
        calibration: Calibration | None,
        progress: Callback | None,
    ) -> None:
        self.source, self.table = source, source.table
        self.target, self.resident = source.target, source.resident
        self.staging, self.progress = staging, progress
        self.rounding, self.calibration = rounding, calibration
        self.done = 0
        records = sum(layout.stride * len(self.table.experts(i)) for i, layout in self.target.items())
        self.total = records + self.resident.nbytes()

    def run(self) -> None:
        saved = 0 if self.calibration is None else 2 * self.calibration.nbytes  # briefly those of two layers
        self.staging.require_space(self.total + saved)
        with self.staging.writing():
            self.staging.begin()
            checksums, weight_map = self._write_resident()
            layers = self._write_layers()
            section, manifest = self.resident.config_section(), Manifest(layers, checksums, self.table.share)
            write_descriptions(self.staging, self.source.checkpoint, section, manifest, weight_map)
            self.staging.finish()

    def _advance(self, nbytes: int) -> None:
        self.done += nbytes
        if self.progress is not None:
            self.progress(Progress("convert", min(self.done, self.total), self.total, "bytes"))

    def _write_resident(self) -> tuple[dict[str, str], dict[str, str]]:
        checksums: dict[str, str] = {}
        weight_map: dict[str, str] = {}
        for name, members in self.resident.groups().items():
            if (receipt := self.staging.receipt(name)) is None:
                arrays = self.resident.converted(members)
                temporary = self.staging.temporary(name)
                save_arrays(temporary, arrays)
                nbytes = sum(array.nbytes for array in arrays.values())
                receipt = {"checksum": file_checksum(temporary), "tensors": list(arrays), "bytes": nbytes}
                self.staging.commit(name, receipt)
                del arrays
            checksums[name] = receipt["checksum"]
            weight_map |= dict.fromkeys(receipt["tensors"], name)
            self._advance(receipt["bytes"])
        return checksums, weight_map

    def _write_layers(self) -> dict[int, PackedLayer]:
        if self.calibration is not None:
            self._begin_calibration(self.calibration)
        layers = {}
        reader = RecordReader(self.table)
        following = dict(zip(self.target, [*self.target][1:], strict=False))
        try:
            for i, layout in self.target.items():
                name = layer_file(i)
                if (receipt := self.staging.receipt(name)) is None:
                    _log.info("packing the experts of layer %d", i)
                    if self.calibration is not None:
                        self.calibration.enter(i)
                    receipt = {"checksums": self._write_layer(reader, i, self.staging.temporary(name))}
                    if self.calibration is not None:
                        self.calibration.leave()
                        if i in following:
                            self.staging.save(_states(following[i]), self.calibration.states())
                    self.staging.commit(name, receipt)
                    self.staging.discard(_states(i))
                else:
                    self._advance(layout.stride * len(self.table.experts(i)))
                layers[i] = PackedLayer(name, layout, tuple(receipt["checksums"]))
        finally:
            reader.close()
        return layers

    def _begin_calibration(self, calibration: Calibration) -> None:
        """Continues with the saved inputs of the first unfinished layer.

        If they are lost, all layers are converted again.
        """
        unfinished = next((i for i in self.target if self.staging.receipt(layer_file(i)) is None), None)
        if unfinished is None:
            return
        if (states := self.staging.saved(_states(unfinished))) is not None:
            calibration.resume(unfinished, states)
            return
        for i in self.target:
            self.staging.forget(layer_file(i))
        calibration.begin()

    def _write_layer(self, reader: RecordReader, layer: int, path: Path) -> list[str]:
        source, target = self.source.records.layouts[layer], self.target[layer]
        experts, checksums, stride = self.table.experts(layer), list[str](), self.table.layouts[layer].stride
        step = max(1, _GROUP_BYTES // stride)
        bank = new_bank(min(step, len(experts)), stride // 4)
        buffers = np.array(bank, copy=False).view(np.uint8)
        with path.open("wb") as stream:
            stream.write(layer_header(layer, len(experts), target))
            for start in range(0, len(experts), step):
                group = experts[start : start + step]
                reader.read_all(layer, group, list(buffers[: len(group)]))
                read = buffers[: len(group)]
                prepared = self.source.records.prepare(layer, read)
                words = bank[: len(group)] if prepared is read else mx.array(prepared.view(np.uint32))
                if self.calibration is not None:
                    rewritten = self.calibration.rewrite(group, words)
                else:
                    rewritten = requantize(words, source, target, self.rounding, self.source.losses)
                for record in rewritten:
                    checksums.append(checksum(record.data))
                    stream.write(record.data)
                    self._advance(target.stride)
        return checksums


def _states(layer: int) -> str:
    """Returns the name of the file with the states of a calibration for a layer."""
    return f"calibration-{layer:05d}.npy"
