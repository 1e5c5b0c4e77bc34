"""Plans of several machines."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from flash_moe.cli import app
from flash_moe.planning.chips import parse_machine
from flash_moe.planning.costs import Group
from flash_moe.planning.plan import Plan, plan


@pytest.mark.parametrize(("machines", "experts"), [(1, 4), (2, 1), (2, 4), (3, 4), (2, 10), (4, 5)])
def test_the_busiest_machine(machines: int, experts: int) -> None:
    """As counted over all ways to spread the experts."""
    ways = list(itertools.product(range(machines), repeat=experts))
    most = [np.bincount(way).max() for way in ways]
    assert Group(machines).busiest(experts) == pytest.approx(np.mean(most) / experts)


def test_sums() -> None:
    assert Group().sum_seconds(1000) == 0
    assert Group(2, 1e-3, 1e6).sum_seconds(1000) == pytest.approx(2e-3 + 1e-3)
    assert Group(4, 1e-3, 1e6).sum_seconds(1000) == pytest.approx(6e-3 + 1.5e-3)


def planned(folder: Path, machines: int, latency: float = 1e-5) -> Plan:
    machine = parse_machine("M3 Max 48GB")
    return plan(str(folder), experts_per_token=4, prompt=100, context=100, machine=machine,
                group=Group(machines, latency))  # fmt: skip


def test_more_machines_read_less_each(packed_checkpoint: Path) -> None:
    one, two, four = (planned(packed_checkpoint, n) for n in (1, 2, 4))
    assert one.needs.experts // 2 == two.needs.experts
    assert one.decode["cold"] and two.decode["cold"] and four.decode["cold"]
    assert one.decode["cold"].network == 0 < two.decode["cold"].network
    assert one.decode["cold"].ssd > two.decode["cold"].ssd > four.decode["cold"].ssd
    assert two.decode["cold"].ssd == pytest.approx(one.decode["cold"].ssd * Group(2).busiest(4))
    assert one.prefill["cold"] and two.prefill["cold"]
    assert two.prefill["cold"].ssd < 0.6 * one.prefill["cold"].ssd
    slow = planned(packed_checkpoint, 2, latency=5e-3)
    assert slow.decode["cold"]
    added = slow.decode["cold"].total - two.decode["cold"].total
    assert added == pytest.approx(4 * 2 * (5e-3 - 1e-5))  # layers, messages


def test_the_command(packed_checkpoint: Path) -> None:
    base = ["plan", str(packed_checkpoint), "--machine", "M3 Max 48GB"]
    shown = CliRunner().invoke(app, [*base, "--machines", "2", "--latency", "0.2"])
    assert shown.exit_code == 0, shown.output
    assert "on 2 machines, each" in shown.output
    assert "sums over 2 machines" in shown.output
    assert "Assumed: 0.2 ms" in shown.output
    assert all(len(line) <= 80 for line in shown.output.splitlines() if str(packed_checkpoint) not in line)
    found = json.loads(CliRunner().invoke(app, [*base, "--machines", "3", "--json"]).output)
    assert found["machines"]["machines"] == 3
    assert "--machines" in CliRunner().invoke(app, [*base, "--latency", "1"]).output
