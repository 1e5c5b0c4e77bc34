"""Open files of a checkpoint: detects changes, reads at an offset, and queries the page cache."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import resource
import sys
import weakref
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from ..checkpoint.safetensors import FileState
from ..errors import CheckpointError

PAGE = mmap.PAGESIZE
_F_RDAHEAD = 45  # constant of macOS, <sys/fcntl.h>
_MS_INVALIDATE = 2  # flag of msync, the same on Linux and macOS
_MAP_FAILED = ctypes.c_void_p(-1).value
_LOWEST_BIT = bytes(byte & 1 for byte in range(256))
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *3 * [ctypes.c_int], ctypes.c_int64]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
_libc.msync.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class UnmappableError(CheckpointError):
    """The file is on a file system that cannot map files."""


class _Mapping:
    """A mapping of a file, which lives until no array uses it. Unlike Python's mmap, it keeps no second descriptor.

    Raises:
        OSError: the file system cannot map files.
    """

    def __init__(self, fd: int, size: int) -> None:
        address = _libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
        if address == _MAP_FAILED:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        self.address: int = address
        weakref.finalize(self, _libc.munmap, address, size).atexit = False  # threads may read until the end
        self.__array_interface__ = {"version": 3, "typestr": "|u1", "shape": (size,), "data": (address, True)}


class MappedFile:
    """A file that is open for reading and, if the file system supports it, mapped, so that its pages can be used in
    place.

    If it cannot be mapped, every page counts as missing.

    Args:
        state: the state that the file must have; None records the current state.

    Attributes:
        size: size of the file in bytes.
        unmappable: the reason why the file cannot be mapped; None if it is mapped.
        close: function that closes the descriptor. It is called automatically when the object is freed. The mapping
            ends with the last array that uses it.

    Raises:
        OSError: the file cannot be opened, or has a different state.
    """

    def __init__(self, path: Path, state: FileState | None = None) -> None:
        self.path = path
        self.fd = _open(path)
        self.close = weakref.finalize(self, os.close, self.fd)
        self.close.atexit = False
        self._state = FileState.of(self.fd) if state is None else state
        if (reason := self.change()) is not None:
            self.close()
            raise OSError(reason)
        self.size = self._state.size
        self.unmappable: OSError | None = None
        self._mapping: _Mapping | None = None
        try:
            self._mapping = _Mapping(self.fd, self.size)
        except OSError as error:
            self.unmappable = error
        self._no_readahead()

    @property
    def pages(self) -> np.ndarray:
        """The whole file as mapped bytes, [size] uint8. Raises OSError if it cannot be mapped."""
        if self._mapping is None:
            raise OSError(str(self.unmappable))
        return np.asarray(self._mapping)

    def change(self) -> str | None:
        """Describes how the file has changed since its state was recorded; None if it has not.

        Mapped pages of a truncated file must not be accessed.
        """
        return self._state.change(FileState.of(self.fd))

    def read_into(self, target: np.ndarray | Sequence[np.ndarray], offset: int) -> None:
        """Fills one contiguous uint8 buffer, or several in order, with the bytes at ``offset``.

        It releases the GIL during the read.

        Raises:
            OSError: the read failed.
            EOFError: the file ends before the buffers are full.
        """
        buffers = [target] if isinstance(target, np.ndarray) else target
        end = offset + sum(buffer.nbytes for buffer in buffers)
        left = [buffer.data for buffer in buffers]
        while left:
            count = os.preadv(self.fd, left, offset)
            if count == 0:
                raise EOFError(f"it ends at byte {offset}, bytes up to {end} were expected")
            offset += count
            while left and count >= left[0].nbytes:
                count -= left.pop(0).nbytes
            if count:
                left[0] = left[0][count:]

    def residency(self, offset: int, nbytes: int) -> bytearray:
        """Returns one byte per page of a range: 1 if the page is cached, else 0. An unmapped file has only zeros."""
        pages = pages_of(offset, nbytes)
        vector = bytearray(len(pages))
        if self._mapping is not None:
            out = ctypes.byref(ctypes.c_char.from_buffer(vector))
            if _libc.mincore(self._mapping.address + pages.start * PAGE, len(pages) * PAGE, out):
                return bytearray(len(pages))
        return vector.translate(_LOWEST_BIT)  # the system may set other bits

    def missing_pages(self, offset: int, nbytes: int) -> np.ndarray:
        """Returns a bool per page, from page ``offset // PAGE`` on: whether the page is missing from the page cache."""
        return np.frombuffer(self.residency(offset, nbytes), np.uint8) == 0

    def missing_bytes(self, offset: int, nbytes: int) -> int:
        """Returns the bytes of a range that are missing from the page cache, in whole pages."""
        return min(self.residency(offset, nbytes).count(0) * PAGE, nbytes)

    def evict(self, offset: int = 0, nbytes: int | None = None, *, flush: bool = False) -> None:
        """Asks the system to drop a range of the file from the page cache. Check the result with :meth:`missing_pages`.

        Linux drops the range with ``posix_fadvise``, unless another process maps it. macOS has no such call; ``msync``
        invalidates the range there, but macOS does not guarantee the effect.

        Args:
            flush: whether to write recent changes to the disk first; pages that are not written yet stay cached.
        """
        nbytes = self.size - offset if nbytes is None else nbytes
        pages = pages_of(offset, nbytes)
        first, last = pages.start * PAGE, min(pages.stop * PAGE, self.size)
        if flush:
            os.fsync(self.fd)
        self.unload(first, last - first)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self.fd, first, last - first, os.POSIX_FADV_DONTNEED)
        elif self._mapping is not None:
            _libc.msync(self._mapping.address + first, last - first, _MS_INVALIDATE)

    def unload(self, offset: int, nbytes: int) -> None:
        """Removes pages from this process's page table, so that they can be dropped.

        ``offset`` is a multiple of PAGE.
        """
        if self._mapping is not None:
            _libc.madvise(self._mapping.address + offset, nbytes, mmap.MADV_DONTNEED)

    def cached_bytes(self) -> int:
        """Returns the bytes of the file that are in the page cache."""
        return self.size - self.missing_bytes(0, self.size)

    def _no_readahead(self) -> None:
        """Disables read-ahead, because the next record in the file may not be needed."""
        with suppress(OSError):  # it affects only speed
            if sys.platform == "darwin":
                fcntl.fcntl(self.fd, _F_RDAHEAD, 0)
            else:
                os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_RANDOM)
        if self._mapping is not None:
            _libc.madvise(self._mapping.address, self.size, mmap.MADV_RANDOM)


def pages_of(offset: int, nbytes: int) -> range:
    """Returns the page numbers of a range of bytes of a file."""
    return range(offset // PAGE, -(-(offset + nbytes) // PAGE))


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY)
    except OSError as error:
        if error.errno not in (errno.EMFILE, errno.ENFILE):
            raise
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        raise OSError(
            error.errno,
            f"{error.strerror}: this process may have {limit} open at a time, and a model needs one for each of its files; "
            "close other models, or raise the limit with `ulimit -n 4096` in the shell that starts this program",
        ) from error
