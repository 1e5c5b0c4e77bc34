"""README, the pages of docs/ and all docstrings: words, links, and commands that exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer
from snippets import LANGUAGES, NEEDS, PAGES, ROOT, blocks, runs

from flash_moe.cli import app

REPOSITORY = "https://github.com/flash-moe-developers/flash_moe"
RAW = "https://raw.githubusercontent.com/flash-moe-developers/flash_moe/main/"
WORDS = [
    tuple(part.strip() for part in line.rsplit(" | ", 1))
    for line in (Path(__file__).parent / "words.txt").read_text(encoding="utf-8").splitlines()
    if line and not line.startswith("#")
]
TEXTS = [*PAGES, *(ROOT / name for name in ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"))]
TEXTS += sorted((ROOT / "src").rglob("*.py"))
names = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def test_forbidden_words() -> None:
    found = []
    for file in TEXTS:
        text = file.read_text(encoding="utf-8")
        for pattern, instead in WORDS:
            for match in re.finditer(rf"\b(?:{pattern})\b".replace(" ", r"\s+"), text, re.IGNORECASE):
                line = text.count("\n", 0, match.start()) + 1
                found.append(f"{file.relative_to(ROOT)}:{line}: {match[0]!r}; instead: {instead}")
    assert not found, "\n".join(found)


@names
def test_blocks_say_their_language(page: Path) -> None:
    unknown = [
        f"{page.name}:{block.line}: {block.language!r}" for block in blocks(page) if block.language not in LANGUAGES
    ]
    assert not unknown, unknown


@names
def test_commands_exist_or_say_what_they_need(page: Path) -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    extras = re.findall(r"^([\w-]+) = \[", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    for block in blocks(page):
        for command in block.commands:
            words = shlex.split(command, comments=True)
            where = f"{page.name}:{block.line}: {command}"
            if words[0] == "flash-moe":
                understood(words[1:], where)
            elif words[:2] == ["pip", "install"]:
                wanted = re.fullmatch(r"(?:flash-moe|-e \.)(?:\[([\w,-]+)\])?", " ".join(words[2:]))
                assert wanted, where
                assert set((wanted[1] or "dev").split(",")) <= set(extras), where
            elif words[0] == "make":
                assert words[1] in targets, where
            else:
                assert NEEDS.search(command), f"{where}: neither run nor marked"


def understood(arguments: list[str], where: str) -> None:
    """Asserts that a command and its options exist."""
    command, context = typer.main.get_command(app), None
    while True:
        context = command.context_class(command, parent=context, info_name=command.name)
        if not hasattr(command, "resolve_command"):
            break
        command.parse_args(context, list(arguments))  # a group: it may put a command's name before its arguments
        _, command, arguments = command.resolve_command(context, [*context._protected_args, *context.args])
    try:
        _, rest, _ = command.make_parser(context).parse_args(args=list(arguments))
    except Exception as error:
        raise AssertionError(f"{where}: {error}") from error
    assert not rest, f"{where}: {rest} is too much"


@names
def test_links_into_the_repository(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        for start in (f"{REPOSITORY}/blob/main/", f"{REPOSITORY}/tree/main/", RAW):
            if link.startswith(start):
                path = ROOT / link.removeprefix(start).partition("#")[0]
                assert path.exists(), f"{page.name}: {link} leads nowhere"


def test_readme_is_short_and_works_on_pypi() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 120
    relative = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if not link.startswith(("https://", "#"))]
    assert not relative
    lines = [line.lstrip("# ").lower() for line in text.splitlines() if line.startswith("#")]
    headings = {re.sub(r"[^\w -]", "", line).replace(" ", "-") for line in lines}
    assert {link[1:] for link in re.findall(r"\]\((#[^)\s]+)\)", text)} <= headings


def test_every_page_is_in_the_menu() -> None:
    menu = re.findall(r": ([\w-]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(menu) == sorted(page.name for page in PAGES if page.parent != ROOT)


def test_links_between_pages() -> None:
    """As `make docs` does, which also looks at anchors: pages that are linked are there."""
    for page in PAGES:
        for link in re.findall(r"\]\(([\w-]+\.md)(?:#[\w-]+)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_something_runs() -> None:
    """The marks must not hide everything from tests/clients/test_docs.py."""
    commands = [command for page in PAGES for block in blocks(page) for command in block.commands]
    assert sum(map(runs, commands)) > 20
