"""The report of the progress of long work."""

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
    """The progress of a stage of work, as passed to a ``progress`` callable. ``str()`` returns one line.

    Attributes:
        stage: ``"download"``, ``"kernels"``, ``"layers"`` and ``"experts"`` while a model is loaded, ``"prompt"``
            before the first token, ``"generate"`` if several prompts are answered, ``"convert"``, ``"verify"``.
        done, total: amounts of work. Tokens of a running chunk of a prompt count in proportion to the layers that they
            have passed.
        unit: unit of both, in the plural, such as ``"bytes"``.
        note: information for the user before long work begins; may be empty.
    """

    stage: str
    done: int
    total: int
    unit: str
    note: str = ""

    @property
    def title(self) -> str:
        """The name of the stage for people."""
        return _TITLES.get(self.stage, self.stage)

    @property
    def share(self) -> float:
        """The completed share, from 0 to 1."""
        return self.done / self.total if self.total else 1.0

    @property
    def amount(self) -> str:
        """The completed and the total amount, for people."""
        if self.unit == "bytes":
            return f"{format_bytes(self.done)} of {format_bytes(self.total)}"
        return f"{self.done:,} of {self.total:,} {self.unit}"

    def __str__(self) -> str:
        return f"{self.title}: {percent(self.share)} · {self.amount}"


Callback = Callable[[Progress], None]
ProgressOption = bool | Callback
