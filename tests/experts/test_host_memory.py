"""Memory that CUDA is advised to leave on the host, against a driver that only takes notes."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from flash_moe.experts import opening
from flash_moe.experts.host_memory import keep_on_host
from flash_moe.experts.mapped_file import PAGE
from flash_moe.experts.opening import ExpertIO, open_store
from flash_moe.experts.slots import SlotStore
from flash_moe.models import open_model

DEVICE, INVALID_VALUE = 2, 1
PREFERRED_LOCATION, ACCESSED_BY, HOST = 3, 5, -1
K, STRIDE = 4, 16384


@dataclass
class Driver:
    """Stands in for libcuda; ``refused`` is a function that fails."""

    refused: str = ""
    calls: list[str] = field(default_factory=list)
    advice: list[tuple[int, int, int, int]] = field(default_factory=list)  # address, bytes, advice, device

    def _called(self, name: str) -> int:
        self.calls.append(name)
        return INVALID_VALUE if name == self.refused else 0

    def cuInit(self, flags: int) -> int:
        assert flags == 0
        return self._called("cuInit")

    def cuCtxGetDevice(self, device: Any) -> int:
        ctypes.cast(device, ctypes.POINTER(ctypes.c_int))[0] = DEVICE
        return self._called("cuCtxGetDevice")

    def cuMemAdvise(self, address: ctypes.c_uint64, nbytes: ctypes.c_size_t, advice: int, device: Any) -> int:
        assert (type(address), type(nbytes)) == (ctypes.c_uint64, ctypes.c_size_t), "an int would be cut to 32 bits"
        self.advice.append((address.value, nbytes.value, advice, getattr(device, "value", device)))
        return self._called("cuMemAdvise")


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    """A driver, and a machine on which nothing else says that MLX does not compute with CUDA."""
    driver, loaded = Driver(), ctypes.CDLL

    def load(name: str, *arguments: Any, **options: Any) -> Any:
        return driver if name == "libcuda.so.1" else loaded(name, *arguments, **options)

    monkeypatch.setattr(ctypes, "CDLL", load)
    monkeypatch.setattr(mx.cuda, "is_available", lambda: True)
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    yield driver


def advice_for(first: int, end: int) -> list[tuple[int, int, int, int]]:
    return [(first, end - first, PREFERRED_LOCATION, HOST), (first, end - first, ACCESSED_BY, DEVICE)]


def at_page() -> tuple[np.ndarray, int]:
    """Memory, and the address of its second page's beginning."""
    memory = np.zeros(6 * PAGE, np.uint8)
    return memory, (memory.ctypes.data // PAGE + 1) * PAGE


@pytest.mark.parametrize(
    ("before", "after", "first", "end"),
    [(0, 3 * PAGE, 0, 3), (-1, 3 * PAGE, 0, 3), (1, 3 * PAGE, 1, 3), (0, 3 * PAGE - 1, 0, 2), (1, 2 * PAGE, 1, 2)],
)
def test_whole_pages_inside_the_memory_are_advised(
    driver: Driver, before: int, after: int, first: int, end: int
) -> None:
    memory, page = at_page()
    start = page - memory.ctypes.data
    assert keep_on_host(memory[start + before : start + after])
    assert driver.calls == ["cuInit", "cuCtxGetDevice", "cuMemAdvise", "cuMemAdvise"]
    assert driver.advice == advice_for(page + first * PAGE, page + end * PAGE)


def test_less_than_a_page_is_left_alone(driver: Driver) -> None:
    memory, page = at_page()
    start = page - memory.ctypes.data
    assert not keep_on_host(memory[start + 1 : start + 2 * PAGE - 1])
    assert not keep_on_host(memory[:0])
    assert driver.calls == []


@pytest.mark.parametrize("refused", ["cuInit", "cuCtxGetDevice", "cuMemAdvise"])
def test_a_driver_that_refuses_is_logged(driver: Driver, refused: str, caplog: pytest.LogCaptureFixture) -> None:
    driver.refused = refused
    with caplog.at_level(logging.WARNING):
        assert not keep_on_host(np.zeros(4 * PAGE, np.uint8))
    assert f"{refused} returned {INVALID_VALUE}, expected 0" in caplog.text
    assert driver.calls[-1] == refused


def test_no_driver_is_logged(driver: Driver, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    with caplog.at_level(logging.WARNING):
        assert not keep_on_host(np.zeros(4 * PAGE, np.uint8))
    assert "libcuda.so.1: cannot open shared object file" in caplog.text


no_cuda: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "another back end": lambda patch: patch.setattr(mx.cuda, "is_available", lambda: False),
    "the CPU": lambda patch: patch.setattr(mx, "default_device", lambda: mx.Device(mx.cpu)),
}


@pytest.mark.parametrize("where", no_cuda)
def test_nothing_happens_elsewhere(driver: Driver, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    no_cuda[where](monkeypatch)
    assert not keep_on_host(np.zeros(4 * PAGE, np.uint8))
    assert driver.calls == []


def test_a_bank_that_passes_records_on_stays_on_the_host(
    driver: Driver, packed_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opening, "_GROUP_BYTES", 0)
    store = open_store(open_model(packed_checkpoint).records(), "slots", K)
    try:
        assert isinstance(store, SlotStore)
        (bank,) = store._bank.memory
        address, nbytes = bank.ctypes.data, 2 * K * STRIDE
        assert bank.nbytes == nbytes
        assert driver.advice == advice_for(-(-address // PAGE) * PAGE, (address + nbytes) // PAGE * PAGE)
    finally:
        store.close()


@pytest.mark.parametrize(
    ("io", "cache", "group"),
    [("slots", 6 * STRIDE, 0), ("slots", 0, 64 * STRIDE), ("mapped", 0, 0), ("resident", 0, 0)],
    ids=["cache", "room for every record", "mapped", "resident"],
)
def test_banks_that_keep_records_are_left_to_move(
    driver: Driver, packed_checkpoint: Path, io: ExpertIO, cache: int, group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opening, "_GROUP_BYTES", group)
    table = open_model(packed_checkpoint).records()
    if group:
        monkeypatch.setattr(opening, "fetch_capacity", lambda table, k: len(table.layouts) * table.num_experts)
    store = open_store(table, io, K, cache)
    store.close()
    assert driver.calls == []
