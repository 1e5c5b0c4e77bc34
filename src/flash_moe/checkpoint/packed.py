"""The packed form: one safetensors file of records per layer, and a manifest.

The file of a layer holds one tensor ``experts`` (U8, [E, stride]; fewer rows in a share). Its data begins at a multiple
of 16 KiB, so that records can be mapped separately. Any safetensors reader can open the file. ``flash_moe.json`` holds
the record layout of each layer and a checksum per record. The resident weights are ordinary MLX safetensors with an
index.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import ArgumentError, CheckpointError
from ..record import RECORD_ALIGNMENT, RecordLayout
from ..share import WHOLE, Share
from .names import is_file_name
from .safetensors import TensorInfo, build_header, read_header

MANIFEST = "flash_moe.json"
FORMAT = "flash_moe"
TENSOR = "experts"
VERSION = 1


@dataclass(frozen=True)
class PackedLayer:
    """The file of a layer: its name, the layout of its records and their checksums."""

    file: str
    layout: RecordLayout
    checksums: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {"file": self.file, "layout": self.layout.to_json(), "checksums": list(self.checksums)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> PackedLayer:
        return cls(data["file"], RecordLayout.from_json(data["layout"]), tuple(data["checksums"]))


@dataclass(frozen=True)
class Manifest:
    """The content of flash_moe.json: packed layers by index, checksums of the resident files, and the share of the
    experts.

    The file of a layer holds the experts of the share in ascending order.
    """

    layers: Mapping[int, PackedLayer]
    resident: Mapping[str, str] = field(default_factory=dict)
    share: Share = WHOLE

    @classmethod
    def load(cls, folder: Path) -> Manifest | None:
        """Reads ``folder/flash_moe.json``; returns None if the checkpoint is not packed.

        Raises:
            CheckpointError: the file is damaged or has a newer version.
        """
        path = folder / MANIFEST
        if not path.exists():
            return None
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if data["format"] != FORMAT:
                raise CheckpointError(
                    f"{path} is of format {data['format']!r}, expected {FORMAT!r}; convert the model again"
                )
            if data["version"] != VERSION:
                raise CheckpointError(f"{path} is of version {data['version']}, expected {VERSION}; update flash_moe")
            layers = {int(i): PackedLayer.from_json(layer) for i, layer in data["layers"].items()}
            share = Share.parse(data["share"]) if "share" in data else WHOLE
            return cls(layers, dict(data["resident"]), share)
        except (OSError, ArgumentError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{path} is damaged ({error!r}); convert the model again") from error

    def dump(self) -> str:
        """Returns the text of flash_moe.json."""
        layers = {str(i): layer.to_json() for i, layer in sorted(self.layers.items())}
        share = {} if self.share.is_whole else {"share": str(self.share)}
        return json.dumps({"format": FORMAT, "version": VERSION, **share, "layers": layers, "resident": self.resident})


def layer_file(layer: int) -> str:
    """Returns the file name of a packed layer."""
    return f"experts-{layer:05d}.safetensors"


def refuse_lost_manifest(folder: Path) -> None:
    """Raises CheckpointError if a folder holds layers of a packed model, but no manifest."""
    layers = () if (folder / MANIFEST).exists() else sorted(folder.glob("experts-[0-9]*.safetensors"))
    for file in layers:
        if read_header(file).metadata.get("format") == FORMAT:
            raise CheckpointError(
                f"{file} holds packed experts, but {folder} lacks {MANIFEST}, which describes them; copy that file to the "
                "folder again, or convert the model again"
            )


def layer_header(layer: int, records: int, layout: RecordLayout) -> bytes:
    """Returns the header of a layer's file, before the records; its length is a multiple of 16 KiB."""
    tensors = {TENSOR: ("U8", (records, layout.stride))}
    return build_header(tensors, metadata=_metadata(layout) | {"layer": str(layer)}, align=RECORD_ALIGNMENT)


def _metadata(layout: RecordLayout) -> dict[str, str]:
    return {"format": FORMAT, "layout": json.dumps(layout.to_json())}


def _states(metadata: Mapping[str, str], layout: RecordLayout) -> bool:
    """Returns whether a file's metadata describes this layout."""
    if not metadata.keys() <= {"format", "layout", "layer"}:
        return False
    try:
        return metadata.get("format") == FORMAT and RecordLayout.from_json(json.loads(metadata["layout"])) == layout
    except (ValueError, KeyError, TypeError, RecursionError, CheckpointError):
        return False


def open_layer(folder: Path, number: int, layer: PackedLayer, records: int) -> TensorInfo:
    """Returns the tensor of records in a layer's file, checked against the manifest.

    Raises:
        CheckpointError: the file is missing or truncated, or its tensor does not match the manifest.
    """
    if not is_file_name(layer.file):
        raise CheckpointError(f"{MANIFEST} names {layer.file!r}, expected a file of the same folder; convert again")
    header = read_header(folder / layer.file)
    tensor = header.tensors.get(TENSOR)
    if tensor is None:
        raise CheckpointError(f"{folder / layer.file} holds no tensor {TENSOR!r}; convert the model again")
    expected = ("U8", (records, layer.layout.stride))
    if (tensor.dtype, tensor.shape) != expected or tensor.offset % RECORD_ALIGNMENT:
        raise CheckpointError(
            f"{tensor.file}: tensor {TENSOR!r} is {tensor.dtype} {list(tensor.shape)} at byte {tensor.offset}, expected "
            f"{expected[0]} {list(expected[1])} at a multiple of {RECORD_ALIGNMENT}; convert the model again"
        )
    if not _states(header.metadata, layer.layout):
        raise CheckpointError(
            f"{tensor.file} states another record layout than {MANIFEST}; they are of different conversions or damaged: "
            "convert the model again"
        )
    if (own := header.metadata.get("layer", str(number))) != str(number):  # older files do not state it
        raise CheckpointError(
            f"{tensor.file} holds the experts of layer {own}, but {MANIFEST} says layer {number}; restore the names of the "
            "files, or convert the model again"
        )
    if len(layer.checksums) != records:
        raise CheckpointError(
            f"{MANIFEST}: {len(layer.checksums)} checksums for {records} records of {layer.file}; convert again"
        )
    return tensor


def checksum(data: memoryview | bytes) -> str:
    """Returns the checksum of a record: BLAKE2b with 16 bytes, in hexadecimal."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()
