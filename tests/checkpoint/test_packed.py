from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
from damage import edit_json
from expected_records import expected_records
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flash_moe import CheckpointError, Model
from flash_moe.checkpoint.packed import MANIFEST, Manifest, layer_file
from flash_moe.checkpoint.records import RecordTable
from flash_moe.models import open_model

Copy = Callable[[str], Path]


def refused(folder: Path, *words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        Model.load(folder)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("layer", [0, 1])
def test_any_safetensors_reader_opens_a_layer(tiny_checkpoints: dict[str, Path], layer: int) -> None:
    file = tiny_checkpoints["packed"] / layer_file(layer)
    with safetensors.safe_open(file, framework="np") as opened:
        assert list(opened.keys()) == ["experts"]
        experts = opened.get_tensor("experts")
        assert json.loads(opened.metadata()["layout"])["hidden_size"] == 64
    records = expected_records(tiny_checkpoints["quantized"])
    assert experts.dtype == np.uint8
    assert [row.tobytes() for row in experts] == [records[layer, expert] for expert in range(4)]


def test_records_begin_at_pages_of_16_kib(tiny_checkpoints: dict[str, Path]) -> None:
    table = open_model(tiny_checkpoints["packed"]).records()
    for layer in table.layouts:
        for expert in range(table.num_experts):
            (extent,) = table.extents(layer, expert)
            assert (extent.offset % 16384, extent.at, extent.nbytes) == (0, 0, table.layouts[layer].stride)


def test_manifest_survives_its_text(tiny_checkpoints: dict[str, Path], tmp_path: Path) -> None:
    manifest = Manifest.load(tiny_checkpoints["packed"])
    assert manifest is not None
    (tmp_path / MANIFEST).write_text(manifest.dump())
    assert Manifest.load(tmp_path) == manifest


def test_folder_without_manifest_is_not_packed(tiny_checkpoints: dict[str, Path]) -> None:
    assert Manifest.load(tiny_checkpoints["quantized"]) is None


def layer_of(manifest: Any, layer: int = 1) -> Any:
    return manifest["layers"][str(layer)]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m.update(version=2), ("version 2", "update flash_moe")),
        (lambda m: m.update(format="other"), ("format 'other'", "convert the model again")),
        (lambda m: m.pop("version"), ("damaged", "convert the model again")),
        (lambda m: m.pop("layers"), ("damaged", "convert the model again")),
        (lambda m: m["layers"].pop("1"), ("no experts of layer 1", "convert the model again")),
        (lambda m: m["layers"].update({"one": {}}), ("damaged", "convert the model again")),
        (lambda m: layer_of(m).pop("file"), ("damaged", "convert the model again")),
        (lambda m: layer_of(m).update(file="../experts-00001.safetensors"), ("file of the same folder", "convert")),
        (lambda m: layer_of(m).update(file=7), ("file of the same folder", "convert")),
        (lambda m: layer_of(m).update(file="gone.safetensors"), ("gone.safetensors", "does not exist")),
        (lambda m: layer_of(m).update(file=layer_of(m, 0)["file"], layout=None), ("malformed", "convert")),
        (lambda m: layer_of(m)["layout"].update(stride=32768), ("32768 bytes apart", "convert")),
        (lambda m: layer_of(m)["layout"].update(hidden_size=32), ("(32, 64)", "config.json says (64, 64)", "convert")),
        (lambda m: layer_of(m)["layout"]["projections"].pop("up_proj"), ("malformed", "convert the model again")),
        (
            lambda m: layer_of(m)["layout"]["projections"]["up_proj"].update(group_size=64),
            ("another record layout", "convert the model again"),
        ),
        (lambda m: layer_of(m)["checksums"].pop(), ("3 checksums for 4 records", "convert")),
    ],
    ids=[
        "newer version", "other format", "no version", "no layers", "layer missing", "layer no number", "no file",
        "path traversal", "file no text", "file missing", "no layout", "stride", "dimensions", "no projection",
        "layout", "checksum missing",
    ],
)  # fmt: skip
def test_damaged_manifest(tiny_copy: Copy, change: Callable[[Any], object], words: tuple[str, ...]) -> None:
    folder = tiny_copy("packed")
    edit_json(folder / MANIFEST, change)
    refused(folder, *words)


@pytest.mark.parametrize("text", ["", "[]", "null", '{"version": 1', "[" * 100_000], ids=lambda text: repr(text[:12]))
def test_unreadable_manifest(tiny_copy: Copy, text: str) -> None:
    folder = tiny_copy("packed")
    (folder / MANIFEST).write_text(text)
    refused(folder, MANIFEST, "damaged", "convert the model again")


def test_missing_layer_file(tiny_copy: Copy) -> None:
    folder = tiny_copy("packed")
    (folder / layer_file(1)).unlink()
    refused(folder, layer_file(1), "does not exist", "download")


def test_truncated_layer_file(tiny_copy: Copy) -> None:
    file = tiny_copy("packed") / layer_file(1)
    with file.open("r+b") as stream:
        stream.truncate(file.stat().st_size - 1)
    refused(file.parent, str(file), "truncated")


def test_layer_file_of_another_model(tiny_copy: Copy) -> None:
    folder = tiny_copy("packed")
    from flash_moe.checkpoint.safetensors import build_header

    (folder / layer_file(1)).write_bytes(build_header({"experts": ("U8", (3, 16384))}, align=16384) + bytes(3 * 16384))
    refused(folder, layer_file(1), "[3, 16384]", "expected U8 [4, 16384]", "convert the model again")
    (folder / layer_file(1)).write_bytes(build_header({"experts": ("U8", (4, 16384))}, align=64) + bytes(4 * 16384))
    refused(folder, layer_file(1), "multiple of 16384", "convert the model again")
    (folder / layer_file(1)).write_bytes(build_header({"other": ("U8", (4, 16384))}, align=16384) + bytes(4 * 16384))
    refused(folder, layer_file(1), "no tensor 'experts'", "convert the model again")


def leaves(data: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all values in a JSON document, containers included."""
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [path] * bool(path) + [leaf for key, value in items for leaf in leaves(value, (*path, key))]


@given(data=st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_value_in_the_manifest_is_harmless_or_an_error(
    tiny_checkpoints: dict[str, Path], tmp_path: Path, data: st.DataObject
) -> None:
    """Whatever one value becomes: the records lie where they lay, or loading fails with our own error."""
    packed = open_model(tiny_checkpoints["packed"])
    expected = RecordTable.of(packed)
    for file in packed.folder.iterdir():
        if file.name != MANIFEST and not (tmp_path / file.name).exists():
            (tmp_path / file.name).symlink_to(file)
    manifest = json.loads((packed.folder / MANIFEST).read_text())
    path = data.draw(st.sampled_from(leaves(manifest)))
    *parents, last = path
    owner = manifest
    for key in parents:
        owner = owner[key]
    values = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.just([]) | st.just({})
    owner[last] = data.draw(values)
    (tmp_path / MANIFEST).write_text(json.dumps(manifest))
    try:
        table = open_model(tmp_path).records()
    except CheckpointError:
        return
    assert table.layouts == expected.layouts
    for layer in table.layouts:
        assert [e.offset for e in table.extents(layer, 3)] == [e.offset for e in expected.extents(layer, 3)]
