"""The version can be released, and every file names the same repository."""

from __future__ import annotations

import re

import pytest
import which_model
from release_notes import notes
from snippets import ROOT

import flash_moe

FILES = ["README.md", "CHANGELOG.md", "SECURITY.md", "CITATION.cff", "mkdocs.yml", "pyproject.toml"]


def test_the_version_can_be_released() -> None:
    assert "### Added" in notes(f"v{flash_moe.__version__}")
    with pytest.raises(ValueError, match=f"expected v{re.escape(flash_moe.__version__)}"):
        notes("v0.0.1")


def test_one_name_of_the_repository() -> None:
    for name in FILES:
        for owner, repository in re.findall(
            r"github(?:usercontent)?\.com/([\w-]+)/(flash_moe)\b", (ROOT / name).read_text()
        ):
            assert (owner, repository) == ("flash-moe-developers", "flash_moe"), name


def test_the_table_of_models_is_what_plan_predicts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["which_model.py", "--check"])
    which_model.main()
