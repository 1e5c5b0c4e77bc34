"""Reads and writes safetensors headers, which locate the bytes of each tensor in a file.

The format is 8 bytes of little-endian header length, a JSON header (which may be padded with spaces), then the data.
Every offset is checked before it is used, so that a damaged file raises an error instead of causing wrong results.
Source: https://huggingface.co/docs/safetensors/index#format
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ..errors import CheckpointError
from ..record import round_up

DTYPE_BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32, "U16": 16, "U8": 8, "BOOL": 8,
}  # fmt: skip
MAX_HEADER_BYTES = 100_000_000  # the limit of the reference implementation


class FileState(NamedTuple):
    """The identity and the last modification of a file. Times are in nanoseconds."""

    device: int
    inode: int
    size: int
    mtime: int
    ctime: int

    @classmethod
    def of(cls, file: Path | int) -> FileState:
        """Returns the current state of a path or descriptor. Raises OSError if the file does not exist."""
        status = os.fstat(file) if isinstance(file, int) else file.stat()
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)

    def change(self, now: FileState) -> str | None:
        """Describes the change from this state to another, for an error message; None if there is no change."""
        if now == self:
            return None
        if now.size != self.size:
            return f"the file is now {now.size} bytes long, it was {self.size} when its header was read; load the model again"
        if (now.device, now.inode) != (self.device, self.inode):
            return "the file was replaced by another since its header was read; load the model again"
        return "the file was changed since its header was read; load the model again"


_NO_STATE = FileState(0, 0, 0, 0, 0)  # a state that no file has


@dataclass(frozen=True)
class TensorInfo:
    """The location of a tensor: ``nbytes`` bytes at ``offset`` from the start of ``file``.

    Attributes:
        state: the state of the file when its header was read.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int
    state: FileState = _NO_STATE


@dataclass(frozen=True)
class Header:
    """The checked header of one file."""

    file: Path
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    data_start: int


def read_header(file: Path, needed: Callable[[str], bool] | None = None) -> Header:
    """Reads and checks the header of ``file``, without reading the data.

    Args:
        needed: function that tells whether a tensor name is needed; other tensors may have any dtype. None means all
            are needed.

    Raises:
        CheckpointError: the file is missing, truncated or malformed, or its tensors overlap or exceed the file.
    """
    try:
        with file.open("rb") as stream:
            state = FileState.of(stream.fileno())
            size = state.size
            prefix = stream.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else None
            if length is None or length > min(size - 8, MAX_HEADER_BYTES):
                raise CheckpointError(
                    f"{file} is {size} bytes long and states a header of {length} bytes; "
                    "it is truncated or no safetensors file: download it again"
                )
            raw = stream.read(length)
    except FileNotFoundError:
        raise CheckpointError(f"{file} does not exist; download the checkpoint again") from None
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    try:
        entries = json.loads(raw, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{file}: the header is not JSON with unique names ({error}); download it again"
        ) from error
    if not isinstance(entries, dict):
        raise CheckpointError(f"{file}: the header is {type(entries).__name__}, expected a JSON object")
    metadata = entries.pop("__metadata__", None)
    if metadata is None:  # mx.save_safetensors writes null without metadata
        metadata = {}
    if not isinstance(metadata, dict):
        raise CheckpointError(f"{file}: __metadata__ is {type(metadata).__name__}, expected a JSON object")
    start = 8 + length
    tensors = {
        name: _tensor(file, state, name, entry, start, needed is None or needed(name))
        for name, entry in entries.items()
    }
    _check_ranges(file, list(tensors.values()), start, size)
    return Header(file, tensors, metadata, start)


def check_unchanged(tensors: Iterable[TensorInfo]) -> None:
    """Raises CheckpointError if a file of these tensors has changed since its header was read."""
    for file, state in {tensor.file: tensor.state for tensor in tensors}.items():
        try:
            reason = state.change(FileState.of(file))
        except OSError as error:
            reason = str(error)
        if reason is not None:
            raise CheckpointError(f"{file}: {reason}")


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Returns a JSON object. Raises ValueError if a key occurs twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"it has {twice!r} twice")
    return found


def _tensor(file: Path, state: FileState, name: str, entry: object, start: int, needed: bool) -> TensorInfo:
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]  # type: ignore[index]
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(f"{file}: tensor {name!r} lacks a dtype, shape or pair of data_offsets") from None
    numbers = [begin, end, *shape] if isinstance(shape, list) else [None]
    if not all(type(n) is int and n >= 0 for n in numbers):
        raise CheckpointError(
            f"{file}: tensor {name!r} has shape {shape} and offsets [{begin}, {end}], expected integers >= 0"
        )
    if isinstance(dtype, str) and not needed:
        return TensorInfo(name, dtype, tuple(shape), file, start + begin, max(end - begin, 0))
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise CheckpointError(f"{file}: tensor {name!r} has the unknown dtype {dtype!r}")
    nbytes = math.prod(shape) * DTYPE_BITS[dtype] // 8
    if end - begin != nbytes:
        raise CheckpointError(
            f"{file}: tensor {name!r} spans {end - begin} bytes, not what {dtype} of shape {shape} takes; download it again"
        )
    return TensorInfo(name, dtype, tuple(shape), file, start + begin, nbytes, state)


def _check_ranges(file: Path, tensors: list[TensorInfo], start: int, size: int) -> None:
    end, previous = start, None
    for tensor in sorted(tensors, key=lambda t: (t.offset, t.nbytes)):
        if tensor.offset < end and tensor.nbytes:
            raise CheckpointError(f"{file}: tensors {previous!r} and {tensor.name!r} overlap; download it again")
        end, previous = max(end, tensor.offset + tensor.nbytes), tensor.name
        if end > size:
            raise CheckpointError(
                f"{file} ends at byte {size}, but tensor {tensor.name!r} reaches to byte {end}; "
                "the file is truncated: download it again"
            )


def build_header(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]], *, metadata: Mapping[str, str] | None = None, align: int = 8
) -> bytes:
    """Returns the header of a file that holds ``tensors`` (name to dtype and shape) in that order.

    Args:
        align: the data begins at a multiple of this many bytes. The header is padded with spaces, as the format allows.
    """
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for name, (dtype, shape) in tensors.items():
        nbytes = math.prod(shape) * DTYPE_BITS[dtype] // 8
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + nbytes]}
        position += nbytes
    body = json.dumps(entries, separators=(",", ":")).encode()
    length = round_up(8 + len(body), align) - 8
    return struct.pack("<Q", length) + body.ljust(length)
