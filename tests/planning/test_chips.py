"""Machines by name, and the 397B model on one of them by hand."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from sparse_checkpoint import FULL_SIZE, write_sparse

from flash_moe import ArgumentError
from flash_moe.planning.chips import _CHIPS, parse_machine
from flash_moe.planning.plan import plan


@pytest.mark.parametrize("text", ["M3 Max 48GB", "m3 max 48 gb", "Apple M3 Max, 48GB", "  M3 MAX 48 GiB "])
def test_names(text: str) -> None:
    machine = parse_machine(text)
    assert (machine.name, machine.memory) == ("M3 Max 48 GB", 48 << 30)
    assert (machine.bandwidth, machine.flops, machine.ssd) == (400e9, 14.2e12, 6e9)


@pytest.mark.parametrize("chip", _CHIPS)
def test_every_chip_can_be_named(chip: str) -> None:
    assert parse_machine(f"{chip} 64GB").name == f"{chip} 64 GB"


@pytest.mark.parametrize("text", ["", "48GB", "M3 Max 0GB", "M4 Ultra 64GB", "M99 8GB", "Ryzen 64GB", "M3 Max 48"])
def test_unknown(text: str) -> None:
    with pytest.raises(ArgumentError, match=r"expected a chip and its memory, such as 'M3 Max 48GB', .*M1, M1 Pro"):
        parse_machine(text)


def test_a_chip_alone() -> None:
    with pytest.raises(ArgumentError, match="how much memory the machine has; add it, as in 'M5 48GB'"):
        parse_machine("apple m5")


def test_397b_on_a_laptop(tmp_path: Path) -> None:
    folder = str(write_sparse(tmp_path / "397b", FULL_SIZE))
    found = plan(folder, experts_per_token=4, machine=parse_machine("M3 Max 48GB"), prompt=1024, skew=0.5)
    assert (found.expert_io, found.packed, found.measured) == ("mapped", True, False)
    assert found.memory.resident == pytest.approx(5.58e9, rel=1e-3)
    assert found.memory.fits
    cold, expected, warm = (found.decode[state] for state in ("cold", "expected", "warm"))
    assert cold.ssd == pytest.approx(1_698_693_120 / (0.8 * 6e9))
    assert (cold.page_cache, warm.ssd) == (0, 0)
    assert expected.ssd == pytest.approx((1 - found.shares["expected"].decode) * cold.ssd)
    share = found.memory.left / found.needs.experts
    assert share < found.shares["expected"].decode < 2 * share  # popular experts are there more often
    read = 5_579_071_232 - 572_129_280 + 1_698_693_120 + 572_129_280  # all but the embeddings, and K experts a layer
    read += 2 * found.needs.state - 572_129_280
    assert warm.memory == pytest.approx(read / (0.7 * 400e9), rel=0.01)
    assert math.isinf(found.costs.reads.memory)
    one = plan(folder, experts_per_token=None, machine=parse_machine("M3 Max 48GB"))
    assert one.decode["cold"].ssd == pytest.approx(2.5 * cold.ssd)


def test_a_machine_that_is_too_small(tmp_path: Path) -> None:
    folder = str(write_sparse(tmp_path / "397b", FULL_SIZE))
    found = plan(folder, experts_per_token=4, machine=parse_machine("M1 8GB"), context=262_144)
    assert not found.memory.fits
    assert found.memory.largest_context < 262_144
    assert found.shares["expected"] == (0, 0, 0)
