"""Prints the part of CHANGELOG.md that describes a release, after checking that the tag is the version.

python tools/release_notes.py v0.2.0
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def notes(tag: str) -> str:
    """Returns what CHANGELOG.md says of a version.

    Raises:
        ValueError: the tag is not the version of the library, or CHANGELOG.md and CITATION.cff do not know the version.
    """
    source = (ROOT / "src/flash_moe/__init__.py").read_text(encoding="utf-8")
    version = re.search(r'^__version__ = "(.+)"$', source, re.MULTILINE)[1]  # type: ignore[index]
    if tag != f"v{version}":
        raise ValueError(f"the tag is {tag}, expected v{version}, the version in src/flash_moe/__init__.py")
    if f"version: {version}\n" not in (ROOT / "CITATION.cff").read_text(encoding="utf-8"):
        raise ValueError(f"CITATION.cff does not say version {version}")
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    found = re.search(rf"^## \[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d\n(.+?)(?=^## |^\[)", changelog, re.M | re.S)
    if found is None:
        raise ValueError(f"CHANGELOG.md has no section [{version}] with a date")
    return found[1].strip()


if __name__ == "__main__":
    try:
        print(notes(sys.argv[1]))
    except ValueError as error:
        sys.exit(f"error: {error}")
