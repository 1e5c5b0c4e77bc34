"""Runs a built kernel on buffers that touch unreadable pages on both sides."""

import ctypes
import functools
import mmap
from dataclasses import dataclass
from pathlib import Path

from .errors import MetalError
from .symbolise import symbolise

ORDERS = {"forward": 0, "reverse": 1, "random": 2}
THREADS_PER_THREADGROUP = 1024
THREADGROUP_MEMORY = 32768
_REPORT_BYTES = 1 << 16


class _Buffer(ctypes.Structure):  # struct Buffer in runtime/runtime.h
    _fields_ = (
        ("base", ctypes.c_void_p),
        ("nbytes", ctypes.c_uint64),
        ("writable", ctypes.c_uint32),
        ("initialised", ctypes.c_uint32),
        ("name", ctypes.c_char_p),
    )


class _Launch(ctypes.Structure):  # struct Launch in runtime/launch.cpp
    _fields_ = (
        ("buffers", ctypes.POINTER(_Buffer)),
        ("buffer_count", ctypes.c_uint32),
        ("grid", ctypes.c_uint32 * 3),
        ("threadgroup", ctypes.c_uint32 * 3),
        ("order", ctypes.c_uint32),
        ("check", ctypes.c_uint32),
        ("seconds", ctypes.c_uint32),
        ("seed", ctypes.c_uint64),
        ("text", ctypes.c_void_p),
        ("text_bytes", ctypes.c_uint64),
    )


_mprotect = ctypes.CDLL(None).mprotect
_mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


@dataclass(frozen=True)
class Argument:
    """One buffer of a launch.

    Attributes:
        name: As in the kernel.
        data: Its bytes before the launch.
        writable: Whether it is an output.
        initialised: Whether a kernel may read it before it writes it.
    """

    name: str
    data: bytes
    writable: bool = False
    initialised: bool = True


class _Memory:
    """Shared memory, so that the child's writes come back, with its end against a guard page."""

    GUARD = 16 * mmap.PAGESIZE
    ALIGNMENT = 16  # of the start; up to 15 bytes lie between the end and the guard

    def __init__(self, data: bytes):
        room = -(-max(len(data), 1) // mmap.PAGESIZE) * mmap.PAGESIZE
        self._map = mmap.mmap(-1, room + 2 * self.GUARD)
        base = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        _mprotect(base, self.GUARD, 0)
        _mprotect(base + self.GUARD + room, self.GUARD, 0)
        start = self.GUARD + room - (-(-max(len(data), 1) // self.ALIGNMENT) * self.ALIGNMENT)
        self._bytes = slice(start, start + len(data))
        self._map[self._bytes] = data
        self.address = base + start

    def read(self) -> bytes:
        return self._map[self._bytes]

    def close(self) -> None:
        self._map.close()


@functools.cache
def _load(library: Path) -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(library))
    loaded.emu_threadgroup_bytes.restype = ctypes.c_uint64
    loaded.emu_launch.argtypes = [ctypes.POINTER(_Launch)]
    return loaded


def _check_limits(library: ctypes.CDLL, grid: tuple[int, ...], threadgroup: tuple[int, ...]) -> None:
    for what, size in (("grid", grid), ("threadgroup", threadgroup)):
        if len(size) != 3 or any(n < 1 for n in size):
            raise MetalError(f"launch: {what} must be three positive numbers, found {tuple(size)}")
    threads = functools.reduce(lambda n, k: n * k, threadgroup)
    if threads > THREADS_PER_THREADGROUP:
        raise MetalError(f"launch: {threads} threads per threadgroup, expected at most {THREADS_PER_THREADGROUP}")
    memory = library.emu_threadgroup_bytes()
    if memory > THREADGROUP_MEMORY:
        raise MetalError(f"launch: {memory} bytes of threadgroup memory, expected at most {THREADGROUP_MEMORY}")


def launch(
    library: Path,
    arguments: list[Argument],
    grid: tuple[int, int, int],
    threadgroup: tuple[int, int, int],
    *,
    check: bool,
    order: str,
    seed: int,
    timeout: int,
    files: dict[str, str],
) -> dict[str, bytes]:
    """Run the kernel over the grid.

    Args:
        library: The built kernel.
        arguments: Its buffers, by index.
        grid: Threads along x, y, z.
        threadgroup: Threads of a full threadgroup along x, y, z.
        check: Whether the library was built with instrumentation.
        order: A key of `ORDERS`: which thread, and which threadgroup, goes first.
        seed: Of the random order.
        timeout: CPU seconds before the kernel counts as hanging.
        files: The kernel's source texts by name, for messages.

    Returns:
        The bytes of every writable buffer, by name.

    Raises:
        MetalError: With one line per problem.
    """
    loaded = _load(library)
    _check_limits(loaded, grid, threadgroup)
    memories = [_Memory(argument.data) for argument in arguments]
    text = mmap.mmap(-1, _REPORT_BYTES)
    try:
        table = (_Buffer * len(arguments))(
            *(
                _Buffer(memory.address, len(a.data), a.writable, a.initialised, a.name.encode())
                for memory, a in zip(memories, arguments, strict=True)
            )
        )
        request = _Launch(
            buffers=table,
            buffer_count=len(arguments),
            grid=(ctypes.c_uint32 * 3)(*grid),
            threadgroup=(ctypes.c_uint32 * 3)(*threadgroup),
            order=ORDERS[order],
            check=check,
            seconds=timeout,
            seed=seed,
            text=ctypes.addressof(ctypes.c_char.from_buffer(text)),
            text_bytes=_REPORT_BYTES,
        )
        if loaded.emu_launch(ctypes.byref(request)):
            report = text[:].split(b"\0", 1)[0].decode(errors="replace")
            raise MetalError(symbolise(report.strip() or "the kernel's process died without a word", library, files))
        return {a.name: memory.read() for memory, a in zip(memories, arguments, strict=True) if a.writable}
    finally:
        for memory in memories:
            memory.close()
        text.close()
