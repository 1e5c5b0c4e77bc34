"""Builds the sdist and the wheel, and uses both as somebody would who has no clone.

    python tools/check_packages.py [--whole-sdist]

Needs the packages `build` and `twine` (extra `ci`) and, for the sdist's own tests, the extra `dev`.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
QUICK = ["tests/smoke", "tests/typing", "tests/checkpoint", "tests/text", "tests/test_architecture.py"]
QUICK += ["tests/test_demo.py", "tests/test_examples.py", "tests/test_model.py"]
IN_THE_WHEEL = ["flash_moe/py.typed", "flash_moe_command.py", "flash_moe/_shipped/models/demo/tokenizer.json"]
IN_THE_WHEEL += ["flash_moe/_shipped/kernels/add_rms_norm.metal"]
INSTALL = 'pip install "flash-moe[cpu]"'


def run(*command: str | Path, check: bool = True, **options: object) -> subprocess.CompletedProcess[str]:
    """Runs a program after showing it."""
    print("$", *command, flush=True)
    return subprocess.run(command, check=check, text=True, **options)  # type: ignore[call-overload,no-any-return]


def build(folder: Path) -> tuple[Path, Path]:
    """Returns the paths of sdist and wheel; the wheel is built from the sdist."""
    run(sys.executable, "-m", "build", "--outdir", folder, ROOT)
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    run(sys.executable, "-m", "twine", "check", "--strict", sdist, wheel)
    names = zipfile.ZipFile(wheel).namelist()
    assert set(IN_THE_WHEEL) <= set(names), f"of {IN_THE_WHEEL} the wheel lacks some: {names}"
    foreign = [name for name in names if name.split("/")[0].split("-")[0] not in ("flash_moe", "flash_moe_command.py")]
    assert not foreign, f"the wheel holds {foreign}"
    return sdist, wheel


def use_wheel(wheel: Path, folder: Path) -> None:
    """Installs the wheel in three steps, and uses it far from the clone."""
    venv.create(folder / "venv", with_pip=True)
    bin, outside = folder / "venv" / "bin", folder / "outside"
    pip = (bin / "python", "-m", "pip", "install", "-q", "--disable-pip-version-check")
    outside.mkdir()
    if sys.platform == "linux":
        run(*pip, wheel)
        says_what_to_install(bin, outside)  # no MLX
        run(*pip, "--no-deps", "mlx")
        says_what_to_install(bin, outside)  # MLX without a back end
    run(*pip, f"{wheel}[cpu]" if sys.platform == "linux" else wheel, "pytest>=8")
    shutil.copytree(ROOT / "tests" / "smoke", outside / "smoke")
    shutil.copy(ROOT / "tests" / "typing" / "user_program.py", outside)
    run(bin / "python", "-m", "pytest", "-q", "-W", "error", "-p", "no:cacheprovider", "smoke", cwd=outside)
    run(bin / "flash-moe", "generate", "demo", "What is K?", cwd=outside)
    checked = (
        "--python-executable",
        bin / "python",
        "--config-file=",
        "--cache-dir",
        folder / "mypy",
        "user_program.py",
    )
    run(sys.executable, "-m", "mypy", "--strict", *checked, cwd=outside)


def says_what_to_install(bin: Path, outside: Path) -> None:
    for command in ([bin / "flash-moe", "--help"], [bin / "python", "-c", "import flash_moe"]):
        done = run(*command, check=False, cwd=outside, capture_output=True)
        assert done.returncode == 1 and INSTALL in done.stderr, f"expected {INSTALL!r} in: {done.stderr}"


def test_sdist(sdist: Path, folder: Path, whole: bool) -> None:
    """Runs the sdist's own tests from an unpacked copy: all that `make test` runs, or a quick part and the rest imported."""
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (unpacked,) = folder.glob("flash_moe-*/")
    environment = os.environ | {"PYTHONPATH": str(unpacked / "src")}
    found = run(
        sys.executable, "-c", "import flash_moe; print(flash_moe.__file__)",
        cwd=unpacked, env=environment, capture_output=True,
    ).stdout  # fmt: skip
    assert Path(found.strip()).is_relative_to(unpacked.resolve()), found
    pytest = (sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", "not slow and not clients")
    if not whole:
        run(*pytest, "--collect-only", "-qq", cwd=unpacked, env=environment, stdout=subprocess.DEVNULL)
    run(*pytest, *([] if whole else QUICK), cwd=unpacked, env=environment)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--whole-sdist", action="store_true", help="run all tests from the sdist that `make test` runs")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary).resolve()
        sdist, wheel = build(folder / "dist")
        use_wheel(wheel, folder)
        test_sdist(sdist, folder, options.whole_sdist)


if __name__ == "__main__":
    main()
