"""FLASH_MOE_REQUIRE=clang,torch: tools without which no test may be skipped. CI sets it; a developer need not.

A skip whose reason names one of them as a word is a failure instead.
"""

from __future__ import annotations

import os
import re
from collections.abc import Generator

import pytest

VARIABLE = "FLASH_MOE_REQUIRE"


def required_tool(reason: str) -> str | None:
    """Returns the first required tool that a skip's reason names."""
    tools = filter(None, (tool.strip() for tool in os.environ.get(VARIABLE, "").split(",")))
    return next((tool for tool in tools if re.search(rf"\b{re.escape(tool)}\b", reason)), None)


def _not_skipped(report: pytest.TestReport | pytest.CollectReport) -> None:
    if report.skipped and not hasattr(report, "wasxfail") and isinstance(report.longrepr, tuple):
        reason = report.longrepr[2]
        if tool := required_tool(reason):
            report.outcome = "failed"
            report.longrepr = f"{reason}\n{VARIABLE} names {tool}, so this may not be skipped: install it."


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    _not_skipped(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    _not_skipped(report)
    return report
