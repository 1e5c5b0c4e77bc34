"""The source and the target of a conversion, for every family."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..checkpoint.records import RecordTable
from ..machines.share import Share
from ..models import AdaptedFiles, ModelFiles, is_adapted, open_model
from ..record import RecordLayout
from .adapted import AdaptedRecords, AdaptedResident
from .plan import Widths
from .requantize import Rounding, adopt
from .resident import ResidentFiles


@dataclass(frozen=True)
class Source:
    """The source of a conversion, and its target.

    Attributes:
        layouts: of records that ``prepare`` has dealt with: it changes records [N, stride] uint8 of a layer as they were read,
            in place, or returns others.
        target: the layouts to write.
    """

    checkpoint: ModelFiles | AdaptedFiles
    table: RecordTable
    layouts: Mapping[int, RecordLayout]
    target: dict[int, RecordLayout]
    resident: ResidentFiles | AdaptedResident
    prepare: Callable[[int, np.ndarray], np.ndarray]


def open_source(folder: Path, widths: Widths, rounding: Rounding, share: Share) -> Source:
    """Opens a checkpoint to be converted; reads headers only.

    Args:
        share: of the experts that is written.

    Raises:
        ConfigError, CheckpointError: it cannot be read, or cannot be stored so.
    """
    return _of_mlx_lm(folder, widths, share) if is_adapted(folder) else _of_ours(folder, widths, rounding, share)


def _of_ours(folder: Path, widths: Widths, rounding: Rounding, share: Share) -> Source:
    checkpoint = open_model(folder, adopt=True)
    table, quantized = checkpoint.records(share), checkpoint.quantization.default is not None

    def prepare(layer: int, records: np.ndarray) -> np.ndarray:
        adopt(checkpoint, layer, table.layouts[layer], records)
        return records

    resident = ResidentFiles(checkpoint, widths.floats(quantized), rounding)
    return Source(checkpoint, table, table.layouts, widths.layouts(table.layouts, quantized), resident, prepare)


def _of_mlx_lm(folder: Path, widths: Widths, share: Share) -> Source:
    checkpoint = AdaptedFiles.open(folder)
    records, quantized = AdaptedRecords(checkpoint), checkpoint.quantization is not None
    target = widths.layouts(records.layouts, quantized)
    resident = AdaptedResident(checkpoint, widths.floats(quantized), target)
    return Source(checkpoint, checkpoint.records(share), records.layouts, target, resident, records.prepare)
