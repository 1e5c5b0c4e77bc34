"""Where a conversion writes: nothing of others is touched, and a disk that is or gets full is an error."""

from __future__ import annotations

import errno
import io
import os
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conversions import Interrupted, contents
from expected_records import stored_tensors

from flash_moe import CheckpointError, DiskSpaceError
from flash_moe.packing.convert import convert
from flash_moe.progress import Progress

Usage = namedtuple("Usage", "total used free")


class TestDestination:
    @pytest.mark.parametrize("kind", ["folder", "empty folder", "file"])
    def test_must_not_exist(self, small_quantized: Path, small_packed: Path, tmp_path: Path, kind: str) -> None:
        destination = tmp_path / "packed"
        if kind == "file":
            destination.write_text("mine")
        elif kind == "folder":
            shutil.copytree(small_packed, destination)
        else:
            destination.mkdir()
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(CheckpointError, match=r"exists already; choose another destination, or delete it"):
            convert(small_quantized, destination)
        assert sorted(tmp_path.rglob("*")) == before

    def test_somebody_else_s_partial_folder_is_not_touched(self, small_quantized: Path, tmp_path: Path) -> None:
        other = tmp_path / "packed.partial"
        other.mkdir()
        (other / "thesis.txt").write_text("mine")
        with pytest.raises(CheckpointError, match=r"is not the folder of a conversion; .* or move it away"):
            convert(small_quantized, tmp_path / "packed")
        assert (other / "thesis.txt").read_text() == "mine"

    @pytest.mark.parametrize("name", ["work.tmp/thesis.txt", "a.tmp", "conversion.json.tmp/thesis.txt"])
    def test_temporary_names_do_not_make_a_partial_folder_ours(
        self, small_quantized: Path, tmp_path: Path, name: str
    ) -> None:
        other = tmp_path / "packed.partial" / name
        other.parent.mkdir(parents=True)
        other.write_text("mine")
        with pytest.raises(CheckpointError, match=r"is not the folder of a conversion; .* or move it away"):
            convert(small_quantized, tmp_path / "packed")
        assert other.read_text() == "mine"

    def test_somebody_else_s_lock_file_is_not_touched(self, small_quantized: Path, tmp_path: Path) -> None:
        target, lock = tmp_path / "precious", tmp_path / "packed.partial.lock"
        target.write_text("mine")
        lock.symlink_to(target)
        with pytest.raises(
            CheckpointError, match=r"packed.partial.lock cannot be created .it is a link.; .*move it away"
        ):
            convert(small_quantized, tmp_path / "packed")
        assert target.read_text() == "mine" and lock.is_symlink()
        lock.unlink()
        lock.write_text("mine")
        with pytest.raises(CheckpointError, match=r"packed.partial.lock is not a lock of a conversion"):
            convert(small_quantized, tmp_path / "packed")
        assert lock.read_text() == "mine"

    @pytest.mark.parametrize("name", ["packed", "packed.partial", "above/packed"])
    @pytest.mark.parametrize("kind", ["file", "link"])
    def test_what_is_in_the_way_is_named_at_the_beginning(
        self, small_quantized: Path, tmp_path: Path, name: str, kind: str
    ) -> None:
        way = tmp_path / ("above" if name == "above/packed" else name)
        if kind == "file":
            way.write_text("mine")
        else:
            way.symlink_to("nowhere")
        destination = tmp_path / name.removesuffix(".partial")
        with pytest.raises(CheckpointError, match=rf"{way} .*choose another destination"):
            convert(small_quantized, destination)
        assert [*tmp_path.iterdir()] == [way]

    def test_a_disk_that_cannot_be_written_to(
        self, small_quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(*_: Any, **__: Any) -> None:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))

        monkeypatch.setattr(Path, "mkdir", refuse)
        with pytest.raises(CheckpointError, match=r"Read-only file system; choose a folder that you may write to"):
            convert(small_quantized, tmp_path / "new" / "packed")
        monkeypatch.setattr(os, "open", refuse)
        with pytest.raises(CheckpointError, match=r"cannot be created .Read-only file system.; choose another"):
            convert(small_quantized, tmp_path / "packed")

    def test_parents_are_made(self, small_quantized: Path, small_packed: Path, tmp_path: Path) -> None:
        convert(small_quantized, tmp_path / "a" / "b" / "packed")
        assert contents(tmp_path / "a" / "b" / "packed") == contents(small_packed)


class TestDiskSpace:
    def test_is_checked_before_anything_is_written(
        self, small_quantized: Path, small_packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        needed = sum(len(data) for _, _, data in stored_tensors(small_packed).values()) + 8 * 16384
        monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 0, needed // 2))
        with pytest.raises(
            DiskSpaceError, match=r"needs \d+ kB more, .* has \d+ kB free.*make room or choose another disk"
        ):
            convert(small_quantized, tmp_path / "new" / "packed")
        assert list(tmp_path.iterdir()) == []
        monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 0, needed))
        convert(small_quantized, tmp_path / "new" / "packed")

    def test_what_is_there_already_counts(
        self, small_quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interrupt: Callable[[int], Any]
    ) -> None:
        seen: list[tuple[int, int]] = []

        def stop(progress: Progress) -> None:
            seen.append((progress.done, progress.total))
            if progress.share > 0.5:
                raise Interrupted

        with pytest.raises(Interrupted):
            convert(small_quantized, tmp_path / "packed", progress=stop)
        done, total = seen[-2]  # the last one is not finished
        leftover = tmp_path / "packed.partial" / "content" / "x.tmp.safetensors"
        leftover.write_bytes(bytes(total))  # makes no headway
        monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 0, (total - done) // 2))
        with pytest.raises(DiskSpaceError):
            convert(small_quantized, tmp_path / "packed")
        monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 0, total - done + 65536))
        convert(small_quantized, tmp_path / "packed")

    @pytest.mark.parametrize("number", range(1, 6))
    def test_disk_that_fills_up_while_a_file_is_written(
        self, small_quantized: Path, small_packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
    ) -> None:
        real, written = Path.open, 0

        class Full(io.FileIO):
            def write(self, data: Any) -> int:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        def opening(path: Path, mode: str = "r", *rest: Any, **keywords: Any) -> Any:
            nonlocal written
            written += mode == "wb"
            if mode == "wb" and written == number:
                return Full(path, "w")
            return real(path, mode, *rest, **keywords)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "open", opening)
            with pytest.raises(DiskSpaceError, match="full; make room and start again: it continues"):
                convert(small_quantized, tmp_path / "packed")
        assert not (tmp_path / "packed").exists()
        convert(small_quantized, tmp_path / "packed")
        assert contents(tmp_path / "packed") == contents(small_packed)

    def test_other_failures_of_the_disk(
        self, small_quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(fd: int) -> None:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(CheckpointError, match=r"writing .* failed: .*Input/output error; start again to continue"):
            convert(small_quantized, tmp_path / "packed")
