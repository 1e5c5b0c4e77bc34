"""Banks by part: the same bytes as whole records, used where they lie, on the path of GPUs without kernels."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from random_checkpoint import text_config, write_checkpoint

from flash_moe import Model, loading
from flash_moe.experts import banks, opening, resident, slots
from flash_moe.experts.banks import PartBank, can_lie_by_part, counts_by_part, put_together
from flash_moe.experts.choosing import Copying
from flash_moe.experts.host_memory import new_bank
from flash_moe.experts.reader import RecordReader
from flash_moe.experts.resident import ResidentStore
from flash_moe.experts.slots import SlotStore
from flash_moe.models import open_model
from flash_moe.nn import decoder, decoder_layer, sparse_moe
from flash_moe.nn.run_ahead import AheadSwitch
from flash_moe.ops import experts as experts_ops
from flash_moe.ops import kernel
from flash_moe.ops.experts import experts_in_place, parts_of, weighted_sum
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
    for module in (decoder, decoder_layer, sparse_moe):
        monkeypatch.setattr(module, "on_gpu", lambda: True)
    monkeypatch.setattr(sparse_moe, "kernels_wanted", lambda: False)
    monkeypatch.setattr(experts_ops, "use_blas", lambda *_: False)
    monkeypatch.setattr(experts_ops, "on_cpu", lambda *_: False)
    monkeypatch.setattr(mx, "compile", lambda function: function)
    monkeypatch.setattr(loading, "prove_kernels", lambda *_: (True, Copying()))
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
def test_on_cuda_every_product_is_one_of_at_least_eight(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MLX has another kernel for fewer there, with other bits."""
    monkeypatch.setattr(kernel, "back_end", lambda: "cuda")
    monkeypatch.setattr(opening, "_GROUP_BYTES", 0)
    counts, gather = [], mx.gather_qmm

    def counted(x: mx.array, *rest: mx.array, rhs_indices: mx.array, **options: object) -> mx.array:
        counts.append(rhs_indices.size)
        return gather(x, *rest, rhs_indices=rhs_indices, **options)

    monkeypatch.setattr(mx, "gather_qmm", counted)
    results = []
    for options in (
        {"expert_io": "resident"}, {"expert_io": "slots"}, {"expert_io": "mapped"},
        {"expert_io": "slots", "expert_cache": 20 << 14}, {"expert_io": "slots", "expert_cache": 20 << 14},
    ):  # fmt: skip
        if len(results) == 4:  # a bank of too many weights
            monkeypatch.setattr(slots, "counts_by_part", lambda *_: False)
        with Model.load(packed, experts_per_token=2, dtype="float32", **options) as model:
            cache = model._decoder.new_cache()
            rows = [model._decoder.logits(model._decoder(mx.array(PROMPT[:3]), cache))]
            rows += [model._decoder.logits(model._decoder(mx.array([token]), cache)) for token in PROMPT[3:6]]
            results.append(np.concatenate([np.array(row) for row in rows]))
    assert min(counts) == 8
    monkeypatch.setattr(kernel, "back_end", lambda: "metal")
    with Model.load(packed, experts_per_token=2, dtype="float32", expert_io="slots") as model:
        cache = model._decoder.new_cache()
        plain = np.array(model._decoder.logits(model._decoder(mx.array(PROMPT[:3]), cache)))
    assert min(counts) < 8
    for other in results:
        np.testing.assert_array_equal(other, results[0])
        np.testing.assert_allclose(other[:3], plain, atol=1e-4)


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
    assert peak(bank.rows(1, 31)) < smallest  # a layer that is whole in a larger bank
    strided = {key: mx.concatenate([array, array], axis=2)[:, :, : array.shape[2]] for key, array in bank.bank.items()}
    mx.eval(strided)
    assert peak(strided) > layout.stride  # the measure sees a copy
    record = mx.zeros(layout.stride // 4, dtype=mx.uint32)  # a mapped one, used from where it lies
    x, rows, weights = mx.ones((1, 512)), mx.array([0], dtype=mx.uint32), mx.ones(1)
    mx.eval(record, x, rows, weights)
    assert peak(parts_of(record, layout)) < smallest


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in which a record is larger than all activations of a token together."""
    folder = tmp_path_factory.mktemp("wide")
    text = text_config(hidden_size=512, moe_intermediate_size=256, num_hidden_layers=2, full_attention_interval=2)
    convert(write_checkpoint(folder / "float", text), folder / "packed", bits=4, group_size=64)
    return folder / "packed"


class Fixed(AheadSwitch):
    """A way that does not change."""

    def __init__(self, ahead: bool) -> None:
        super().__init__(2)
        self.ahead = ahead

    def record(self, seconds: float, misses: int) -> None:
        """Changes nothing."""


@pytest.mark.usefixtures("without_kernels")
@pytest.mark.parametrize("way", ["slots", "cache, waiting", "cache, ahead", "cache of everything"])
def test_a_token_copies_no_weights(way: str, wide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "_GROUP_BYTES", 0)
    cache_bytes = {"slots": 0, "cache of everything": 1 << 30}.get(way, 3 << 20)

    def peak(copied: bool) -> float:
        monkeypatch.setattr(slots, "counts_by_part", lambda *_: not copied)
        with Model.load(wide, expert_io="slots", expert_cache=cache_bytes, dtype="float32", kernels=False) as model:
            decoder, cache = model._decoder, model._decoder.new_cache()
            if decoder.run_ahead is not None:
                decoder.run_ahead.switch = Fixed(way == "cache, ahead")
            for _ in range(3):
                mx.clear_cache()
                mx.reset_peak_memory()
                before = mx.get_active_memory()
                mx.eval(decoder(mx.array([1]), cache), *cache.arrays)
                found = mx.get_peak_memory() - before
            return found / model.expert_store.layouts[0].stride

    assert peak(copied=False) < 1
    assert peak(copied=True) > 4  # whole records: the measure sees a copy


def test_on_cuda_reads_behind_the_last_slot_stay_in_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    monkeypatch.setattr(banks, "on_cuda", lambda: True)
    monkeypatch.setattr(banks, "new_bank", lambda slots, words: sizes.append(slots) or new_bank(slots, words))
    layout = RecordLayout.build(64, 64, dict.fromkeys(PROJECTIONS, ProjectionFormat("F32", Quantization(4, 32))))
    bank = PartBank(3, layout)
    assert set(sizes) == {4}
    assert isinstance(bank.bank, dict)
    assert all(len(array) == 3 for array in bank.bank.values())
    for slot in range(3):
        for target in bank.targets(slot):
            target.buffer[:] = slot  # type: ignore[union-attr]
    assert np.array(bank.bank["up_proj.weight"]).view(np.uint8).max(axis=(1, 2)).tolist() == [0, 1, 2]


def test_on_cuda_banks_of_more_weights_than_32_bits_count_stay_whole(
    packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(banks, "on_cuda", lambda: True)
    full_size = RecordLayout.build(
        4096, 1024, dict.fromkeys(PROJECTIONS, ProjectionFormat("BF16", Quantization(4, 64)))
    )
    assert counts_by_part(511, [full_size])
    assert not counts_by_part(512, [full_size])
    monkeypatch.setattr(slots, "counts_by_part", lambda *_: False)
    monkeypatch.setattr(resident, "counts_by_part", lambda *_: False)
    table = open_model(packed).records()
    for store in SlotStore(RecordReader(table), 4, by_part=True), ResidentStore(RecordReader(table), by_part=True):
        assert not store.by_part
        assert isinstance(store.fetch(0, [1]).arrays[0], mx.array)
        store.close()


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
