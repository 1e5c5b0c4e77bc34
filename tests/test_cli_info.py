"""`flash-moe info` prints what the library finds, as a table or as JSON."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from command_line import failed, flash_moe_command

from flash_moe.packing.info import describe


def test_info_table(packed_checkpoint: Path) -> None:
    found = describe(packed_checkpoint, 2)
    lines = flash_moe_command("info", packed_checkpoint, "-k", 2).stdout.splitlines()
    table = dict(re.split(r" {2,}", line, maxsplit=1) for line in lines)
    assert len({line.index(value) for line, value in zip(lines, table.values(), strict=True)}) == 1
    assert table["layers"] == "4, 1 of them with full attention"
    assert table["form"] == "packed"
    assert table["expert format"] == "4-bit, groups of 32"
    assert table["vocabulary"] == "288 tokens"
    kilobytes = found.bytes_per_token / 1000
    assert table["experts per token"] == f"{kilobytes:.0f} kB at K=2, {2 * kilobytes:.0f} kB at the model's own 4"


@pytest.mark.parametrize(("k", "expected"), [("3", 3), ("own", 4), (None, 4)])
def test_info_json(float_checkpoint: Path, k: str | None, expected: int) -> None:
    result = flash_moe_command("info", float_checkpoint, "--json", *(["-k", k] if k else []))
    found = json.loads(result.stdout)
    assert found == vars(describe(float_checkpoint, expected))


def test_info_k_beyond_the_experts(packed_checkpoint: Path) -> None:
    assert "expected an integer from 1 to 4" in failed(flash_moe_command("info", packed_checkpoint, "-k", 17), code=2)
