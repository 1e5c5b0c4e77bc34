"""The demo model, which comes with the library: inside the installed package, or at the top of a clone."""

from __future__ import annotations

from pathlib import Path

DEMO = "demo"  # what users call it


def demo_folder() -> Path:
    """The folder of the demo model's packed checkpoint."""
    installed = Path(__file__).parents[1] / "models" / DEMO
    return installed if installed.is_dir() else Path(__file__).parents[3] / "models" / DEMO
