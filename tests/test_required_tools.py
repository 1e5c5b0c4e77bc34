"""Where CI requires a tool, no test is skipped for want of it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
SKIPPED = {
    "in_a_test": "import pytest\ndef test_it(): pytest.skip('needs no_such_tool, version 3')",
    "in_a_fixture": "import pytest\n@pytest.fixture\ndef it(): pytest.skip('no_such_tool is missing')\ndef test_it(it): ...",
    "by_a_mark": "import pytest\n@pytest.mark.skipif(True, reason='no_such_tool')\ndef test_it(): ...",
    "as_a_module": "import pytest\npytest.importorskip('no_such_tool')\ndef test_it(): ...",
}


@pytest.mark.parametrize(("required", "fails"), [("clang", False), ("clang, no_such_tool", True)])
def test_a_required_tool_is_not_skipped(required: str, fails: bool, tmp_path: Path) -> None:
    for name, text in SKIPPED.items():
        (tmp_path / f"test_{name}.py").write_text(text)
    command = [sys.executable, "-m", "pytest", "-p", "required_tools", "-p", "no:cacheprovider", "-q"]
    environment = os.environ | {"FLASH_MOE_REQUIRE": required, "PYTHONPATH": str(TESTS)}
    environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    environment.pop("CI", None)  # where it is set, pytest does not shorten its summary
    done = subprocess.run(
        [*command, "--continue-on-collection-errors", str(tmp_path)],
        capture_output=True, text=True, env=environment, cwd=tmp_path, check=False,
    )  # fmt: skip
    assert done.stdout.count("names no_such_tool, so this may not be skipped") == (len(SKIPPED) if fails else 0)
    last = done.stdout.splitlines()[-1]
    assert ("failed" in last, "error" in last, "skipped" in last) == (fails, fails, not fails)
