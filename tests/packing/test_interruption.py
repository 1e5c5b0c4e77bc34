"""A conversion that was interrupted, at whatever step, is continued by the next, if that is the same."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from conversions import Interrupted, contents

from flash_moe import CheckpointError
from flash_moe.packing.convert import convert
from flash_moe.progress import Progress

SRC = Path(__file__).parents[2] / "src"


class TestInterruption:
    def test_at_every_step(
        self, small_quantized: Path, small_packed: Path, tmp_path: Path, interrupt: Callable[[int], Any]
    ) -> None:
        """Fails at the first step and starts again, then at the second, and so on until a conversion has no more steps."""
        expected, destination = contents(small_packed), tmp_path / "packed"
        number, finished = 0, False
        while not finished:
            number += 1
            try:
                convert(small_quantized, destination, progress=interrupt(number))
                finished = True
            except Interrupted:
                if destination.exists():  # the last steps only tidy up
                    assert contents(destination) == expected
                    shutil.rmtree(destination)
                else:
                    convert(small_quantized, destination, progress=interrupt(-1))
                    assert contents(destination) == expected
                    assert not destination.with_name("packed.partial").exists()
                    shutil.rmtree(destination)
        assert number > 40  # so many steps there are
        assert contents(destination) == expected

    def test_again_and_again(
        self, small_quantized: Path, small_packed: Path, tmp_path: Path, interrupt: Callable[[int], Any]
    ) -> None:
        """Every attempt is interrupted where the one before was, and still each makes headway."""
        destination, attempts = tmp_path / "packed", 0
        while not destination.exists():
            attempts += 1
            assert attempts < 30
            try:
                convert(small_quantized, destination, progress=interrupt(24))
            except Interrupted:
                continue
        assert attempts > 3
        assert contents(destination) == contents(small_packed)

    def test_killed(self, small_quantized: Path, small_packed: Path, tmp_path: Path) -> None:
        """SIGKILL: no clean-up code runs, and what was not flushed is lost."""
        expected = contents(small_packed)

        def run(number: int) -> tuple[Path, subprocess.CompletedProcess[str]]:
            destination = tmp_path / str(number) / "packed"
            destination.parent.mkdir()
            script = [sys.executable, str(Path(__file__).with_name("interrupted.py"))]
            done = subprocess.run(
                [*script, str(small_quantized), str(destination), str(number)],
                capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(SRC)}, check=False,
            )  # fmt: skip
            return destination, done

        destination, whole = run(0)
        assert contents(destination) == expected
        steps = int(whole.stdout)
        with ThreadPoolExecutor(2) as pool:
            for destination, done in pool.map(
                run, [2, *range(5, steps - 6, steps // 3), *range(steps - 6, steps + 1, 2)]
            ):
                assert done.returncode == -signal.SIGKILL, done.stderr
                if not destination.exists():
                    convert(small_quantized, destination)
                assert contents(destination) == expected

    @pytest.fixture
    def half_done(self, small_quantized: Path, tmp_path: Path) -> Path:
        """A destination whose resident files and first layer are finished."""
        destination = tmp_path / "packed"
        layer = destination.with_name("packed.partial") / "content" / "experts-00000.safetensors"

        def stop(progress: Progress) -> None:
            if layer.exists():
                raise Interrupted

        with pytest.raises(Interrupted):
            convert(small_quantized, destination, progress=stop)
        assert not destination.exists()
        return destination

    def test_finished_files_are_kept(self, half_done: Path, small_quantized: Path) -> None:
        content = half_done.with_name("packed.partial") / "content"
        kept = {file.name: file.stat().st_ino for file in content.glob("*.safetensors") if ".tmp" not in file.name}
        assert "experts-00000.safetensors" in kept and len(kept) > 2
        stamps = {name: (content / name).stat().st_mtime_ns for name in kept}
        convert(small_quantized, half_done)
        assert {name: (half_done / name).stat().st_ino for name in kept} == kept
        assert {name: (half_done / name).stat().st_mtime_ns for name in kept} == stamps

    def test_a_finished_file_that_was_deleted_is_made_again(
        self, half_done: Path, small_quantized: Path, small_packed: Path
    ) -> None:
        (half_done.with_name("packed.partial") / "content" / "model-resident.safetensors").unlink()
        convert(small_quantized, half_done)
        assert contents(half_done) == contents(small_packed)

    def test_other_options_are_refused(self, half_done: Path, small_quantized: Path) -> None:
        for options in ({"bits": 2}, {"group_size": 32}):
            with pytest.raises(CheckpointError, match=r"packed.partial was left by another conversion .*delete"):
                convert(small_quantized, half_done, **options)
        convert(small_quantized, half_done)

    def test_another_source_is_refused(self, half_done: Path, small_quantized: Path, tmp_path: Path) -> None:
        copy = Path(shutil.copytree(small_quantized, tmp_path / "copy"))
        with pytest.raises(CheckpointError, match="left by another conversion"):
            convert(copy, half_done)

    @pytest.mark.parametrize("name", ["config.json", "flash_moe.json", "experts-00001.safetensors"])
    def test_changed_source_is_refused(self, small_packed: Path, tmp_path: Path, name: str) -> None:
        source = Path(shutil.copytree(small_packed, tmp_path / "source"))

        def stop(progress: Progress) -> None:
            raise Interrupted

        with pytest.raises(Interrupted):
            convert(source, tmp_path / "packed", bits=2, progress=stop)
        os.utime(source / name, ns=(0, 0))
        with pytest.raises(CheckpointError, match="left by another conversion"):
            convert(source, tmp_path / "packed", bits=2)

    def test_leftover_notes_of_a_finished_conversion_do_no_harm(
        self, half_done: Path, small_quantized: Path, small_float: Path
    ) -> None:
        """Killed between naming the destination and tidying up; then the destination is moved away."""
        partial = half_done.with_name("packed.partial")
        shutil.rmtree(partial / "content")
        convert(small_float, half_done, bits=2)
        assert not partial.exists()
