"""Prefill and decoding of a model, with its experts in the page cache and without."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..errors import ArgumentError
from ..experts.host_memory import read_buffer
from ..experts.mapped import MappedStore
from ..experts.mapped_file import MappedFile
from ..experts.resident import ResidentStore
from ..experts.slots import SlotStore
from ..experts.store import ExpertStore, StoreStats
from ..generation.result import Chunk
from ..model import Model
from ..models import open_checkpoint
from .system import available_memory, disk_bytes_read

_IO: dict[type[ExpertStore], str] = {MappedStore: "mapped", SlotStore: "slots", ResidentStore: "resident"}
_WARM_UP = 32  # tokens of a prompt, and after it, that nobody counts: threads are started, kernels compiled
_SPARE = 0.8  # of the available memory may be filled by reading experts ahead

Progress = Callable[[str, int, int], None]
_REQUEST = 8 << 20  # bytes
_CHARACTERS = 8  # per token, at the most; tokenizers make about one token of four


@dataclass(frozen=True)
class Phase:
    """One kind of work under one state of the page cache.

    Attributes:
        name: ``"prefill"`` or ``"decode"``.
        cold: no expert was in memory: before a prompt, or before every decoded token, the page cache was emptied of
            them. Otherwise it held what the runs before had left there.
        leftover_bytes: what the system kept of the expert files when it was asked to drop them; None if not asked.
        tokens: of all runs together.
        seconds: per run of a prompt, or per decoded token.
        experts: the store's counters.
        layers: the same by layer.
        disk_bytes: what the operating system counted as read from storage; None where it does not say.
    """

    name: str
    cold: bool
    leftover_bytes: int | None
    tokens: int
    seconds: tuple[float, ...]
    experts: StoreStats
    layers: dict[int, StoreStats]
    disk_bytes: int | None

    @property
    def token_seconds(self) -> float:
        """Mean seconds per token."""
        return sum(self.seconds) / self.tokens

    @property
    def fetch_seconds(self) -> float:
        """Seconds per token in which the work waited for experts."""
        return self.experts.fetch_seconds / self.tokens

    def to_dict(self) -> dict[str, Any]:
        """Returns JSON-like data; times in seconds, sizes in bytes."""
        return dataclasses.asdict(self) | {
            "hit_rate": hit_rate(self.experts),
            "token_seconds": self.token_seconds,
            "fetch_seconds_per_token": self.fetch_seconds,
        }


@dataclass(frozen=True)
class ModelReport:
    """All phases; a resident store has no cold ones."""

    path: str
    expert_io: str
    experts_per_token: int
    model_experts_per_token: int
    prompt_tokens: int
    phases: tuple[Phase, ...]

    def to_dict(self) -> dict[str, Any]:
        """Returns JSON-like data."""
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return own | {"phases": [phase.to_dict() for phase in self.phases]}


def hit_rate(stats: StoreStats) -> float:
    """Returns share of the requested bytes that were in memory; 1 where none were requested."""
    return 1 - stats.bytes_missing / stats.bytes_requested if stats.bytes_requested else 1.0


def bench(
    model: Model, prompt: Sequence[int], tokens: int, *, runs: int = 1, progress: Progress | None = None
) -> ModelReport:
    """Measures prefill of a prompt and decoding after it, each cold and warm.

    Decoding draws at temperature 1 with a fixed seed, and does not end at an end of sequence. The experts are read
    ahead for the warm phases where they all fit into free memory.

    Args:
        prompt: token ids.
        tokens: to decode in each phase.
        runs: of the prompt in each phase.
        progress: called as ``progress(phase, done, total)`` with runs or tokens.

    Raises:
        ArgumentError: there is no room in the model's context for prompt and tokens, or less than one of them.
    """
    room = model.config.max_position_embeddings
    if not (prompt and tokens >= 1 and runs >= 1 and len(prompt) + tokens < room):
        raise ArgumentError(
            f"{len(prompt)} prompt tokens, {tokens} tokens and {runs} runs; expected 1 or more of each, and fewer than "
            f"{room} tokens in all, the model's context"
        )
    report = progress or (lambda phase, done, total: None)
    table_bytes = sum(layout.stride for layout in model.expert_store.layouts.values()) * model.config.num_experts
    with _endless(model):
        bench = _Bench(model, prompt, tokens, runs, report)
        bench.warm_up()
        phases = [bench.prefill(cold=True)] if bench.can_be_cold else []
        if bench.can_be_cold and table_bytes < _SPARE * available_memory():
            warm(model.path, lambda done, total: report("warming", done, total))
        phases += [bench.prefill(cold=False), bench.decode(cold=False)]
        if bench.can_be_cold:
            phases.insert(1, bench.decode(cold=True))
    own = model.config.num_experts_per_tok
    return ModelReport(
        str(model.path), _IO[type(model.expert_store)], model.experts_per_token, own, len(prompt), tuple(phases)
    )


@contextmanager
def _endless(model: Model) -> Iterator[None]:
    """Within, no token ends a generation."""
    ends, model.tokenizer.eos_token_ids = model.tokenizer.eos_token_ids, frozenset()
    try:
        yield
    finally:
        model.tokenizer.eos_token_ids = ends


class _Bench:
    def __init__(self, model: Model, prompt: Sequence[int], tokens: int, runs: int, report: Progress) -> None:
        self._model, self._prompt, self._tokens, self._runs = model, list(prompt), tokens, runs
        self._report, self._store = report, model.expert_store
        self.can_be_cold = self._store.can_evict

    def warm_up(self) -> None:
        on_gpu = mx.default_device() == mx.gpu  # where kernels are compiled for each shape
        prompt = self._prompt if on_gpu else self._prompt[:_WARM_UP]
        for _ in self._stream(prompt, _WARM_UP // 4):
            pass

    def prefill(self, *, cold: bool) -> Phase:
        """Returns the prompt up to its first token, ``runs`` times."""
        self._report(_label("prefill", cold), 0, self._runs)
        phase = _Recorder(self._model, "prefill", cold)
        for run in range(self._runs):
            phase.prepare()
            with phase.timed():
                next(self._stream(self._prompt, 1))
            self._report(_label("prefill", cold), run + 1, self._runs)
        return phase.finish(self._runs * len(self._prompt))

    def decode(self, *, cold: bool) -> Phase:
        """Returns tokens after the prompt, the first of which belongs to the prompt."""
        self._report(_label("decode", cold), 0, self._tokens)
        stream = self._stream(self._prompt, self._tokens + 1)
        next(stream)
        phase = _Recorder(self._model, "decode", cold)
        for number in range(self._tokens):
            phase.prepare()
            with phase.timed():
                next(stream)
            self._report(_label("decode", cold), number + 1, self._tokens)
        return phase.finish(self._tokens)

    def _stream(self, prompt: list[int], tokens: int) -> Iterator[Chunk]:
        self._model.forget()  # no run may continue the one before
        return self._model.stream(prompt, max_tokens=tokens, temperature=1.0, seed=0, progress=False)


def _label(name: str, cold: bool) -> str:
    return f"{name}, {'cold' if cold else 'warm'}"


class _Recorder:
    """Adds up what happens in the timed parts of a phase."""

    def __init__(self, model: Model, name: str, cold: bool) -> None:
        self._store, self._name, self._cold = model.expert_store, name, cold
        self._leftover: int | None = None
        self._seconds: list[float] = []
        self._before = dataclasses.replace(self._store.stats)
        self._layers_before = {i: dataclasses.replace(stats) for i, stats in self._store.by_layer.items()}
        self._disk: int | None = 0

    def prepare(self) -> None:
        """Empties the page cache for a cold phase, the first time with a look at what remains."""
        if self._cold:
            self._store.evict(flush=self._leftover is None)
            if self._leftover is None:
                self._leftover = self._store.cached_bytes()
        self._store.mark()

    @contextmanager
    def timed(self) -> Iterator[None]:
        disk, start = disk_bytes_read(), time.perf_counter()
        yield
        self._seconds.append(time.perf_counter() - start)
        after = disk_bytes_read()
        self._disk = None if disk is None or after is None or self._disk is None else self._disk + after - disk

    def finish(self, tokens: int) -> Phase:
        layers = {i: stats.since(self._layers_before[i]) for i, stats in self._store.by_layer.items()}
        return Phase(
            self._name, self._cold, self._leftover, tokens, tuple(self._seconds),
            self._store.stats.since(self._before), layers, self._disk,
        )  # fmt: skip


def warm(folder: Path, progress: Callable[[int, int], None] | None = None) -> None:
    """Reads every file that holds experts from its beginning to its end.

    Args:
        progress: called as ``progress(done, total)`` in files.
    """
    paths, buffer = open_checkpoint(folder).records().files, read_buffer(_REQUEST)
    for number, path in enumerate(paths, start=1):
        file = MappedFile(path)
        try:
            for start in range(0, file.size, _REQUEST):
                file.read_into(buffer[: min(_REQUEST, file.size - start)], start)
        finally:
            file.close()
        if progress is not None:
            progress(number, len(paths))


def sample_prompt(model: Model, tokens: int) -> list[int]:
    """Returns the first tokens of that text, from its beginning again where it ends."""
    text = ""
    for file in sorted(Path(__file__).parents[1].rglob("*.py")):
        text += file.read_text(encoding="utf-8")
        if len(text) >= _CHARACTERS * tokens:
            break
    found = model.encode(text, raw=True)
    return (found * (-(-tokens // len(found))))[:tokens]
