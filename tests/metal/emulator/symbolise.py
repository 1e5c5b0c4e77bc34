"""Turns the code addresses in a runtime report into lines of the kernel's source."""

import re
import shutil
import subprocess
from pathlib import Path


def symbolise(report: str, library: Path, files: dict[str, str]) -> str:
    """`report` with `@0x...` replaced by `file:line` and each such place followed by the text of that line.

    Args:
        report: What the runtime wrote.
        library: The kernel's shared library, with line tables.
        files: The author's texts by file name; deeper frames (shim, MLX preamble) are skipped.
    """
    places = _places(sorted(set(re.findall(r"@(0x[0-9a-f]+)", report))), library, files)
    report = re.sub(r"@(0x[0-9a-f]+)", lambda match: places.get(match[1], match[1]), report)
    return re.sub(r"(\S+):(\d+)", lambda match: match[0] + _quote(files.get(match[1]), int(match[2])), report)


def _quote(text: str | None, line: int) -> str:
    lines = (text or "").splitlines()
    return f" `{lines[line - 1].strip()}`" if 0 < line <= len(lines) else ""


def _places(addresses: list[str], library: Path, files: dict[str, str]) -> dict[str, str]:
    if not addresses or not shutil.which("addr2line"):
        return {}
    # -i gives the whole chain of inlined calls, innermost first; -a marks where each address begins
    command = ["addr2line", "-a", "-i", "-e", str(library), *addresses]
    text = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    places = {}
    for address, block in zip(addresses, re.split(r"^0x[0-9a-f]+\n", text, flags=re.M)[1:], strict=False):
        frames = [re.sub(r"^.*/| \(discriminator \d+\)", "", frame) for frame in block.splitlines()]
        known = [frame for frame in frames if frame.rsplit(":", 1)[0] in files]
        if known:
            places[address] = known[0] + (f" (called from {known[-1]})" if known[-1] != known[0] else "")
    return places
