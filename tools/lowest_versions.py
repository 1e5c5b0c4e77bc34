"""Do the lower bounds in pyproject.toml hold? Installs exactly those versions in a fresh environment and tries them.

    python tools/lowest_versions.py [FOLDER]

Runs tests/smoke and the tests of downloads there: what needs no mlx-lm, whose own bounds are higher. Needs Python 3.11.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

import tomllib

ROOT = Path(__file__).parents[1]
EXTRAS = ["cpu", "chat", "notebook", "plot", "server", "structured"]
TESTS = ["tests/smoke", "tests/checkpoint/test_hub.py"]
BOUND = re.compile(r"([A-Za-z0-9_.-]+)(?:\[[^]]*\])?>=([0-9.]+)")


def lowest(project: dict) -> list[str]:
    """Returns ``name==version`` for every direct dependency, and for those of the extras."""
    wanted = [*project["dependencies"], *(line for extra in EXTRAS for line in project["optional-dependencies"][extra])]
    found = {}
    for line in wanted:
        match = BOUND.match(line)
        assert match, f"{line!r} has no lower bound"
        found[match[1]] = match[2]
    return [f"{name}=={version}" for name, version in found.items()]


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(sys.argv[1] if len(sys.argv) > 1 else temporary)
        folder.mkdir(parents=True, exist_ok=True)
        pins = lowest(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"])
        print("\n".join(pins), flush=True)
        (constraints := folder / "lowest.txt").write_text("\n".join(pins) + "\n")
        venv.create(folder / "venv", with_pip=True)
        python = folder / "venv" / "bin" / "python"
        packages = [f"{ROOT}[{','.join(EXTRAS)}]", "pytest>=8", "hypothesis", "safetensors"]
        install = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", "-c", constraints, *packages]
        subprocess.run(install, check=True)
        # Old releases warn of much that is none of our business.
        pytest = [python, "-m", "pytest", "-W", "default", "-p", "no:cacheprovider", *TESTS]
        subprocess.run(pytest, cwd=ROOT, check=True)


if __name__ == "__main__":
    main()
