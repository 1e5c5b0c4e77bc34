"""Text to measure with: this library's own source, which is English and Python and always there."""

from __future__ import annotations

from pathlib import Path

from ..model import Model

_CHARACTERS = 8  # per token, at the most; tokenizers make about one token of four


def sample_prompt(model: Model, tokens: int) -> list[int]:
    """Returns the first tokens of that text, from its beginning again where it ends."""
    text = ""
    for file in sorted(Path(__file__).parents[1].rglob("*.py")):
        text += file.read_text(encoding="utf-8")
        if len(text) >= _CHARACTERS * tokens:
            break
    found = model.encode(text, raw=True)
    return (found * (-(-tokens // len(found))))[:tokens]
