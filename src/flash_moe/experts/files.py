"""Open files of a checkpoint: checked against change, read at an offset, and asked what the page cache holds of them."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import sys
import weakref
from pathlib import Path

import numpy as np

PAGE = mmap.PAGESIZE
_F_RDAHEAD = 45  # of macOS, <sys/fcntl.h>
_MS_INVALIDATE = 2  # of msync, in Linux and macOS alike
_LOWEST_BIT = bytes(byte & 1 for byte in range(256))
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
_libc.msync.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class MappedFile:
    """A file opened for reading, and mapped so that its pages can be used in place.

    Attributes:
        pages: the whole file as bytes, [size] uint8; touching them reads the file.
        close: closes the descriptor, as happens by itself when nothing refers to the file any more. The mapping goes when
            the last array over it does.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.fd = os.open(path, os.O_RDONLY)
        self.close = weakref.finalize(self, os.close, self.fd)
        self._state = self._stat()
        self._map = mmap.mmap(self.fd, 0, access=mmap.ACCESS_READ)
        _no_readahead(self.fd, self._map)
        self.pages = np.frombuffer(self._map, np.uint8)
        self._address = self.pages.ctypes.data

    def change(self) -> str | None:
        """What happened to the file since it was opened, or None. Mapped pages of a shortened file must not be touched."""
        state = self._stat()
        if state == self._state:
            return None
        if state[0] != self._state[0]:
            return f"the file is now {state[0]} bytes long, it was {self._state[0]} when opened; load the model again"
        return "the file was changed since it was opened; load the model again"

    def read_into(self, buffer: np.ndarray, offset: int) -> None:
        """Fills ``buffer`` (uint8, contiguous) with the bytes at ``offset``; other threads run meanwhile.

        Raises:
            OSError: the read failed.
            EOFError: the file ends before the buffer is full.
        """
        done = 0
        while done < buffer.nbytes:
            count = os.preadv(self.fd, [buffer[done:].data], offset + done)
            if count == 0:
                raise EOFError(f"it ends at byte {offset + done}, bytes up to {offset + buffer.nbytes} were expected")
            done += count

    def residency(self, offset: int, nbytes: int) -> bytearray:
        """Of every page of a range 1 where the page cache has it, else 0. Of few pages this is faster than with NumPy."""
        pages = pages_of(offset, nbytes)
        vector = bytearray(len(pages))
        out = ctypes.byref(ctypes.c_char.from_buffer(vector))
        if _libc.mincore(self._address + pages.start * PAGE, len(pages) * PAGE, out):
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), str(self.path))
        return vector.translate(_LOWEST_BIT)  # the system may use the others

    def absent(self, offset: int, nbytes: int) -> np.ndarray:
        """Which pages of a range are not in the page cache: bool, one per page from ``offset // PAGE`` on."""
        return np.frombuffer(self.residency(offset, nbytes), np.uint8) == 0

    def missing_bytes(self, offset: int, nbytes: int) -> int:
        """Bytes of a range that are not in the page cache, by whole pages."""
        return min(self.residency(offset, nbytes).count(0) * PAGE, nbytes)

    def evict(self, offset: int = 0, nbytes: int | None = None, *, flush: bool = False) -> None:
        """Asks the system to drop a range of the file from the page cache; :meth:`absent` says whether it did.

        Linux drops it with ``posix_fadvise``, unless another process maps it. macOS has no such call; there it is
        invalidated through ``msync``, which is not promised to work.

        Args:
            flush: first writes to the disk what was written to the file lately, since unwritten pages stay.
        """
        nbytes = self.pages.size - offset if nbytes is None else nbytes
        pages = pages_of(offset, nbytes)
        first, last = pages.start * PAGE, min(pages.stop * PAGE, self.pages.size)
        if flush:
            os.fsync(self.fd)
        self._map.madvise(mmap.MADV_DONTNEED, first, last - first)  # pages in a page table would stay
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self.fd, first, last - first, os.POSIX_FADV_DONTNEED)
        else:
            _libc.msync(self._address + first, last - first, _MS_INVALIDATE)

    def cached_bytes(self) -> int:
        """Bytes of the file that are in the page cache."""
        return self.pages.size - self.missing_bytes(0, self.pages.size)

    def _stat(self) -> tuple[int, int]:
        status = os.fstat(self.fd)
        return status.st_size, status.st_mtime_ns


def pages_of(offset: int, nbytes: int) -> range:
    """Numbers of the pages of a file that a range of bytes lies in."""
    return range(offset // PAGE, -(-(offset + nbytes) // PAGE))


def _no_readahead(fd: int, mapping: mmap.mmap) -> None:
    """Has the system read what is asked for and no more: behind a record lies one that nobody may want."""
    if sys.platform == "darwin":
        fcntl.fcntl(fd, _F_RDAHEAD, 0)
    else:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
    mapping.madvise(mmap.MADV_RANDOM)
