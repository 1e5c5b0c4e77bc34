"""Memory that this process may use, and models that need more."""

from __future__ import annotations

from pathlib import Path

import pytest

from flash_moe import ArgumentError, MemoryLimitError, Model, limits


@pytest.fixture
def system(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A made-up /sys/fs/cgroup; the process's groups are in ``groups`` beside it."""
    root = tmp_path / "cgroup"
    monkeypatch.setattr(limits, "_ROOT", root)
    monkeypatch.setattr(limits, "_GROUPS", tmp_path / "groups")
    return root


def write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def test_without_control_groups(system: Path) -> None:
    assert limits.group_limit() is None
    assert limits.memory_limit() == limits.machine_memory() > 1 << 26


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("0::/a/b", {"a/b/memory.max": "max", "a/memory.max": "5000"}, 5000),
        ("0::/a/b", {"a/b/memory.max": "4000", "a/memory.max": "5000"}, 4000),
        ("0::/a", {"unified/a/memory.max": "6000"}, 6000),
        ("0::/not/seen/in/here", {"memory.max": "7000"}, 7000),
        (
            "9:cpu,memory:/x\n0::/",
            {"memory/x/memory.limit_in_bytes": "8000", "memory/memory.limit_in_bytes": str(1 << 63)},
            8000,
        ),
        ("9:memory:/x\n8:cpu:/y", {"memory/y/memory.limit_in_bytes": "1"}, None),
        ("", {"memory/memory.limit_in_bytes": "9000"}, 9000),
    ],
)
def test_the_least_limit_counts(system: Path, groups: str, files: dict[str, str], expected: int | None) -> None:
    write(system.parent / "groups", groups + "\n")
    for name, text in files.items():
        write(system / name, text + "\n")
    assert limits.group_limit() == expected
    if expected is not None:
        assert limits.memory_limit() == expected


def test_a_model_that_cannot_fit(packed_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flash_moe.loading.group_limit", lambda: 1 << 20)
    with pytest.raises(MemoryLimitError, match=r"needs at least .* MB .*allows 1;"):
        Model.load(packed_checkpoint)
    monkeypatch.setattr("flash_moe.loading.group_limit", lambda: limits.resident_bytes() + (500 << 20))
    Model.load(packed_checkpoint).close()
    Model.load(packed_checkpoint, expert_io="slots", expert_cache=1 << 40).close()  # no more than all experts
    with pytest.raises(ArgumentError):
        Model.load(packed_checkpoint, expert_cache=-1)


def test_a_model_larger_than_the_machine(packed_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flash_moe.loading.group_limit", lambda: None)
    monkeypatch.setattr("flash_moe.loading.machine_memory", lambda: 1 << 20)
    with pytest.raises(
        MemoryLimitError, match=r"needs at least .* MB .*this machine has 1; use a smaller expert_cache"
    ):
        Model.load(packed_checkpoint, expert_io="resident")
    monkeypatch.setattr("flash_moe.loading.back_end", lambda: "cuda")  # weights may be in the memory of the GPU
    Model.load(packed_checkpoint, expert_io="resident").close()
