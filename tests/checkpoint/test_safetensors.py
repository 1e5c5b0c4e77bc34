from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from flash_moe.checkpoint.safetensors import DTYPE_BITS, build_header, read_header
from flash_moe.errors import CheckpointError

NUMPY_NAMES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1",
    "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1", "BOOL": "?",
}  # fmt: skip
_arrays = st.sampled_from(sorted(NUMPY_NAMES.values())).flatmap(
    lambda dtype: hnp.arrays(np.dtype(dtype), hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4))
)
_names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(
    lambda name: name != "__metadata__"
)
_files = st.dictionaries(_names, _arrays, max_size=5)
_metadata = st.none() | st.dictionaries(  # never {}: the reference writes broken JSON for no tensors and {}
    _names, st.text(st.characters(exclude_categories=["Cs"]), max_size=8), min_size=1, max_size=3
)

unhurried = settings(deadline=None)  # writing files takes as long as it takes


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One file that all examples of a property overwrite."""
    return tmp_path_factory.mktemp("safetensors") / "a.safetensors"


def code(array: np.ndarray) -> str:
    return {np.dtype(text): name for name, text in NUMPY_NAMES.items()}[array.dtype]


@given(tensors=_files, metadata=_metadata)
@unhurried
def test_reads_what_the_reference_wrote(
    scratch: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str] | None
) -> None:
    scratch.write_bytes(safetensors.numpy.save(tensors, metadata=metadata))
    header, stored = read_header(scratch), scratch.read_bytes()
    assert dict(header.metadata) == (metadata or {})
    assert set(header.tensors) == set(tensors)
    for name, array in tensors.items():
        info = header.tensors[name]
        assert (info.name, info.dtype, info.shape, info.file) == (name, code(array), array.shape, scratch)
        assert stored[info.offset : info.offset + info.nbytes] == array.tobytes()


@given(tensors=_files, metadata=_metadata, align=st.sampled_from([8, 64, 4096, 16384]))
@unhurried
def test_the_reference_reads_what_we_write(
    scratch: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str] | None, align: int
) -> None:
    start = build_header({n: (code(a), a.shape) for n, a in tensors.items()}, metadata=metadata, align=align)
    scratch.write_bytes(start + b"".join(array.tobytes() for array in tensors.values()))
    assert len(start) % align == 0
    assert read_header(scratch).data_start == len(start)
    with safetensors.safe_open(scratch, framework="np") as opened:
        assert (opened.metadata() or {}) == (metadata or {})
        assert set(opened.keys()) == set(tensors)
        for name, array in tensors.items():
            found = opened.get_tensor(name)
            assert (found.dtype, found.shape, found.tobytes()) == (array.dtype, array.shape, array.tobytes())


@given(tensors=_files, metadata=_metadata, align=st.sampled_from([8, 16384]))
@unhurried
def test_our_headers_come_back(
    scratch: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str] | None, align: int
) -> None:
    wanted = {name: (code(array), array.shape) for name, array in tensors.items()}
    start = build_header(wanted, metadata=metadata, align=align)
    scratch.write_bytes(start + bytes(sum(array.nbytes for array in tensors.values())))
    header = read_header(scratch)
    assert {name: (info.dtype, info.shape) for name, info in header.tensors.items()} == wanted
    position = header.data_start
    for name in wanted:  # one after the other, in the order given
        assert header.tensors[name].offset == position
        position += header.tensors[name].nbytes


@pytest.mark.parametrize("dtype", sorted(DTYPE_BITS))
def test_item_sizes_are_those_of_the_reference(tmp_path: Path, dtype: str) -> None:
    file = tmp_path / "a.safetensors"
    file.write_bytes(build_header({"a": (dtype, (3,))}) + bytes(3 * DTYPE_BITS[dtype] // 8))
    ((name, tensor),) = safetensors.deserialize(file.read_bytes())
    assert (name, tensor["dtype"], len(tensor["data"])) == ("a", dtype, read_header(file).tensors["a"].nbytes)


def entry(dtype: Any = "U8", shape: Any = (4,), offsets: Any = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


MALFORMED: dict[str, tuple[Any, str]] = {
    "not JSON": (b"{nothing", "not JSON"),
    "cut off": (b'{"a": {"dtype"', "not JSON"),
    "no text": (b"\xff\xff\xff\xff", "not JSON"),
    "a name twice": (b'{"a": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}, "a": 1}', "it has 'a' twice"),
    "deeply nested": (b"[" * 100_000, "not JSON"),
    "list": ([entry()], "is list, expected a JSON object"),
    "number": (4, "is int, expected a JSON object"),
    "metadata no object": ({"__metadata__": ["x"]}, "__metadata__ is list"),
    "entry no object": ({"a": 4}, "lacks a dtype, shape or pair of data_offsets"),
    "entry null": ({"a": None}, "lacks a dtype, shape or pair of data_offsets"),
    "no dtype": ({"a": {"shape": [4], "data_offsets": [0, 4]}}, "lacks a dtype"),
    "no shape": ({"a": {"dtype": "U8", "data_offsets": [0, 4]}}, "lacks a dtype, shape"),
    "no offsets": ({"a": {"dtype": "U8", "shape": [4]}}, "lacks a dtype, shape or pair of data_offsets"),
    "one offset": ({"a": entry(offsets=[4])}, "pair of data_offsets"),
    "three offsets": ({"a": entry(offsets=[0, 2, 4])}, "pair of data_offsets"),
    "offsets reversed": ({"a": entry(offsets=[4, 0])}, "spans -4 bytes"),
    "negative offset": ({"a": entry(offsets=[-4, 0])}, "expected integers >= 0"),
    "negative dimension": ({"a": entry(shape=[-2, -2])}, "expected integers >= 0"),
    "bool as offset": ({"a": entry(shape=[1], offsets=[False, True])}, "expected integers >= 0"),
    "bool as dimension": ({"a": entry(shape=[4, True])}, "expected integers >= 0"),
    "float as dimension": ({"a": entry(shape=[4.0])}, "expected integers >= 0"),
    "text as shape": ({"a": entry(shape="", offsets=[0, 1])}, "expected integers >= 0"),
    "object as shape": ({"a": entry(shape={}, offsets=[0, 1])}, "expected integers >= 0"),
    "null as shape": ({"a": entry(shape=None)}, "expected integers >= 0"),
    "unknown dtype": ({"a": entry(dtype="I4")}, "unknown dtype 'I4'"),
    "list as dtype": ({"a": entry(dtype=["U8"])}, "unknown dtype"),
    "null as dtype": ({"a": entry(dtype=None)}, "unknown dtype None"),
    "wrong byte count": ({"a": entry(shape=[5])}, "spans 4 bytes"),
    "astronomic shape": ({"a": entry(shape=[10**18] * 400)}, "spans 4 bytes"),
    "leaves the file": ({"a": entry(shape=[17], offsets=[0, 17])}, "truncated: download it again"),
    "begins behind the file": ({"a": entry(shape=[0], offsets=[17, 17])}, "truncated: download it again"),
    "overlap": ({"a": entry(), "b": entry(offsets=[3, 7])}, "'a' and 'b' overlap"),
    "same bytes": ({"a": entry(), "b": entry()}, "overlap"),
    "inside another": ({"a": entry(shape=[16], offsets=[0, 16]), "b": entry(offsets=[8, 12])}, "'a' and 'b' overlap"),
}  # fmt: skip


@pytest.mark.parametrize(("header", "message"), MALFORMED.values(), ids=MALFORMED)
def test_malformed_header(tmp_path: Path, header: Any, message: str) -> None:
    body = header if isinstance(header, bytes) else json.dumps(header).encode()
    file = tmp_path / "bad.safetensors"
    file.write_bytes(struct.pack("<Q", len(body)) + body + bytes(16))
    with pytest.raises(CheckpointError, match=message) as caught:
        read_header(file)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes long"),
        (b"\x02\x00\x00", "3 bytes long"),
        (struct.pack("<Q", 3) + b"{}", "10 bytes long and states a header of 3 bytes"),
        (struct.pack("<Q", 2**63) + b"{}", "states a header of 9223372036854775808 bytes"),
        (b"<!DOCTYPE html><html></html>", "no safetensors file: download it again"),
    ],
    ids=["empty", "shorter than the length", "header cut off", "absurd length", "web page"],
)
def test_file_that_ends_before_its_header(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "bad.safetensors"
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read_header(file)


def test_huge_header_is_not_read(tmp_path: Path) -> None:
    """A sparse file of 200 MB whose length field claims nearly all of it: refused as the reference refuses it."""
    file = tmp_path / "huge.safetensors"
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", 150_000_000))
        stream.truncate(200_000_000)
    with pytest.raises(CheckpointError, match="header of 150000000 bytes"):
        read_header(file)


def test_missing_file_and_folder_in_its_place(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist; download"):
        read_header(tmp_path / "none.safetensors")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_header(tmp_path)


def test_touching_and_empty_tensors_are_no_overlap(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    shapes = {"a": ("U8", (4,)), "none": ("F32", (0, 3)), "b": ("U8", (4,))}
    file.write_bytes(build_header(shapes) + bytes(8))
    assert [info.nbytes for info in read_header(file).tensors.values()] == [4, 0, 4]


VALID = build_header(
    {"a": ("BF16", (2, 3)), "b.weight": ("U32", (4,)), "c": ("U8", ())}, metadata={"format": "mlx"}, align=64
) + bytes(29)


@given(
    edits=st.lists(st.tuples(st.integers(0, len(VALID) - 1), st.integers(0, 255)), min_size=1, max_size=4),
    length=st.just(len(VALID)) | st.integers(0, len(VALID)),
)
@unhurried
def test_damaged_bytes_are_an_error_or_a_valid_header(scratch: Path, edits: list[tuple[int, int]], length: int) -> None:
    content = bytearray(VALID)
    for position, value in edits:
        content[position] = value
    scratch.write_bytes(content[:length])
    try:
        header = read_header(scratch)
    except CheckpointError:
        return
    for info in header.tensors.values():  # what is accepted lies inside the file
        assert header.data_start <= info.offset <= info.offset + info.nbytes <= length


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.sampled_from(sorted(DTYPE_BITS)),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets", "__metadata__", "a"]), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(_json)
@unhurried
def test_any_json_is_an_error_or_a_valid_header(scratch: Path, header: Any) -> None:
    body = json.dumps(header).encode()
    scratch.write_bytes(struct.pack("<Q", len(body)) + body + bytes(16))
    try:
        read_header(scratch)
    except CheckpointError as error:
        assert str(scratch) in str(error)
