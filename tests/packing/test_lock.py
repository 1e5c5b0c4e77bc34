"""Two conversions into one destination: the second says who is at work; what the disk lost is done again."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from flash_moe import CheckpointError
from flash_moe.packing.convert import convert
from flash_moe.packing.staging import Staging
from flash_moe.progress import Progress

HOLD = """
import sys, time
from pathlib import Path
from flash_moe.packing.staging import Staging
from flash_moe.progress import Progress
staging = Staging(Path(sys.argv[1]), {"made": "up"})
staging.begin()
print("at work", flush=True)
time.sleep(60)
"""


def test_a_conversion_that_another_process_is_at_work_on(small_quantized: Path, tmp_path: Path) -> None:
    """Its folder is not called left over, and nothing in it is touched; when the process is killed it is free."""
    destination = tmp_path / "new" / "packed"
    command = [sys.executable, "-c", HOLD, str(destination)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "at work\n"
        before = sorted(destination.parent.rglob("*"))
        for _ in range(2):
            with pytest.raises(CheckpointError, match=rf"process {other.pid} on .* is at work on .*packed.partial"):
                convert(small_quantized, destination)
        assert sorted(destination.parent.rglob("*")) == before
        other.send_signal(signal.SIGKILL)
    with pytest.raises(CheckpointError, match="left by another conversion"):
        convert(small_quantized, destination)
    shutil.rmtree(destination.parent / "packed.partial")
    convert(small_quantized, destination)
    assert os.listdir(destination.parent) == ["packed"]  # noqa: PTH208


def test_a_failed_conversion_leaves_the_folder_to_others(
    small_quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(progress: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(small_quantized, tmp_path / "packed", progress=stop)
    assert not (tmp_path / "packed.partial.lock").exists()
    convert(small_quantized, tmp_path / "packed")


def test_the_lock_of_an_owner_that_finished_meanwhile_is_not_taken_for_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its file is removed between opening and locking it: another process would lock a new one."""
    import fcntl

    path, flock = tmp_path / "packed.partial.lock", fcntl.flock

    def late(fd: int, operation: int) -> None:
        monkeypatch.undo()
        path.unlink()
        flock(fd, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    staging = Staging(tmp_path / "packed", {})
    assert path.exists()
    with pytest.raises(CheckpointError, match="is at work"):
        Staging(tmp_path / "packed", {})
    staging.release()


@pytest.mark.parametrize("content", ["", "{", "\0\0\0\0"])
def test_a_damaged_plan(small_quantized: Path, tmp_path: Path, content: str) -> None:
    folder = tmp_path / "packed.partial"
    folder.mkdir()
    (folder / "conversion.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"conversion.json is damaged; delete .*packed.partial"):
        convert(small_quantized, tmp_path / "packed")
    assert sorted(tmp_path.rglob("*")) == [folder, folder / "conversion.json"]


def test_notes_that_the_disk_lost_are_made_again(small_quantized: Path, small_packed: Path, tmp_path: Path) -> None:
    def stop(progress: Progress) -> None:
        if progress.share > 0.5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(small_quantized, tmp_path / "packed", progress=stop)
    notes = list((tmp_path / "packed.partial").glob("*.done"))
    assert notes
    for note in notes:
        note.write_bytes(b"")
    convert(small_quantized, tmp_path / "packed")
    for file in small_packed.iterdir():
        assert (tmp_path / "packed" / file.name).read_bytes() == file.read_bytes()
