"""The code blocks of README.md and docs/, and what each of them needs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# A command with such a remark is not run: it needs a download, the hub, a Mac or time.
NEEDS = re.compile(r"#.*\b(downloads?|downloaded|the hub|a Mac|not run)\b")
LANGUAGES = {"sh", "python", "json", "text"}


class Block(NamedTuple):
    """A fenced block: its language, the number of its first line, and its text."""

    language: str
    line: int
    text: str

    @property
    def commands(self) -> list[str]:
        """Returns the commands of a shell block: lines joined at a backslash, each with the remarks above it."""
        found, begun, remarks = [], "", ""
        for line in self.text.splitlines() if self.language == "sh" else []:
            if line.startswith("#"):
                remarks += f"  {line}"
            elif line.endswith("\\"):
                begun += f"{line[:-1].strip()} "
            elif line.strip():
                found.append(begun + line.strip() + remarks)
                begun = remarks = ""
        assert not begun, f"a command without an end: {begun}"
        return found


def blocks(page: Path) -> list[Block]:
    """Returns all fenced blocks of a page."""
    found, fence = [], None
    lines = page.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines):
        if line.startswith("```") and fence is None:
            fence = (line[3:].strip(), number + 1)
        elif line == "```" and fence is not None:
            found.append(Block(fence[0], fence[1] + 1, "\n".join(lines[fence[1] : number])))
            fence = None
    assert fence is None, f"{page.name}:{fence[1]}: a block without an end"
    return found


def runs(command: str) -> bool:
    """Returns whether a command line is run as it stands: it needs no download, Mac or long time."""
    return command.startswith("flash-moe ") and not NEEDS.search(command)
