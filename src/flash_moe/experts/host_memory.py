"""Memory for reads of files, aligned for fast copies and, on CUDA, kept on the host."""

from __future__ import annotations

import ctypes
import logging

import mlx.core as mx
import numpy as np

from .mapped_file import PAGE

logger = logging.getLogger(__name__)

_PREFERRED_LOCATION, _ACCESSED_BY = 3, 5  # values of cuMemAdvise, <cuda.h>
_HOST = -1  # the CPU as a device, <cuda.h>
ALIGNMENT = 64  # bytes of a cache line
MAX_DIMENSION = (1 << 31) - 1  # elements of a dimension of an MLX array


def on_cuda() -> bool:
    """Returns whether MLX computes on a CUDA device."""
    return mx.cuda.is_available() and mx.default_device() != mx.cpu


def keep_on_host(memory: np.ndarray) -> bool:
    """Advises CUDA to leave the pages of an MLX array on the host and to map them for the device.

    On CUDA, every MLX array that the host has accessed is in managed memory. Its pages move to the processor that uses
    them. This is good for memory that one processor uses often, but slow for memory that the host writes and the device
    reads once.

    The advice affects only speed, so a refusal of the driver is logged and raises no error. Memory that is not managed,
    as on some integrated devices, does not move anyway.

    Args:
        memory: NumPy view of an array that was evaluated in this thread. The advice covers the whole pages inside it.
            It lasts until MLX frees the memory, so a later array of this size may inherit it.

    Returns:
        Whether the advice was given; False if MLX does not use a CUDA device.
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
    """Gives the advice for a range of whole pages and the device of this thread's context.

    Raises:
        OSError: there is no driver, or the driver refuses.
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
    """Returns evaluated zeros, [records, words] uint32, at an aligned address.

    MLX's GPU back ends align memory to pages. Its CPU allocator places an array 8 bytes after an address from
    ``malloc``. Linux copies from the page cache to such an address at a quarter of the speed (measured: 3 instead of 14
    GB/s). On the CPU, this function therefore returns an aligned view of a longer array. A dimension has at most 2^31 - 1
    elements, so a bank of more than 8.6 GB cannot be such a view and is not aligned.
    """
    count = records * words
    longest = count + ALIGNMENT // 4
    if mx.default_device() != mx.cpu or longest > MAX_DIMENSION:
        bank = mx.zeros((records, words), dtype=mx.uint32)
    else:
        longer = mx.zeros(longest, dtype=mx.uint32)
        mx.eval(longer)
        first = _distance(np.array(longer, copy=False)) // 4
        bank = longer[first : first + count].reshape(records, words)
    mx.eval(bank)
    return bank


def read_buffer(nbytes: int) -> np.ndarray:
    """Returns an uninitialised buffer for reads: [nbytes] uint8."""
    longer = np.empty(nbytes + ALIGNMENT, np.uint8)
    first = _distance(longer)
    return longer[first : first + nbytes]


def _distance(memory: np.ndarray) -> int:
    """Returns the number of bytes from the start of the memory to the first aligned address."""
    return int(-memory.ctypes.data % ALIGNMENT)
