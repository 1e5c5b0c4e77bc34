"""What expert_io="auto" becomes: measured once per file system and form, remembered, forced, and never in the way."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest
from streaming import Disk, Source

from flash_moe import ArgumentError
from flash_moe.checkpoint.records import RecordTable
from flash_moe.errors import ExpertReadError
from flash_moe.experts import choosing
from flash_moe.experts.choosing import Copying, Reading, Timing, choose, measure_stores
from flash_moe.experts.mapped import MappedStore
from flash_moe.experts.opening import open_store
from flash_moe.experts.slots import SlotStore

MAPPED, SLOTS = Timing(mapped=1.0, slots=2.0), Timing(mapped=2.0, slots=1.0)
ALMOST = Timing(mapped=1.0, slots=1.02)


class Stopwatch:
    """Stands in for the measurement, and counts how often it is asked."""

    def __init__(self, answer: Timing | Exception | None) -> None:
        self.answer, self.calls = answer, 0

    def __call__(self, table: RecordTable, k: int) -> Timing | None:
        self.calls += 1
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@pytest.fixture(autouse=True)
def cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.delenv("FLASH_MOE_EXPERT_IO")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "flash_moe"


@pytest.fixture
def table(sources: dict[str, Source]) -> RecordTable:
    return sources["packed"].table


@pytest.fixture
def new_process(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Forgets what only this process knows."""
    return lambda: monkeypatch.setattr(choosing, "_known", {})


def usual(monkeypatch: pytest.MonkeyPatch, metal: bool) -> str:
    monkeypatch.setattr(mx.metal, "is_available", lambda: metal)
    return "mapped" if metal else "slots"


@pytest.mark.parametrize("metal", [True, False])
@pytest.mark.parametrize(("timing", "choice"), [(MAPPED, "mapped"), (SLOTS, "slots")])
def test_the_faster_store_is_taken(
    table: RecordTable, monkeypatch: pytest.MonkeyPatch, metal: bool, timing: Timing, choice: str
) -> None:
    usual(monkeypatch, metal)
    assert choose(table, 4, Stopwatch(timing)) == choice


@pytest.mark.parametrize(("timing", "kind"), [(MAPPED, MappedStore), (SLOTS, SlotStore)])
def test_the_store_is_opened(table: RecordTable, timing: Timing, kind: type) -> None:
    store = open_store(table, "auto", 4, measure=Stopwatch(timing))
    assert type(store) is kind
    store.close()


@pytest.mark.parametrize("metal", [True, False])
@pytest.mark.parametrize(
    "answer",
    [ALMOST, None, OSError("gone"), RuntimeError("no memory"), ExpertReadError("f", 0, 0, "cut")],
    ids=["a near tie", "no time", "OSError", "RuntimeError", "ExpertReadError"],
)
def test_in_doubt_the_usual_choice(
    table: RecordTable, monkeypatch: pytest.MonkeyPatch, metal: bool, answer: Timing | Exception | None
) -> None:
    expected = usual(monkeypatch, metal)
    assert choose(table, 4, Stopwatch(answer)) == expected


def test_measured_once(table: RecordTable, new_process: Callable[[], None], cache_folder: Path) -> None:
    watch = Stopwatch(MAPPED)
    assert [choose(table, 4, watch) for _ in range(2)] == ["mapped"] * 2
    new_process()
    assert choose(table, 4, watch) == "mapped"
    assert watch.calls == 1
    assert {file.name for file in cache_folder.iterdir()} == {"expert_io.json", "expert_io.lock"}


def test_failures_are_not_remembered(table: RecordTable) -> None:
    assert choose(table, 4, Stopwatch(None)) == choose(table, 4, Stopwatch(OSError())) == "slots"
    assert choose(table, 4, Stopwatch(MAPPED)) == "mapped"


def test_another_file_system_is_measured_anew(table: RecordTable, monkeypatch: pytest.MonkeyPatch) -> None:
    choose(table, 4, Stopwatch(MAPPED))
    real = Path.stat

    def elsewhere(self: Path, **options: bool) -> os.stat_result:
        found = list(real(self, **options))
        return os.stat_result([*found[:2], 12345, *found[3:]])

    monkeypatch.setattr(Path, "stat", elsewhere)
    assert choose(table, 4, Stopwatch(SLOTS)) == "slots"


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{", '{"format": 2, "entries": {}}', '{"format": 1, "entries": []}', "[" * 100_000, "\x00"],
    ids=["empty", "list", "cut", "newer", "entries-list", "deep", "nul"],
)
def test_a_damaged_file_is_replaced(
    table: RecordTable, new_process: Callable[[], None], cache_folder: Path, content: str
) -> None:
    cache_folder.mkdir(parents=True)
    (cache_folder / "expert_io.json").write_text(content)
    assert choose(table, 4, Stopwatch(MAPPED)) == "mapped"
    new_process()
    assert choose(table, 4, Stopwatch(SLOTS)) == "mapped"


def test_an_unknown_choice_in_the_file_is_ignored(
    table: RecordTable, new_process: Callable[[], None], cache_folder: Path
) -> None:
    choose(table, 4, Stopwatch(MAPPED))
    file = cache_folder / "expert_io.json"
    file.write_text(file.read_text().replace('"mapped"', '"resident"'))
    new_process()
    assert choose(table, 4, Stopwatch(SLOTS)) == "slots"


def test_a_cache_folder_that_cannot_be_written(table: RecordTable, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    watch = Stopwatch(MAPPED)
    assert [choose(table, 4, watch) for _ in range(2)] == ["mapped"] * 2
    assert watch.calls == 1  # this process remembers by itself


def test_old_choices_make_room(table: RecordTable, new_process: Callable[[], None], cache_folder: Path) -> None:
    cache_folder.mkdir(parents=True)
    file = cache_folder / "expert_io.json"
    file.write_text(json.dumps({"format": 1, "entries": {str(i): "slots" for i in range(100)}}))
    choose(table, 4, Stopwatch(MAPPED))
    choices = json.loads(file.read_text())["entries"]
    assert (len(choices), list(choices)[:1], list(choices.values())[-1]) == (64, ["37"], "mapped")


@pytest.mark.parametrize("forced", ["mapped", "slots"])
def test_the_variable_forces(table: RecordTable, monkeypatch: pytest.MonkeyPatch, forced: str) -> None:
    monkeypatch.setenv("FLASH_MOE_EXPERT_IO", forced)
    watch = Stopwatch(MAPPED if forced == "slots" else SLOTS)
    assert (choose(table, 4, watch), watch.calls) == (forced, 0)


def test_a_wrong_variable_is_an_error(table: RecordTable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASH_MOE_EXPERT_IO", "resident")
    with pytest.raises(
        ArgumentError, match="FLASH_MOE_EXPERT_IO is 'resident', expected one of mapped, slots, or unset"
    ):
        choose(table, 4, Stopwatch(SLOTS))


@pytest.mark.parametrize("work", [Copying, Reading])
def test_the_measurement_times_both_stores(table: RecordTable, work: type) -> None:
    timing = measure_stores(table, 4, work())
    assert timing is not None
    assert 0 < timing.mapped < 1
    assert 0 < timing.slots < 1


def test_what_uses_records_in_place_is_measured_so_and_remembered_apart(
    table: RecordTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLX's copy of mapped pages, which the kernels of the CPU do not make, must not decide for them."""
    monkeypatch.setattr(choosing, "SECONDS", 5.0)
    copying = MappedStore.fetch

    def slow(self: MappedStore, layer: int, experts: list[int]) -> object:
        time.sleep(0.02)
        return copying(self, layer, experts)

    monkeypatch.setattr(MappedStore, "fetch", slow)
    reading = SlotStore.fetch_bytes

    def slow_bytes(self: SlotStore, layer: int, experts: list[int]) -> object:
        time.sleep(0.02)
        return reading(self, layer, experts)

    monkeypatch.setattr(SlotStore, "fetch_bytes", slow_bytes)
    assert choose(table, 4) == "slots"
    assert choose(table, 4, work=Reading()) == "mapped"
    assert choose(table, 4) == "slots"


@pytest.mark.parametrize("delay", [0.02, 0.2])
def test_the_measurement_ends_in_time(table: RecordTable, monkeypatch: pytest.MonkeyPatch, delay: float) -> None:
    real = MappedStore._arrive

    def slow(self: MappedStore, layer: int, experts: list[int]) -> object:
        time.sleep(delay)
        return real(self, layer, experts)

    monkeypatch.setattr(MappedStore, "_arrive", slow)
    monkeypatch.setattr(choosing, "SECONDS", 0.1)
    start = time.perf_counter()
    timing = measure_stores(table, 4)
    assert time.perf_counter() - start < delay + 0.1 + delay + 0.5  # half a second for a busy machine
    assert timing is not None  # the first round does not count, the second does


def test_a_record_that_cannot_be_read_does_not_fail_the_choice(
    sources: dict[str, Source], disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flash_moe.experts.reader.INLINE", -1)
    table = sources["packed"].table
    extent = table.extents(0, 0)[0]
    disk.fail(extent.file, extent.offset, extent.nbytes)
    with pytest.raises(ExpertReadError):
        measure_stores(table, 4)
    assert choose(table, 4) == "slots"
