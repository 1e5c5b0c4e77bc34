from __future__ import annotations

import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from expected_records import PROJECTIONS, expected_records, stored_tensors
from safetensors.numpy import load_file

from flash_moe import CheckpointError, DiskSpaceError, Model
from flash_moe.packing.convert import convert

SRC = Path(__file__).parents[2] / "src"
Usage = namedtuple("Usage", "total used free")


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def packed_records(folder: Path) -> dict[tuple[int, int], bytes]:
    """All records of a packed folder, read by the plain safetensors package."""
    return {
        (layer, expert): row.tobytes()
        for layer, file in enumerate(sorted(folder.glob("experts-*.safetensors")))
        for expert, row in enumerate(load_file(file)["experts"])
    }


def padded(data: bytes, multiple: int) -> bytes:
    return data + bytes(-len(data) % multiple)


class TestResult:
    @pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
    @pytest.mark.parametrize("group_size", [32, 64])
    def test_floats_become_what_mlx_makes_of_them(
        self, small_float: Path, tmp_path: Path, bits: int, group_size: int
    ) -> None:
        assert convert(small_float, tmp_path / "packed", bits=bits, group_size=group_size, rounding="nearest") == []
        tensors = {}
        for file in small_float.glob("*.safetensors"):
            tensors |= load_file(file)
        for (layer, expert), record in packed_records(tmp_path / "packed").items():
            prefix = f"model.language_model.layers.{layer}.mlp.experts."
            gate, up = np.split(tensors[prefix + "gate_up_proj"][expert], 2)
            expected = b""
            for weight in (gate, up, tensors[prefix + "down_proj"][expert]):
                for part in mx.quantize(mx.array(weight), group_size=group_size, bits=bits):
                    expected += padded(np.array(part).tobytes(), 64)
            assert record == padded(expected, 16384)

    def test_floats_become_what_mlx_lm_makes_of_them(
        self, small_float: Path, small_packed: Path, tmp_path: Path
    ) -> None:
        """Records and resident weights equal those of `mlx_lm.convert` followed by packing."""
        convert(small_float, tmp_path / "packed", rounding="nearest")
        assert packed_records(tmp_path / "packed") == packed_records(small_packed)
        assert stored_tensors(tmp_path / "packed") == stored_tensors(small_packed)

    def test_quantised_experts_are_copied(self, small_quantized: Path, small_packed: Path) -> None:
        assert packed_records(small_packed) == expected_records(small_quantized)

    def test_resident_weights_are_copied(self, small_quantized: Path, small_packed: Path) -> None:
        source = {n: t for n, t in stored_tensors(small_quantized).items() if ".switch_mlp." not in n}
        packed = {n: t for n, t in stored_tensors(small_packed).items() if n != "experts"}
        assert packed == source

    def test_every_file_is_ordinary_safetensors(self, small_packed: Path) -> None:
        index = json.loads((small_packed / "model.safetensors.index.json").read_text())["weight_map"]
        for file in small_packed.glob("model-*.safetensors"):
            assert sorted(load_file(file)) == sorted(name for name, owner in index.items() if owner == file.name)

    def test_tokenizer_and_settings_come_along(self, small_quantized: Path, small_packed: Path) -> None:
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
            assert (small_packed / name).read_bytes() == (small_quantized / name).read_bytes()

    def test_qwen3_next_with_a_tensor_per_expert(
        self, next_checkpoint: Path, mlx_quantize: Callable[..., Path], tmp_path: Path
    ) -> None:
        quantized = mlx_quantize(next_checkpoint, tmp_path / "quantized", q_bits=8, q_group_size=64)
        convert(next_checkpoint, tmp_path / "direct", bits=8, rounding="nearest")
        assert packed_records(tmp_path / "direct") == expected_records(quantized)
        convert(quantized, tmp_path / "packed")
        with Model.load(tmp_path / "direct") as direct, Model.load(tmp_path / "packed") as packed:
            np.testing.assert_array_equal(direct.logits([5, 6, 7]), packed.logits([5, 6, 7]))

    def test_group_size_applies_to_experts_and_resident_weights(self, small_float: Path, tmp_path: Path) -> None:
        convert(small_float, tmp_path / "packed", group_size=32)
        manifest = json.loads((tmp_path / "packed" / "flash_moe.json").read_text())
        for layer in manifest["layers"].values():
            assert {p["group_size"] for p in layer["layout"]["projections"].values()} == {32}
        assert json.loads((tmp_path / "packed" / "config.json").read_text())["quantization"]["group_size"] == 32

    def test_rounding_twice_warns(self, small_quantized: Path, small_float: Path, tmp_path: Path) -> None:
        (warning,) = convert(small_quantized, tmp_path / "twice", bits=2)
        assert "from 4 to 2 bits" in warning and "bf16" in warning
        assert convert(small_float, tmp_path / "once", bits=2) == []
        assert convert(small_quantized, tmp_path / "same", bits=4) == []

    def test_requantised_records_are_those_of_the_dequantised_weights(
        self, small_quantized: Path, tmp_path: Path
    ) -> None:
        convert(small_quantized, tmp_path / "packed", bits=2, rounding="nearest")
        tensors = load_file(small_quantized / "model.safetensors")
        for (layer, expert), record in packed_records(tmp_path / "packed").items():
            expected = b""
            for projection in PROJECTIONS:
                name = f"language_model.model.layers.{layer}.mlp.switch_mlp.{projection}."
                stored = [mx.array(tensors[name + part][expert]) for part in ("weight", "scales", "biases")]
                weights = mx.dequantize(*stored, group_size=64, bits=4)
                for part in mx.quantize(weights, group_size=64, bits=2):
                    expected += padded(np.array(part).tobytes(), 64)
            assert record == padded(expected, 16384)

    def test_packed_checkpoint_as_source(self, small_packed: Path, small_quantized: Path, tmp_path: Path) -> None:
        assert convert(small_packed, tmp_path / "again") == []
        assert contents(tmp_path / "again") == contents(small_packed)
        (warning,) = convert(small_packed, tmp_path / "fewer", bits=2)
        assert "from 4 to 2 bits" in warning
        convert(small_quantized, tmp_path / "direct", bits=2)
        assert packed_records(tmp_path / "fewer") == packed_records(tmp_path / "direct")

    def test_progress_ends_at_the_total(self, small_quantized: Path, tmp_path: Path) -> None:
        seen: list[tuple[int, int]] = []
        convert(small_quantized, tmp_path / "packed", progress=lambda done, total: seen.append((done, total)))
        assert seen == sorted(seen)
        assert seen[-1][0] == seen[-1][1]
        stored = sum(len(data) for _, _, data in stored_tensors(tmp_path / "packed").values())
        assert seen[-1][1] <= stored + 8 * 16384 and len({total for _, total in seen}) == 1

    def test_memory_stays_below_the_size_of_the_model(self, tmp_path: Path) -> None:
        """What one step has read must be let go before the next."""
        from random_checkpoint import text_config, write_checkpoint

        text = text_config(hidden_size=256, num_hidden_layers=12, num_experts=2, num_experts_per_tok=1)
        source = write_checkpoint(tmp_path / "source", text)
        resident = sum(len(d) for n, (_, _, d) in stored_tensors(source).items() if ".experts." not in n)
        before, held = mx.get_active_memory(), []
        convert(source, tmp_path / "packed", progress=lambda *_: held.append(mx.get_active_memory() - before))
        assert max(held) < resident / 3

    @pytest.mark.parametrize("wrong", [{"bits": 7}, {"bits": 4, "group_size": 48}, {"group_size": 128}], ids=str)
    def test_impossible_options(self, small_float: Path, tmp_path: Path, wrong: dict[str, int]) -> None:
        with pytest.raises(CheckpointError, match=r"expected one of|group"):
            convert(small_float, tmp_path / "packed", **wrong)
        assert list(tmp_path.iterdir()) == []


class Interrupted(BaseException):
    pass


@pytest.fixture
def interrupt(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Callable[..., None]]:
    """``interrupt(n)`` makes the n-th step from now fail; returns what to pass as ``progress``, itself a step."""
    left = 0

    def step(*_: object) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise Interrupted

    def stepping(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            step()
            return real(*arguments, **keywords)

        return call

    for owner, name in (
        (Path, "mkdir"),
        (Path, "replace"),
        (Path, "rename"),
        (Path, "unlink"),
        (os, "fsync"),
        (shutil, "copyfile"),
        (shutil, "rmtree"),
    ):
        monkeypatch.setattr(owner, name, stepping(getattr(owner, name)))

    def begin(number: int) -> Callable[..., None]:
        nonlocal left
        left = number
        return step

    return begin


class TestInterruption:
    def test_at_every_step(
        self, small_quantized: Path, small_packed: Path, tmp_path: Path, interrupt: Callable[[int], Any]
    ) -> None:
        """Fails at the first step and starts again, then at the second, and so on until a conversion has no more steps."""
        expected, destination = contents(small_packed), tmp_path / "packed"
        number, finished = 0, False
        while not finished:
            number += 1
            try:
                convert(small_quantized, destination, progress=interrupt(number))
                finished = True
            except Interrupted:
                if destination.exists():  # the last steps only tidy up
                    assert contents(destination) == expected
                    shutil.rmtree(destination)
                else:
                    convert(small_quantized, destination, progress=interrupt(-1))
                    assert contents(destination) == expected
                    assert not destination.with_name("packed.partial").exists()
                    shutil.rmtree(destination)
        assert number > 40  # so many steps there are
        assert contents(destination) == expected

    def test_again_and_again(
        self, small_quantized: Path, small_packed: Path, tmp_path: Path, interrupt: Callable[[int], Any]
    ) -> None:
        """Every attempt is interrupted where the one before was, and still each makes headway."""
        destination, attempts = tmp_path / "packed", 0
        while not destination.exists():
            attempts += 1
            assert attempts < 30
            try:
                convert(small_quantized, destination, progress=interrupt(24))
            except Interrupted:
                continue
        assert attempts > 3
        assert contents(destination) == contents(small_packed)

    def test_killed(self, small_quantized: Path, small_packed: Path, tmp_path: Path) -> None:
        """SIGKILL: no clean-up code runs, and what was not flushed is lost."""
        expected = contents(small_packed)

        def run(number: int) -> tuple[Path, subprocess.CompletedProcess[str]]:
            destination = tmp_path / str(number) / "packed"
            destination.parent.mkdir()
            script = [sys.executable, str(Path(__file__).with_name("interrupted.py"))]
            done = subprocess.run(
                [*script, str(small_quantized), str(destination), str(number)],
                capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(SRC)}, check=False,
            )  # fmt: skip
            return destination, done

        destination, whole = run(0)
        assert contents(destination) == expected
        steps = int(whole.stdout)
        with ThreadPoolExecutor(2) as pool:
            for destination, done in pool.map(
                run, [2, *range(5, steps - 6, steps // 6), *range(steps - 6, steps + 1, 2)]
            ):
                assert done.returncode == -signal.SIGKILL, done.stderr
                if not destination.exists():
                    convert(small_quantized, destination)
                assert contents(destination) == expected

    @pytest.fixture
    def half_done(self, small_quantized: Path, tmp_path: Path) -> Path:
        """A destination whose resident files and first layer are finished."""
        destination = tmp_path / "packed"
        layer = destination.with_name("packed.partial") / "content" / "experts-00000.safetensors"

        def stop(done: int, total: int) -> None:
            if layer.exists():
                raise Interrupted

        with pytest.raises(Interrupted):
            convert(small_quantized, destination, progress=stop)
        assert not destination.exists()
        return destination

    def test_finished_files_are_kept(self, half_done: Path, small_quantized: Path) -> None:
        content = half_done.with_name("packed.partial") / "content"
        kept = {file.name: file.stat().st_ino for file in content.glob("*.safetensors") if ".tmp" not in file.name}
        assert "experts-00000.safetensors" in kept and len(kept) > 2
        stamps = {name: (content / name).stat().st_mtime_ns for name in kept}
        convert(small_quantized, half_done)
        assert {name: (half_done / name).stat().st_ino for name in kept} == kept
        assert {name: (half_done / name).stat().st_mtime_ns for name in kept} == stamps

    def test_a_finished_file_that_was_deleted_is_made_again(
        self, half_done: Path, small_quantized: Path, small_packed: Path
    ) -> None:
        (half_done.with_name("packed.partial") / "content" / "model-resident.safetensors").unlink()
        convert(small_quantized, half_done)
        assert contents(half_done) == contents(small_packed)

    def test_other_options_are_refused(self, half_done: Path, small_quantized: Path) -> None:
        for options in ({"bits": 2}, {"group_size": 32}):
            with pytest.raises(CheckpointError, match=r"packed.partial was left by another conversion .*delete"):
                convert(small_quantized, half_done, **options)
        convert(small_quantized, half_done)

    def test_another_source_is_refused(self, half_done: Path, small_quantized: Path, tmp_path: Path) -> None:
        copy = Path(shutil.copytree(small_quantized, tmp_path / "copy"))
        with pytest.raises(CheckpointError, match="left by another conversion"):
            convert(copy, half_done)

    @pytest.mark.parametrize("name", ["config.json", "flash_moe.json", "experts-00001.safetensors"])
    def test_changed_source_is_refused(self, small_packed: Path, tmp_path: Path, name: str) -> None:
        source = Path(shutil.copytree(small_packed, tmp_path / "source"))

        def stop(done: int, total: int) -> None:
            raise Interrupted

        with pytest.raises(Interrupted):
            convert(source, tmp_path / "packed", bits=2, progress=stop)
        os.utime(source / name, ns=(0, 0))
        with pytest.raises(CheckpointError, match="left by another conversion"):
            convert(source, tmp_path / "packed", bits=2)

    def test_leftover_notes_of_a_finished_conversion_do_no_harm(
        self, half_done: Path, small_quantized: Path, small_float: Path
    ) -> None:
        """Killed between naming the destination and tidying up; then the destination is moved away."""
        partial = half_done.with_name("packed.partial")
        shutil.rmtree(partial / "content")
        convert(small_float, half_done, bits=2)
        assert not partial.exists()


class TestDestination:
    @pytest.mark.parametrize("kind", ["folder", "empty folder", "file"])
    def test_must_not_exist(self, small_quantized: Path, small_packed: Path, tmp_path: Path, kind: str) -> None:
        destination = tmp_path / "packed"
        if kind == "file":
            destination.write_text("mine")
        elif kind == "folder":
            shutil.copytree(small_packed, destination)
        else:
            destination.mkdir()
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(CheckpointError, match=r"exists already; choose another destination, or delete it"):
            convert(small_quantized, destination)
        assert sorted(tmp_path.rglob("*")) == before

    def test_somebody_else_s_partial_folder_is_not_touched(self, small_quantized: Path, tmp_path: Path) -> None:
        other = tmp_path / "packed.partial"
        other.mkdir()
        (other / "thesis.txt").write_text("mine")
        with pytest.raises(CheckpointError, match="left by another conversion"):
            convert(small_quantized, tmp_path / "packed")
        assert (other / "thesis.txt").read_text() == "mine"

    def test_parents_are_made(self, small_quantized: Path, small_packed: Path, tmp_path: Path) -> None:
        convert(small_quantized, tmp_path / "a" / "b" / "packed")
        assert contents(tmp_path / "a" / "b" / "packed") == contents(small_packed)


class TestDiskSpace:
    def test_is_checked_before_anything_is_written(
        self, small_quantized: Path, small_packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        needed = sum(len(data) for _, _, data in stored_tensors(small_packed).values()) + 8 * 16384
        monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 0, needed // 2))
        with pytest.raises(DiskSpaceError, match=r"needs .* GB more.*make room or choose another disk"):
            convert(small_quantized, tmp_path / "new" / "packed")
        assert list(tmp_path.iterdir()) == []
        monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 0, needed))
        convert(small_quantized, tmp_path / "new" / "packed")

    def test_what_is_there_already_counts(
        self, small_quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interrupt: Callable[[int], Any]
    ) -> None:
        seen: list[tuple[int, int]] = []

        def stop(done: int, total: int) -> None:
            seen.append((done, total))
            if done > total // 2:
                raise Interrupted

        with pytest.raises(Interrupted):
            convert(small_quantized, tmp_path / "packed", progress=stop)
        done, total = seen[-2]  # the last one is not finished
        leftover = tmp_path / "packed.partial" / "content" / "x.tmp.safetensors"
        leftover.write_bytes(bytes(total))  # makes no headway
        monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 0, (total - done) // 2))
        with pytest.raises(DiskSpaceError):
            convert(small_quantized, tmp_path / "packed")
        monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 0, total - done + 65536))
        convert(small_quantized, tmp_path / "packed")

    @pytest.mark.parametrize("number", range(1, 6))
    def test_disk_that_fills_up_while_a_file_is_written(
        self, small_quantized: Path, small_packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
    ) -> None:
        real, written = Path.open, 0

        class Full(io.FileIO):
            def write(self, data: Any) -> int:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        def opening(path: Path, mode: str = "r", *rest: Any, **keywords: Any) -> Any:
            nonlocal written
            written += mode == "wb"
            if mode == "wb" and written == number:
                return Full(path, "w")
            return real(path, mode, *rest, **keywords)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "open", opening)
            with pytest.raises(DiskSpaceError, match="full; make room and start again: it continues"):
                convert(small_quantized, tmp_path / "packed")
        assert not (tmp_path / "packed").exists()
        convert(small_quantized, tmp_path / "packed")
        assert contents(tmp_path / "packed") == contents(small_packed)

    def test_other_failures_of_the_disk(
        self, small_quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(fd: int) -> None:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(CheckpointError, match=r"writing .* failed: .*Input/output error; start again to continue"):
            convert(small_quantized, tmp_path / "packed")
