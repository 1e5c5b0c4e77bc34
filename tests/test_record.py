from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flash_moe.errors import CheckpointError
from flash_moe.formats import GROUP_SIZES, QUANTIZED_BITS, ProjectionFormat, Quantization
from flash_moe.record import PROJECTIONS, RecordLayout

FLOATS = ("BF16", "F16", "F32")
PAGE = 16 * 1024
_quantizations = st.builds(Quantization, st.sampled_from(QUANTIZED_BITS), st.sampled_from(GROUP_SIZES))
_formats = st.builds(ProjectionFormat, st.sampled_from(FLOATS), st.none() | _quantizations)
layouts = st.builds(
    RecordLayout.build,
    st.integers(1, 12).map(lambda n: 128 * n),  # every group size divides it
    st.integers(1, 12).map(lambda n: 128 * n),
    st.fixed_dictionaries(dict.fromkeys(PROJECTIONS, _formats)),
)


def uniform(bits: int, group_size: int, dtype: str = "BF16") -> dict[str, ProjectionFormat]:
    return dict.fromkeys(PROJECTIONS, ProjectionFormat(dtype, Quantization(bits, group_size)))


@given(layouts)
def test_parts_lie_in_order_aligned_and_apart(layout: RecordLayout) -> None:
    end = 0
    for part in layout.parts:
        assert part.offset % 64 == 0
        assert 0 <= part.offset - end < 64
        end = part.offset + part.nbytes
    assert layout.stride % PAGE == 0
    assert 0 <= layout.stride - end < PAGE


@given(layouts)
def test_names_and_order_of_parts(layout: RecordLayout) -> None:
    expected = []
    for projection in PROJECTIONS:
        quantized = layout.formats[projection].quantization is not None
        expected += [f"{projection}.{kind}" for kind in (("weight", "scales", "biases") if quantized else ("weight",))]
    assert [part.key for part in layout.parts] == expected


@given(layouts)
def test_parts_hold_every_weight(layout: RecordLayout) -> None:
    """Bits of the packed weights, and one scale and bias a group: counted from the format, not from shapes."""
    for name, projection in layout.projections:
        weights = layout.hidden_size * layout.intermediate_size
        fmt = layout.formats[name]
        item = 4 if fmt.dtype == "F32" else 2
        sizes = [part.nbytes for part in projection.parts]
        if (q := fmt.quantization) is None:
            assert sizes == [weights * item]
        else:
            assert sizes == [weights * q.bits // 8, *[weights // q.group_size * item] * 2]
        rows = layout.hidden_size if name == "down_proj" else layout.intermediate_size
        assert {part.shape[0] for part in projection.parts} == {rows}


@given(layouts)
def test_layout_survives_json(layout: RecordLayout) -> None:
    assert RecordLayout.from_json(json.loads(json.dumps(layout.to_json()))) == layout


@pytest.mark.parametrize(("bits", "stride"), [(4, 7_077_888), (2, 3_932_160)], ids=["4-bit", "2-bit"])
def test_record_of_the_397b_model(bits: int, stride: int) -> None:
    layout = RecordLayout.build(4096, 1024, uniform(bits, 64))
    assert layout.stride == stride
    assert sum(part.nbytes for part in layout.parts) == stride  # no padding at all


@pytest.mark.parametrize(("hidden", "intermediate"), [(96, 64), (64, 96)], ids=["hidden", "intermediate"])
def test_group_size_must_divide_the_rows(hidden: int, intermediate: int) -> None:
    with pytest.raises(CheckpointError, match="rows of 96 weights cannot be quantised in groups of 64"):
        RecordLayout.build(hidden, intermediate, uniform(4, 64))


@pytest.mark.parametrize("bits", [0, 1, 7, 16, "4", 4.0, True, None], ids=repr)
def test_impossible_bits(bits: object) -> None:
    with pytest.raises(CheckpointError, match="bits, expected one of"):
        Quantization(bits, 64)  # type: ignore[arg-type]


@pytest.mark.parametrize("group_size", [0, 16, 48, 256, "64", None], ids=repr)
def test_impossible_group_size(group_size: object) -> None:
    with pytest.raises(CheckpointError, match=r"groups of .*expected one of"):
        Quantization(4, group_size)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", ["U32", "I64", "F8_E4M3"])
def test_only_floats_are_weights_or_scales(dtype: str) -> None:
    with pytest.raises(CheckpointError, match=f"type {dtype}, expected BF16, F16 or F32"):
        RecordLayout.build(128, 128, uniform(4, 64, dtype))


@pytest.mark.parametrize("key", ["hidden_size", "intermediate_size", "stride", "projections"])
@pytest.mark.parametrize("value", [None, "x", -64, 64.0, [], {}], ids=repr)
def test_damaged_description_is_refused(key: str, value: object) -> None:
    data = RecordLayout.build(128, 128, uniform(4, 64)).to_json()
    with pytest.raises(CheckpointError, match="convert"):
        RecordLayout.from_json(data | {key: value})
    del data[key]
    with pytest.raises(CheckpointError, match=r"malformed .*convert the model again"):
        RecordLayout.from_json(data)


def test_a_record_holds_whatever_linear_layers_an_expert_has() -> None:
    parts = [
        ("fc1", "weight", "U32", (96, 8)), ("fc1", "scales", "BF16", (96, 2)), ("fc1", "biases", "BF16", (96, 2)),
        ("fc1", "bias", "F32", (96,)), ("fc2", "weight", "F16", (64, 96)), ("fc2", "global_scale", "F32", (1,)),
    ]  # fmt: skip
    layout = RecordLayout.of(parts, {"fc1": Quantization(4, 32)})
    assert [(p.linear, p.name, p.dtype, p.shape) for p in layout.parts] == parts
    assert (layout.linears["fc1"].rows, layout.linears["fc1"].columns) == (96, 64)
    assert layout.linears["fc1"].bias == layout.parts[3]
    assert layout.linears["fc2"].global_scale == layout.parts[5]
    assert layout.weights == 96 * 64 * 2
    assert RecordLayout.from_json(json.loads(json.dumps(layout.to_json()))) == layout


def test_parts_that_do_not_fit_their_quantisation_are_refused() -> None:
    shapes = [
        ("fc1", "weight", "U32", (128, 16)),
        ("fc1", "scales", "F32", (128, 4)),
        ("fc1", "biases", "F32", (128, 4)),
    ]
    data = RecordLayout.of(shapes, {"fc1": Quantization(4, 64)}).to_json()
    with pytest.raises(CheckpointError, match="parts of fc1 do not fit"):
        RecordLayout.from_json(data)
