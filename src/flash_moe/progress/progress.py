"""The report of long work on its progress."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..amounts import format_bytes, percent

_TITLES = {
    "download": "downloading",
    "kernels": "proving kernels",
    "layers": "loading",
    "experts": "reading experts",
    "prompt": "reading the prompt",
    "generate": "generating",
    "convert": "converting",
    "verify": "verifying",
}


@dataclass(frozen=True)
class Progress:
    """The progress of a piece of work; a callable passed as ``progress`` gets one of these. ``str()`` of it is one line.

    Attributes:
        stage: ``"download"``, ``"kernels"``, ``"layers"`` and ``"experts"`` while a model is loaded, ``"prompt"`` before
            the first token, ``"generate"`` where many prompts are answered, ``"convert"``, ``"verify"``.
        done, total: amounts of work. Tokens of a prompt that are under way count by the layers that they have passed.
        unit: of both, in the plural; ``"bytes"`` are bytes.
        note: what a person wants to know before a long piece of work begins; may be empty.
    """

    stage: str
    done: int
    total: int
    unit: str
    note: str = ""

    @property
    def title(self) -> str:
        """The stage in words."""
        return _TITLES.get(self.stage, self.stage)

    @property
    def share(self) -> float:
        """Done of total, 0 to 1."""
        return self.done / self.total if self.total else 1.0

    @property
    def amount(self) -> str:
        """How much of how much."""
        if self.unit == "bytes":
            return f"{format_bytes(self.done)} of {format_bytes(self.total)}"
        return f"{self.done:,} of {self.total:,} {self.unit}"

    def __str__(self) -> str:
        return f"{self.title}: {percent(self.share)} · {self.amount}"


Callback = Callable[[Progress], None]
ProgressOption = bool | Callback
