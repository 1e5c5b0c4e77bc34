"""Banks by part: the same bytes as whole records, used where they lie, on the path of GPUs without kernels."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from flash_moe import Model
from flash_moe import model as model_module
from flash_moe.experts import opening
from flash_moe.experts.banks import PartBank, can_lie_by_part, put_together
from flash_moe.experts.reader import RecordReader
from flash_moe.experts.resident import ResidentStore
from flash_moe.experts.slots import SlotStore
from flash_moe.models import open_model
from flash_moe.nn import decoder as decoder_module
from flash_moe.nn import sparse_moe
from flash_moe.ops import experts as experts_ops
from flash_moe.ops.experts import experts_in_place, weighted_sum
from flash_moe.packing.convert import convert
from flash_moe.record import PROJECTIONS, ProjectionFormat, Quantization, RecordLayout

PROMPT = [80, 72, 101, 108, 108, 111, 32, 119] * 3


@pytest.fixture(scope="module")
def packed(quantized_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("banks") / "packed"
    convert(quantized_checkpoint, folder)
    return folder


@pytest.fixture
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Models are on the path of a GPU that uses no kernel, without tracing."""
    for module in (decoder_module, sparse_moe):
        monkeypatch.setattr(module, "on_gpu", lambda: True)
    monkeypatch.setattr(sparse_moe, "kernels_wanted", lambda: False)
    monkeypatch.setattr(experts_ops, "use_blas", lambda *_: False)
    monkeypatch.setattr(mx, "compile", lambda function: function)
    monkeypatch.setattr(model_module, "prove_kernels", lambda *_: True)
    return


@pytest.mark.parametrize("form", ["quantized_checkpoint", "packed"])
@pytest.mark.parametrize("capacity", [4, 16])
def test_every_part_of_every_record_is_read_into_its_bank(
    form: str, capacity: int, request: pytest.FixtureRequest
) -> None:
    table = open_model(request.getfixturevalue(form)).records()
    by_part, whole = (SlotStore(RecordReader(table), capacity, by_part=way) for way in (True, False))
    for layer in table.layouts:
        for first in range(0, 16, 4):
            experts = list(range(first, first + 4))
            found, expected = (store.fetch(layer, experts).stacked() for store in (by_part, whole))
            np.testing.assert_array_equal(np.array(found), np.array(expected))
    by_part.close()
    whole.close()


def test_reads_that_are_cut_in_pieces_end_in_the_right_parts(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flash_moe.experts.reader.REQUEST", 1000)
    monkeypatch.setattr("flash_moe.experts.reader.COPY", 1000)
    table = open_model(packed).records()
    stores = ResidentStore(RecordReader(table), by_part=True), ResidentStore(RecordReader(table))
    found, expected = (store.fetch(1, [3, 0, 15]).stacked() for store in stores)
    np.testing.assert_array_equal(np.array(found), np.array(expected))


@pytest.mark.usefixtures("without_kernels")
@pytest.mark.parametrize("form", ["quantized_checkpoint", "packed"])
def test_streamed_equals_resident_bit_for_bit(
    form: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opening, "_GROUP_BYTES", 0)
    results = []
    for options in (
        {"expert_io": "resident"}, {"expert_io": "slots"}, {"expert_io": "slots", "expert_cache": 24 << 14},
        {"expert_io": "slots", "expert_cache": 1 << 30}, {"expert_io": "mapped"},
    ):  # fmt: skip
        with Model.load(request.getfixturevalue(form), dtype="float32", **options) as model:
            assert model.expert_store.by_part == (options["expert_io"] != "mapped")
            cache = model._decoder.new_cache()
            rows = [model._decoder.logits(model._decoder(mx.array(PROMPT), cache))]
            for token in PROMPT[:10]:
                rows.append(model._decoder.logits(model._decoder(mx.array([token]), cache)))
            results.append(np.concatenate([np.array(row) for row in rows]))
    plain = results[0]
    for other in results[1:]:
        np.testing.assert_array_equal(other[len(PROMPT) :], plain[len(PROMPT) :])
        np.testing.assert_array_equal(other[: len(PROMPT)], plain[: len(PROMPT)])


def test_the_experts_of_a_token_copy_no_weights() -> None:
    formats = dict.fromkeys(PROJECTIONS, ProjectionFormat("F32", Quantization(4, 64)))
    layout = RecordLayout.build(512, 256, formats)
    assert can_lie_by_part([layout, layout], "F32")
    bank = PartBank(32, layout)
    x, rows, weights = mx.ones((4, 512)), mx.array([30, 2, 17, 5], dtype=mx.uint32), mx.ones(4)
    mx.eval(x, rows, weights)

    def peak(records: dict[str, mx.array]) -> int:
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        mx.eval(weighted_sum(weights, experts_in_place(x, records, rows, layout)))
        return mx.get_peak_memory() - before

    smallest = min(part.nbytes for part in layout.parts if part.name == "weight")
    assert isinstance(bank.bank, dict)
    assert peak(bank.bank) < smallest  # activations alone
    strided = {key: mx.concatenate([array, array], axis=2)[:, :, : array.shape[2]] for key, array in bank.bank.items()}
    mx.eval(strided)
    assert peak(strided) > layout.stride  # the measure sees a copy


def test_layouts_that_cannot_be_used_in_place_stay_whole() -> None:
    def layout(dtype: str, bits: int) -> RecordLayout:
        return RecordLayout.build(64, 64, dict.fromkeys(PROJECTIONS, ProjectionFormat(dtype, Quantization(bits, 32))))

    assert not can_lie_by_part([layout("BF16", 4)], "F32")
    assert not can_lie_by_part([layout("F32", 4), layout("F32", 2)], "F32")
    assert not can_lie_by_part([RecordLayout.build(64, 64, dict.fromkeys(PROJECTIONS, ProjectionFormat("F32")))], "F32")
    assert not can_lie_by_part([], "F32")


def test_put_together_restores_gaps() -> None:
    layout = RecordLayout.build(64, 32, dict.fromkeys(PROJECTIONS, ProjectionFormat("BF16", Quantization(4, 32))))
    bank = PartBank(3, layout)
    for slot in range(3):
        for target in bank.targets(slot):
            target.buffer[:] = np.arange(target.buffer.size) % 251 + slot  # type: ignore[union-attr]
    assert isinstance(bank.bank, dict)
    found = np.array(put_together(bank.bank, [2, 0], layout)).view(np.uint8)
    assert found.shape == (2, layout.stride)
    for part in layout.parts:
        expected = np.arange(part.nbytes) % 251
        np.testing.assert_array_equal(found[0, part.offset : part.offset + part.nbytes], expected + 2)
        np.testing.assert_array_equal(found[1, part.offset : part.offset + part.nbytes], expected)
