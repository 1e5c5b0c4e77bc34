"""Bytes of the 397B model at 4 bits, and of small ones against what loading them really takes."""

from __future__ import annotations

from pathlib import Path

import pytest
from mlx.utils import tree_flatten
from sparse_checkpoint import FULL_SIZE, write_sparse

from flash_moe import Model
from flash_moe.models import open_model
from flash_moe.planning.costs import expert_flops, token_bytes
from flash_moe.planning.needs import Kind, Needs, needs

LINEAR, FULL = Kind("linear_attention", True), Kind("full_attention", True)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sparse(tmp_path_factory.mktemp("sparse") / "397b", FULL_SIZE)


def of(folder: Path, k: int = 4, float_bytes: int = 4, expert_io: str = "slots") -> Needs:
    checkpoint = open_model(folder)
    return needs(checkpoint, checkpoint.records(), k, float_bytes, expert_io)


def test_397b(large: Path) -> None:
    found = of(large, float_bytes=2)
    assert found.bytes_per_token == 60 * 4 * 7_077_888 == 1_698_693_120
    assert found.experts == 60 * 512 * 7_077_888
    assert found.resident == pytest.approx(5.58e9, rel=1e-3)
    assert of(large, float_bytes=4).resident == pytest.approx(6.20e9, rel=1e-3)  # scales in float32
    assert found.head == 248_320 * 4096 * (4 + 32 / 64) / 8  # 4 bits, and two 16-bit numbers for 64 weights
    assert found.layers == {LINEAR: 45, FULL: 15}
    assert found.kv_per_token == 15 * 2 * 2 * 256 * 2
    assert found.work[LINEAR].state == 4 * 64 * 128 * 128 + 3 * (2 * 16 * 128 + 64 * 128) * 2
    assert found.state == 45 * found.work[LINEAR].state
    assert (found.capacity, found.slots) == (18, 36 * 7_077_888)  # 128 MiB hold 18 records
    assert of(large, expert_io="mapped").slots == 0
    assert of(large, expert_io="resident").slots == found.experts
    assert of(large, k=10).bytes_per_token == 2.5 * found.bytes_per_token


def test_397b_operations_and_bytes_of_a_layer(large: Path) -> None:
    found = of(large, float_bytes=2)
    attention = 4096 * (2 * 32 * 256 + 2 * 2 * 256) + 32 * 256 * 4096  # q with its gate, k and v; o
    delta = 4096 * (2 * 16 * 128 + 2 * 64 * 128 + 2 * 64) + 64 * 128 * 4096  # q and k, v and z, a and b; out
    moe = 4096 * (512 + 1) + 3 * 4096 * 1024  # router and gate; shared expert
    assert found.work[FULL].flops == 2 * (attention + moe)
    assert found.work[LINEAR].flops == 2 * (delta + moe)
    assert expert_flops(found) == 2 * 3 * 4096 * 1024
    assert (found.work[FULL].pair_flops, found.work[LINEAR].pair_flops) == (4 * 32 * 256, 0)
    assert token_bytes(found, FULL) == found.layer[FULL] + 4 * 7_077_888
    assert token_bytes(found, LINEAR) == found.layer[LINEAR] + 2 * found.work[LINEAR].state + 4 * 7_077_888


@pytest.mark.parametrize("form", ["packed", "quantized", "float", "next"])
def test_resident_bytes_are_those_of_a_loaded_model(form: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(f"{form}_checkpoint")
    with Model.load(folder, dtype="float32") as model:
        held = sum(array.nbytes for _, array in tree_flatten(model._decoder.parameters()))
        assert of(folder).slots == sum(memory.nbytes for memory in model._store._bank.memory)
        cache = model._decoder.new_cache()
    # numbers derived from single weights, such as the decay, are not stored
    assert of(folder).resident == pytest.approx(held, rel=5e-3)
    assert of(folder).state == cache.nbytes
