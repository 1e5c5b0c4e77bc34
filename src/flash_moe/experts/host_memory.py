"""Memory that files are read into: at addresses to which the system copies fast, and, where MLX computes on a CUDA
device, on the host's side, where the device reads it over the bus instead of moving its pages.
"""

from __future__ import annotations

import ctypes
import logging

import mlx.core as mx
import numpy as np

from .mapped_file import PAGE

logger = logging.getLogger(__name__)

_PREFERRED_LOCATION, _ACCESSED_BY = 3, 5  # what may be set by cuMemAdvise, <cuda.h>
_HOST = -1  # as a device, <cuda.h>
ALIGNMENT = 64  # bytes, a cache line


def on_cuda() -> bool:
    """Returns whether MLX computes on a CUDA device."""
    return mx.cuda.is_available() and mx.default_device() != mx.cpu


def keep_on_host(memory: np.ndarray) -> bool:
    """Advises CUDA to leave the pages of an MLX array on the host and to map them for the device.

    MLX on CUDA has managed memory behind every array that the host has looked at. Its pages move to the side that touches
    them, which is right for what one side uses often and slow for what the host writes and the device reads once.

    Only speed depends on the advice, so a driver that refuses it is an event for the log and no error: memory that is
    not managed, as on some integrated devices, does not move in the first place.

    Args:
        memory: NumPy's view of an array that has been evaluated in this thread; whole pages inside it are advised.
            The advice lasts until MLX gives the memory back, so the next array of that size may inherit it.

    Returns:
        Whether the advice was given; False also where MLX does not compute on a CUDA device.
    """
    if not on_cuda():
        return False
    address = memory.ctypes.data
    first, end = -(-address // PAGE) * PAGE, (address + memory.nbytes) // PAGE * PAGE
    if first >= end:
        return False
    try:
        _advise(first, end - first)
    except OSError as error:
        logger.warning("CUDA may move %.1f MB of experts to and fro, which is slower: %s", memory.nbytes / 1e6, error)
        return False
    return True


def _advise(address: int, nbytes: int) -> None:
    """Gives the advice for a range of whole pages and the device whose context this thread has.

    Raises:
        OSError: there is no driver, or it refuses.
    """
    cuda = ctypes.CDLL("libcuda.so.1")
    device, pointer, size = ctypes.c_int(), ctypes.c_uint64(address), ctypes.c_size_t(nbytes)
    for name, *arguments in (
        ("cuInit", 0),
        ("cuCtxGetDevice", ctypes.byref(device)),
        ("cuMemAdvise", pointer, size, _PREFERRED_LOCATION, _HOST),
        ("cuMemAdvise", pointer, size, _ACCESSED_BY, device),
    ):
        if code := getattr(cuda, name)(*arguments):
            raise OSError(f"{name} returned {code}, expected 0")


def new_bank(records: int, words: int) -> mx.array:
    """Zeros, evaluated: [records, words] uint32.

    GPU back ends of MLX align their memory to pages. Its CPU allocator puts an array 8 bytes behind an address of
    ``malloc``, to which Linux copies out of the page cache at a quarter of the speed (measured: 3 instead of 14 GB/s); a
    view into a longer array is aligned there.
    """
    if mx.default_device() != mx.cpu:
        bank = mx.zeros((records, words), dtype=mx.uint32)
    else:
        count, longer = records * words, mx.zeros(records * words + ALIGNMENT // 4, dtype=mx.uint32)
        mx.eval(longer)
        first = _distance(np.array(longer, copy=False)) // 4
        bank = longer[first : first + count].reshape(records, words)
    mx.eval(bank)
    return bank


def read_buffer(nbytes: int) -> np.ndarray:
    """Returns uninitialised bytes that reads may fill: [nbytes] uint8."""
    longer = np.empty(nbytes + ALIGNMENT, np.uint8)
    first = _distance(longer)
    return longer[first : first + nbytes]


def _distance(memory: np.ndarray) -> int:
    """Returns bytes from the start to the first aligned address."""
    return int(-memory.ctypes.data % ALIGNMENT)
