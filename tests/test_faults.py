"""Faults at random moments: reads that fail, are short, slow or interrupted; closing; files that are exchanged.

Whatever happens, what comes out is right tokens or an error of ours. Seconds in every run, minutes where slow tests run.
"""

from __future__ import annotations

import errno
import os
import random
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from flash_moe import FlashMoEError, Model, ModelClosedError
from flash_moe.experts.mapped_file import PAGE, MappedFile, pages_of

TOKENS = 8
PROMPTS = [[10, 20, 30, 40, 50], [10, 20, 30, 41], [7]]
FORMS = {"mapped": "packed_checkpoint", "slots": "packed_checkpoint", "slots in pieces": "quantized_checkpoint"}


class Faults:
    """Stands for ``os.preadv``: each call may go wrong, as often as ``rate`` says."""

    def __init__(self, rng: random.Random) -> None:
        self.rng, self.rate, self.real = rng, 0.0, os.preadv

    def __call__(self, fd: int, buffers: list[memoryview], offset: int) -> int:
        (buffer,) = buffers
        if self.rng.random() >= self.rate:
            return self.real(fd, buffers, offset)
        match self.rng.randrange(5):
            case 0:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            case 1:
                raise InterruptedError(errno.EINTR, os.strerror(errno.EINTR))
            case 2:
                return 0
            case 3:
                time.sleep(self.rng.uniform(0, 0.02))
        return self.real(fd, [buffer[: self.rng.randrange(1, len(buffer) + 1)]], offset)


def exchange(file: Path, rng: random.Random) -> None:
    """Another file of the same size and time of modification."""
    before = file.stat()
    other = file.with_name("other")
    other.write_bytes(rng.randbytes(before.st_size))
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.replace(file)


def rewrite(file: Path, rng: random.Random) -> None:
    """Other bytes in place; mapped pages would show them, and nobody can prevent that."""
    before = file.stat()
    with file.open("r+b") as stream:
        stream.seek(rng.randrange(before.st_size))
        stream.write(rng.randbytes(min(1 << 16, before.st_size - stream.tell())))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def truncate(file: Path, rng: random.Random) -> None:
    os.truncate(file, rng.randrange(file.stat().st_size))


class Round:
    """One model through one kind of trouble."""

    def __init__(self, folder: Path, io: str, faults: Faults, expected: dict[int, tuple[int, ...]]) -> None:
        self.faults, self.rng, self.expected = faults, faults.rng, expected
        cache = self.rng.choice([0, 1 << 17]) if io == "slots" else 0
        options = {"expert_io": io, "expert_cache": cache, "prefetch": self.rng.random() < 0.5}
        self.model = Model.load(folder, experts_per_token=None, **options)
        self.model.tokenizer.eos_token_ids = frozenset()
        self.errors: list[BaseException] = []
        self.ended = 0

    def generate(self) -> None:
        """Right tokens to the end, or right tokens and then an error of ours."""
        number, tokens = self.rng.randrange(len(PROMPTS)), list[int]()
        try:
            for chunk in self.model.stream(PROMPTS[number], max_tokens=TOKENS, temperature=0):
                tokens.append(chunk.token)
            assert len(tokens) == TOKENS
            self.ended += 1
        except FlashMoEError:
            pass
        except BaseException as error:
            self.errors.append(error)
        if tuple(tokens) != self.expected[number][: len(tokens)]:
            self.errors.append(AssertionError(f"{tokens} of {self.expected[number]}"))

    def run(self, trouble: Callable[[], object], *, closes: bool, spoils: bool) -> None:
        threads = [threading.Thread(target=self.generate, daemon=True) for _ in range(2)]
        for thread in threads:
            thread.start()
        time.sleep(self.rng.uniform(0, 0.1))
        trouble()
        for thread in threads:
            thread.join(30)
            assert not thread.is_alive(), "it waits for ever"
        self.faults.rate = 0.0
        if not closes and not spoils:  # as soon as the disk is well, everything is
            before = self.ended
            self.generate()
            assert self.ended == before + 1
        self.model.close()
        with pytest.raises(ModelClosedError):
            self.model.generate(PROMPTS[0])
        assert not self.errors, self.errors


def attack(folder: Path, io: str, seconds: float, seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(seed)
    faults = Faults(rng)
    for name in ("reader.REQUEST", "reader.COPY", "mapped.REQUEST"):
        monkeypatch.setattr(f"flash_moe.experts.{name}", PAGE)

    def residency(self: MappedFile, offset: int, nbytes: int) -> bytearray:
        return bytearray([rng.random() < 0.3]) * len(pages_of(offset, nbytes))

    with Model.load(folder, experts_per_token=None, expert_io="resident") as model:
        model.tokenizer.eos_token_ids = frozenset()
        expected = {
            number: model.generate(prompt, max_tokens=TOKENS, temperature=0).tokens
            for number, prompt in enumerate(PROMPTS)
        }
    monkeypatch.setattr(MappedFile, "residency", residency)
    monkeypatch.setattr(os, "preadv", faults)
    changes = [exchange] if io == "mapped" else [exchange, rewrite, truncate]
    end, rounds = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        rounds += 1
        monkeypatch.setattr("flash_moe.experts.reader.INLINE", rng.choice([-1, 1 << 18]))
        copy = tmp_path / str(rounds)
        shutil.copytree(folder, copy)
        file = rng.choice(sorted(copy.glob("experts-*") if io == "mapped" else copy.glob("*.safetensors")))
        this = Round(copy, io, faults, expected)
        faults.rate = rng.choice([0.0, 0.002, 0.1])
        match (rounds + seed) % 3:
            case 0:
                this.run(this.model.close, closes=True, spoils=False)
            case 1:
                change = rng.choice(changes)
                this.run(lambda change=change, file=file: change(file, rng), closes=False, spoils=True)
            case 2:
                this.run(lambda: None, closes=False, spoils=False)
        shutil.rmtree(copy)
    assert rounds


@pytest.mark.parametrize("form", FORMS)
def test_faults_for_seconds(
    form: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attack(request.getfixturevalue(FORMS[form]), form.split()[0], 1.7, 0, tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("form", FORMS)
def test_faults_for_minutes(
    form: str, seed: int, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attack(request.getfixturevalue(FORMS[form]), form.split()[0], 20, seed, tmp_path, monkeypatch)
