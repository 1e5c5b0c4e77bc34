"""The parts of `flash-moe report`. Each takes a measurement and returns Markdown without private data."""

from __future__ import annotations

import importlib.util
import textwrap
from collections.abc import Iterator, Sequence
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING

from ..amounts import format_bytes, format_memory

if TYPE_CHECKING:
    from ..bench.io import IOReport
    from ..bench.phases import ModelReport
    from ..models import ModelFiles
    from ..planning.plan import Plan

_PACKAGES = ("flash-moe", "mlx", "mlx-lm", "numpy", "numba")


def machine() -> str:
    """Returns the chip, the memory, the system and the versions."""
    import mlx.core as mx

    from ..bench.system import chip_name, system_name
    from ..limits import machine_memory, memory_limit

    limit, memory = memory_limit(), format_memory(machine_memory())
    back_end = "CPU" if mx.default_device() == mx.cpu else "Metal" if mx.metal.is_available() else "CUDA"
    rows = [
        ("date", str(date.today())),
        ("machine", chip_name()),
        ("memory", memory if limit == machine_memory() else f"{memory}, of which {format_memory(limit)} may be used"),
        ("system", system_name()),
        ("MLX computes with", back_end),
        *((name, found) for name in _PACKAGES if (found := _version(name)) is not None),
    ]
    return _table(("", ""), rows)


def kernels(folder: Path | None, experts_per_token: int | None) -> str:
    """Returns the trials of all kernels at the sizes of a model, or at those of Qwen3.5-397B-A17B."""
    from ..ops.dispatch import on_gpu
    from ..proofs.process import judged
    from ..proofs.prover import name_of
    from ..proofs.standard import standard_cases
    from .selftest import cases_of

    if not on_gpu():
        numba = "" if importlib.util.find_spec("numba") else " Numba is missing, so the CPU has none either."
        return f"No GPU that MLX can use.{numba}"
    cases = list(standard_cases(("bfloat16",))) if folder is None else cases_of(folder, experts_per_token)
    rows = []
    for case, verdict in judged(cases):
        times = (f"{1e6 * verdict.seconds:.1f}", f"{1e6 * verdict.mlx_seconds:.1f}") if verdict.right else ("", "")
        result = "used" if verdict.used else "right, not faster" if verdict.right else "wrong"
        rows.append((name_of(case), f"{verdict.error:.1e} of {verdict.tolerance:.0e}", *times, result))
    return _table(("kernel", "error", "µs", "MLX µs", "verdict"), rows)


def model(folder: Path, experts_per_token: int | None, prompt_tokens: int, tokens: int, seconds: float) -> str:
    """Returns a description of a model, the speed of its expert reads, and its measured and predicted speeds.

    Args:
        prompt_tokens, tokens, seconds: tokens of the prompt, tokens to decode in each phase, and seconds of measuring
            reads.
    """
    from ..bench.io import bench_io
    from ..bench.phases import bench, sample_prompt
    from ..model import Model
    from ..models import open_model
    from ..planning.plan import plan

    planned = plan(str(folder), experts_per_token=experts_per_token, prompt=prompt_tokens)
    read = bench_io(folder, experts_per_token, seconds)
    with Model.load(folder, experts_per_token=experts_per_token, progress=False) as loaded:
        measured = bench(loaded, sample_prompt(loaded, prompt_tokens), tokens)
    return "\n\n".join((_described(open_model(folder), measured), _reading(read), _speed(planned, measured)))


def _described(files: ModelFiles, report: ModelReport) -> str:
    """Describes a model without its name, which may be private."""
    config, table = files.dimensions, files.records()
    form = "packed" if table.packed else "not packed"
    text = (
        f"{config.num_hidden_layers} layers of {config.hidden_size}, {config.num_experts} experts of "
        f"{format_bytes(table.max_stride)}, {format_bytes(table.nbytes)} in all, {form}; "
        f"K={report.experts_per_token} of {report.model_experts_per_token}, experts {report.expert_io}."
    )
    return textwrap.fill(text, 80, break_long_words=False, break_on_hyphens=False)


def _reading(report: IOReport) -> str:
    """Returns the fastest plain reads of each size, and the speeds of the stores."""
    rows = []
    for size in sorted({speed.request_bytes for speed in report.raw}):
        found = [speed for speed in report.raw if speed.request_bytes == size]
        cold, warm = (max(found, key=attrgetter(state)) for state in ("cold", "warm"))
        rows.append(
            (f"plain reads of {format_bytes(size)}", _by(cold.cold, cold.threads), _by(warm.warm, warm.threads))
        )
    for fetch in report.fetches:
        cold_speed = "" if fetch.cold is None else f"{fetch.cold / 1e9:.2f}"
        rows.append((f"{fetch.store}, {fetch.records} records at once", cold_speed, f"{fetch.warm / 1e9:.2f}"))
    note = "" if report.really_cold else "\n\nCold is not quite cold here: the page cache kept a part."
    return _table(("GB/s", "cold", "warm"), rows) + note


def _by(speed: float, threads: int) -> str:
    return f"{speed / 1e9:.2f} ({threads} thread{'s' * (threads > 1)})"


def _speed(planned: Plan, measured: ModelReport) -> str:
    """Returns the predicted and measured milliseconds per token, by phase."""
    rows = []
    for phase in measured.phases:
        state, decoding = "cold" if phase.cold else "warm", phase.name == "decode"
        seconds = (planned.decode if decoding else planned.prefill)[state]
        spent = phase.token_seconds * (1 if decoding else measured.prompt_tokens)
        what = "a token" if decoding else f"a prompt of {measured.prompt_tokens}"
        expected = ("", "") if seconds is None else (f"{1e3 * seconds.total:.1f}", f"{seconds.total / spent:.2f}")
        waiting = phase.fetch_seconds * phase.tokens / sum(phase.seconds)
        rows.append((f"{what}, {state}", f"{1e3 * spent:.1f}", *expected, f"{waiting:.0%}"))
    return _table(("ms", "measured", "planned", "ratio", "waiting for experts"), rows)


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def lines() -> Iterator[str]:
        yield f"| {' | '.join(columns)} |"
        yield f"|{'---|' * len(columns)}"
        for row in rows:
            yield f"| {' | '.join(row)} |"

    return "\n".join(lines())


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
