"""Memory that files are read into is aligned, whatever the allocators do."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from flash_moe.experts import host_memory
from flash_moe.experts.host_memory import ALIGNMENT, new_bank, read_buffer


@pytest.mark.parametrize("records", [1, 3, 64])
@pytest.mark.parametrize("words", [16, 4096, 100_000])
def test_banks(records: int, words: int) -> None:
    bank = new_bank(records, words)
    memory = np.array(bank, copy=False)
    assert memory.ctypes.data % ALIGNMENT == 0
    assert (bank.shape, bank.dtype) == ((records, words), mx.uint32)
    assert memory.shape == (records, words) and memory.flags.c_contiguous and not memory.any()
    memory[-1, -1] = 7  # it is the bank's own memory
    memory[0, 0] += 5
    assert (bank[-1, -1].item(), bank[0, 0].item()) == ((7, 5) if bank.size > 1 else (12, 12))


def test_a_bank_that_is_too_long_for_one_dimension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "MAX_DIMENSION", 1000)
    monkeypatch.setattr(host_memory, "_distance", None)  # there is no longer array to be a view of
    bank = new_bank(10, 100)
    assert (bank.shape, bank.dtype, bank.sum().item()) == ((10, 100), mx.uint32, 0)


@pytest.mark.parametrize("rows", [slice(0, 3), slice(5, 6)])
def test_rows_of_a_bank_are_views(rows: slice) -> None:
    bank = new_bank(8, 100_000)
    view = bank[rows].reshape(-1)
    strided = mx.as_strided(view.view(mx.float32), (4, 10), (100, 1), 7)
    mx.eval(view, strided)
    np.array(bank, copy=False)[rows] = 9
    assert (np.array(view) == 9).all() and (np.array(strided.view(mx.uint32)) == 9).all()


@pytest.mark.parametrize("nbytes", [1, 4097, 1 << 20, 1 << 24])
def test_buffers(nbytes: int) -> None:
    buffer = read_buffer(nbytes)
    assert buffer.ctypes.data % ALIGNMENT == 0
    assert (buffer.shape, buffer.dtype) == ((nbytes,), np.uint8)
    buffer.fill(1)
