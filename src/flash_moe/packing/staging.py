"""A folder that is filled in resumable steps, and that appears only when it is complete."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ..amounts import format_bytes
from ..errors import CheckpointError, DiskSpaceError

_PLAN = "conversion.json"
_OWNER = re.compile(rb"(process \d+ on .*)?")  # content of a lock, which is empty if its owner was killed early


class Staging:
    """The folder ``DST.partial`` beside the destination: the future destination in ``content``, and notes on the
    progress.

    Only one process at a time can use it: the file ``DST.partial.lock`` is locked until :meth:`release`.

    Each step writes its file under a temporary name, flushes it to the disk, renames it, and then writes a small JSON
    receipt. If the same conversion is started again, steps with a receipt are not repeated.

    Args:
        destination: the folder to create; it must not exist.
        plan: description of the conversion. A partial folder with another plan is rejected.

    Attributes:
        folder: folder with the files of the future destination.

    Raises:
        CheckpointError: the destination exists, another process is working on it, or the partial folder is damaged or
            belongs to another conversion.
    """

    def __init__(self, destination: Path, plan: Mapping[str, Any]) -> None:
        self.destination = destination
        self._work = destination.with_name(destination.name + ".partial")
        self.folder = self._work / "content"
        self._plan = json.loads(json.dumps(plan))
        self._lock = _Lock(destination.with_name(destination.name + ".partial.lock"))
        if destination.parent.is_dir():
            self._lock.acquire(self._work)
        try:
            self._check()
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Unlocks the folder for other processes. This process must not use it afterwards."""
        self._lock.release()

    def _check(self) -> None:
        if os.path.lexists(self.destination):
            raise CheckpointError(f"{self.destination} exists already; choose another destination, or delete it")
        above = _existing(self.destination.parent)
        bad = None if above.is_dir() else above
        if self._work.is_symlink() or (self._work.exists() and not self._work.is_dir()):
            bad = self._work
        if bad is not None:
            raise CheckpointError(f"{bad} is not a folder; choose another destination, or move it away")
        if self._is_foreign():
            raise CheckpointError(
                f"{self._work} was left by another conversion (other source or options); "
                "start that one again to finish it, or delete the folder"
            )

    def require_space(self, nbytes: int) -> None:
        """Checks that ``nbytes`` bytes in total fit on the disk, including existing files.

        Raises:
            DiskSpaceError: they do not fit. Nothing was written.
        """
        parent = _existing(self.destination.parent).resolve()
        done = sum(file.stat().st_size for file in self.folder.glob("*") if ".tmp" not in file.suffixes)
        done += sum(file.stat().st_blocks * 512 for file in self._work.glob("*/*") if file.parent != self.folder)
        needed, free = nbytes - done, shutil.disk_usage(parent).free
        if needed > free:
            raise DiskSpaceError(
                f"{self.destination} needs {format_bytes(needed)} more, but {parent} has {format_bytes(free)} free; "
                "make room or choose another disk (nothing was written)"
            )

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Converts operating system errors inside the block to errors that say what to do.

        Raises:
            DiskSpaceError: the disk is full.
            CheckpointError: writing failed for another reason.
        """
        try:
            yield
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):  # another program filled the disk meanwhile
                raise DiskSpaceError(
                    f"the disk of {self.folder} is full; make room and start again: it continues where it stopped"
                ) from error
            refused = error.errno in (errno.EROFS, errno.EACCES, errno.EPERM)
            advice = "choose a folder that you may write to" if refused else "start again to continue"
            raise CheckpointError(f"writing {self.folder} failed: {error}; {advice}") from error

    def begin(self) -> None:
        """Creates the folder, and removes temporary files of interrupted steps.

        Raises:
            CheckpointError: another process is working on it.
        """
        if not self._lock.held:
            self.destination.parent.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(self._work)
            self._check()
        if not self.folder.exists() and self._work.exists():
            shutil.rmtree(self._work)  # notes on content that already became a destination
        self._work.mkdir(parents=True, exist_ok=True)
        _write_text(self._work / _PLAN, json.dumps(self._plan))
        self.folder.mkdir(exist_ok=True)
        for leftover in self.folder.glob("*.tmp*"):
            leftover.unlink()

    def receipt(self, name: str) -> Any:
        """Returns the receipt of the step that made file ``name``; None if the step is not done."""
        return self._note(f"{name}.done") if (self.folder / name).exists() else None

    def beside(self, name: str) -> Path:
        """Returns a folder for temporary data outside the content, which is removed at the end."""
        folder = self._work / name
        folder.mkdir(exist_ok=True)
        return folder

    def note(self, name: str) -> None:
        """Records the completion of a step that makes no file of the content."""
        _write_text(self._work / f"{name}.done", "true")

    def noted(self, name: str) -> bool:
        """Returns whether :meth:`note` was called with this name, in this or an earlier run."""
        return self._note(f"{name}.done") is True

    def adopt(self, path: Path, name: str, receipt: Any) -> None:
        """Moves a finished file into the content as ``name``, unless it is already there, and writes its receipt."""
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
        path.replace(self.folder / name)
        _write_text(self._work / f"{name}.done", json.dumps(receipt))

    def temporary(self, name: str) -> Path:
        """Returns the path for writing file ``name`` before :meth:`commit`."""
        return self.folder / f"{name}.tmp.safetensors"

    def commit(self, name: str, receipt: Any) -> None:
        """Moves the temporary file into place and records that the step is done."""
        temporary = self.temporary(name)
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
        temporary.replace(self.folder / name)
        _write_text(self._work / f"{name}.done", json.dumps(receipt))

    def forget(self, name: str) -> None:
        """Marks the step of file ``name`` as not done."""
        (self._work / f"{name}.done").unlink(missing_ok=True)

    def save(self, name: str, array: np.ndarray) -> None:
        """Saves an array beside the content atomically. It stays until it is discarded or the work is finished."""
        temporary = self._work / f"{name}.tmp"
        with temporary.open("wb") as stream:
            np.save(stream, array)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(self._work / name)

    def saved(self, name: str) -> np.ndarray | None:
        """Returns the saved array of this name; None if there is none."""
        path = self._work / name
        try:
            return np.load(path) if path.exists() else None
        except (ValueError, EOFError):  # the disk lost it, so treat it as not saved
            return None

    def discard(self, name: str) -> None:
        """Removes a saved array, if there is one."""
        (self._work / name).unlink(missing_ok=True)

    def write_text(self, name: str, text: str) -> None:
        """Writes a small file atomically."""
        _write_text(self.folder / name, text)

    def finish(self) -> None:
        """Renames the content to the destination atomically, and removes the notes."""
        self.folder.rename(self.destination)
        shutil.rmtree(self._work)

    def _is_foreign(self) -> bool:
        """Returns whether the partial folder belongs to another conversion. Raises CheckpointError if it is not ours."""
        held = [file for file in self._work.glob("*") if file.name != f"{_PLAN}.tmp" or not file.is_file()]
        plan = self._note(_PLAN)
        if plan is None and (self._work / _PLAN).exists():
            raise CheckpointError(f"{self._work / _PLAN} is damaged; delete {self._work} and start again")
        if held and plan is None:
            raise CheckpointError(
                f"{self._work} is not the folder of a conversion; choose another destination, or move it away"
            )
        return bool(held) and plan != self._plan and self.folder.exists()

    def _note(self, name: str) -> Any:
        """Returns a note; None if it does not exist, or the disk lost its content."""
        path = self._work / name
        try:
            return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
        except ValueError:
            return None


class _Lock:
    """A lock file that only one process at a time can lock.

    The lock ends with the process. Releasing it removes the file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd: int | None = None

    @property
    def held(self) -> bool:
        return self._fd is not None

    def acquire(self, guarded: Path) -> None:
        """Locks the file.

        Raises:
            CheckpointError: another process, which is named, holds the lock; or the file is not a lock, or cannot be made.
        """
        while self._fd is None:
            try:
                fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
            except OSError as error:
                why = "it is a link" if self._path.is_symlink() else error.strerror
                raise CheckpointError(
                    f"{self._path} cannot be created ({why}); choose another destination, or move it away"
                ) from error
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if self._path.exists() and os.path.samestat(os.fstat(fd), self._path.stat()):
                    if not _OWNER.fullmatch(os.pread(fd, 1000, 0)):
                        raise CheckpointError(
                            f"{self._path} is not a lock of a conversion; choose another destination, or move it away"
                        )
                    os.truncate(fd, 0)
                    os.pwrite(fd, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
                    self._fd = fd
            except BlockingIOError:
                who = os.pread(fd, 1000, 0).decode(errors="replace") or "another process"
                raise CheckpointError(f"{who} is at work on {guarded}; wait until it is done, or stop it") from None
            finally:
                if self._fd is None:  # its owner removed it between our opening and locking
                    os.close(fd)

    def release(self) -> None:
        """Removes and unlocks the file, if this process holds the lock."""
        if self._fd is not None:
            fd, self._fd = self._fd, None
            try:
                self._path.unlink(missing_ok=True)
            finally:  # even if that fails, the lock must not outlive its owner
                os.close(fd)


def _existing(folder: Path) -> Path:
    """Returns the nearest parent of a folder, or the folder itself, that exists."""
    while not os.path.lexists(folder):
        folder = folder.parent
    return folder


def _write_text(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)
