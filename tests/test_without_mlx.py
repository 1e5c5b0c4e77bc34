"""Without a back end of MLX, importing the library and `flash-moe` say what to install."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src"
NO_MLX = "import sys; sys.modules['mlx'] = None; "  # as if it were not installed
NO_LIBMLX = (
    "libmlx.so: cannot open shared object file: No such file or directory"  # what `pip install mlx` gives on Linux
)


def run(code: str, *arguments: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, filter(None, (path, SOURCE))))}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


@pytest.fixture(params=["no mlx", "no libmlx"])
def without(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path | None]:
    """The beginning of a program, and a folder for its path."""
    if request.param == "no mlx":
        return NO_MLX, None
    (tmp_path / "mlx").mkdir()
    (tmp_path / "mlx" / "__init__.py").touch()
    (tmp_path / "mlx" / "core.py").write_text(f"raise ImportError({NO_LIBMLX!r})")
    return "", tmp_path


def test_importing_says_what_to_install(without: tuple[str, Path | None]) -> None:
    begin, path = without
    done = run(begin + "import flash_moe", path=path)
    assert done.returncode == 1
    message = done.stderr.splitlines()[-1]
    assert message.startswith("ImportError: flash_moe needs MLX")
    assert 'pip install "flash-moe[cpu]"' in message
    assert path is None or NO_LIBMLX in message


def test_the_command_says_it_in_one_line(without: tuple[str, Path | None]) -> None:
    begin, path = without
    done = run(begin + "import flash_moe_command as command; command.main()", "--help", path=path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: flash_moe needs MLX") and done.stderr.count("\n") == 1
    assert 'pip install "flash-moe[cpu]"' in done.stderr


def test_other_failures_keep_their_traceback() -> None:
    done = run("import sys; sys.modules['typer'] = None; import flash_moe_command as command; command.main()")
    assert "Traceback" in done.stderr and "typer" in done.stderr.splitlines()[-1]
