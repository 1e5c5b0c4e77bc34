"""What tests of conversions share: what is in a folder, and how one is interrupted."""

from __future__ import annotations

from pathlib import Path

from safetensors.numpy import load_file


def contents(folder: Path) -> dict[str, bytes]:
    """The bytes of every file of a folder, by name."""
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def packed_records(folder: Path) -> dict[tuple[int, int], bytes]:
    """All records of a packed folder, read by the plain safetensors package."""
    return {
        (layer, expert): row.tobytes()
        for layer, file in enumerate(sorted(folder.glob("experts-*.safetensors")))
        for expert, row in enumerate(load_file(file)["experts"])
    }


class Interrupted(BaseException):
    """Ends a conversion like Ctrl-C: whoever handles errors does not catch it."""
