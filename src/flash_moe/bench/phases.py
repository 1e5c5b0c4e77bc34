"""Measures prefill and decoding of a model, with and without its experts in the page cache."""

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
_WARM_UP = 32  # tokens of a first, uncounted prompt and reply, which start threads and compile kernels
_SPARE = 0.8  # share of the available memory that may be filled with experts before warm phases

Progress = Callable[[str, int, int], None]
_REQUEST = 8 << 20  # bytes
_CHARACTERS = 8  # maximum characters per token; tokenizers have about four


@dataclass(frozen=True)
class Phase:
    """The results of one kind of work in one state of the page cache.

    Attributes:
        name: ``"prefill"`` or ``"decode"``.
        cold: whether no expert was in memory: experts were dropped from the page cache before a prompt, or before every
            decoded token. Otherwise it kept the experts of earlier runs.
        leftover_bytes: bytes of the expert files that stayed in the page cache after the request to drop them; None
            without a request.
        tokens: number of tokens of all runs together.
        seconds: seconds of each run of a prompt, or of each decoded token.
        experts: the counters of the store.
        layers: the counters of each layer.
        disk_bytes: bytes read from the disk according to the operating system; None if it does not count them.
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
        """The mean seconds per token."""
        return sum(self.seconds) / self.tokens

    @property
    def fetch_seconds(self) -> float:
        """The seconds per token of waiting for experts."""
        return self.experts.fetch_seconds / self.tokens

    def to_dict(self) -> dict[str, Any]:
        """Returns the results as JSON data, with times in seconds and sizes in bytes."""
        return dataclasses.asdict(self) | {
            "hit_rate": hit_rate(self.experts),
            "token_seconds": self.token_seconds,
            "fetch_seconds_per_token": self.fetch_seconds,
        }


@dataclass(frozen=True)
class ModelReport:
    """The results of all phases. A resident store has no cold phases."""

    path: str
    expert_io: str
    experts_per_token: int
    model_experts_per_token: int
    prompt_tokens: int
    phases: tuple[Phase, ...]

    def to_dict(self) -> dict[str, Any]:
        """Returns the report as JSON data."""
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return own | {"phases": [phase.to_dict() for phase in self.phases]}


def hit_rate(stats: StoreStats) -> float:
    """Returns the share of requested bytes that were in memory; 1 if none were requested."""
    return 1 - stats.bytes_missing / stats.bytes_requested if stats.bytes_requested else 1.0


def bench(
    model: Model, prompt: Sequence[int], tokens: int, *, runs: int = 1, progress: Progress | None = None
) -> ModelReport:
    """Measures the prefill of a prompt and the decoding after it, each cold and warm.

    Decoding samples at temperature 1 with a fixed seed, and does not stop at an end of sequence. If all experts fit
    into free memory, they are read into the page cache before the warm phases.

    Args:
        prompt: token ids of the prompt.
        tokens: number of tokens to decode in each phase.
        runs: number of runs of the prompt in each phase.
        progress: function that is called as ``progress(phase, done, total)`` after each run or token.

    Raises:
        ArgumentError: prompt and tokens do not fit into the model's context, or a number is below 1.
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
    """Disables end-of-sequence tokens inside the block."""
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
        on_gpu = mx.default_device() == mx.gpu  # there, kernels are compiled for each shape
        prompt = self._prompt if on_gpu else self._prompt[:_WARM_UP]
        for _ in self._stream(prompt, _WARM_UP // 4):
            pass

    def prefill(self, *, cold: bool) -> Phase:
        """Measures the prompt up to its first token, ``runs`` times."""
        self._report(_label("prefill", cold), 0, self._runs)
        phase = _Recorder(self._model, "prefill", cold)
        for run in range(self._runs):
            phase.prepare()
            with phase.timed():
                next(self._stream(self._prompt, 1))
            self._report(_label("prefill", cold), run + 1, self._runs)
        return phase.finish(self._runs * len(self._prompt))

    def decode(self, *, cold: bool) -> Phase:
        """Measures decoding after the prompt. The first token counts as part of the prompt."""
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
        self._model.forget()  # no run may reuse the cache of the previous one
        return self._model.stream(prompt, max_tokens=tokens, temperature=1.0, seed=0, progress=False)


def _label(name: str, cold: bool) -> str:
    return f"{name}, {'cold' if cold else 'warm'}"


class _Recorder:
    """Adds up the times and counters of the timed parts of a phase."""

    def __init__(self, model: Model, name: str, cold: bool) -> None:
        self._store, self._name, self._cold = model.expert_store, name, cold
        self._leftover: int | None = None
        self._seconds: list[float] = []
        self._before = dataclasses.replace(self._store.stats)
        self._layers_before = {i: dataclasses.replace(stats) for i, stats in self._store.by_layer.items()}
        self._disk: int | None = 0

    def prepare(self) -> None:
        """Drops experts from the page cache for a cold phase, and measures the first time how many bytes remain."""
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
    """Reads every file with experts from beginning to end.

    Args:
        progress: function that is called as ``progress(done, total)`` after each file.
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
    """Returns the first tokens of the sample text, which is repeated if it is too short."""
    text = ""
    for file in sorted(Path(__file__).parents[1].rglob("*.py")):
        text += file.read_text(encoding="utf-8")
        if len(text) >= _CHARACTERS * tokens:
            break
    found = model.encode(text, raw=True)
    return (found * (-(-tokens // len(found))))[:tokens]
