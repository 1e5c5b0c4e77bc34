"""Keeps an exported model up to date while training goes on."""

from __future__ import annotations

import shutil
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .export import export, from_state
from .log import LOGGER


class Exporter:
    """Renews ``folder`` with a model's current weights, in a thread: training waits for their copy to the CPU only.

    ``folder`` is always a complete checkpoint. The one before stays as `FOLDER.old`, so that who is reading it can end.

    Args:
        tokenizer: folder with the tokenizer's files.
    """

    def __init__(self, folder: Path, tokenizer: Path) -> None:
        self.folder, self.tokenizer = folder, tokenizer
        self._thread = ThreadPoolExecutor(1)
        self._running: Future[None] | None = None

    def start(self, model: nn.Module, name: str) -> None:
        """Begins to export the weights of now, called ``name`` in the log; waits for the export before.

        Raises:
            Exception: the export before failed.
        """
        self.finish()
        state = {key: value.detach().to("cpu", copy=True) for key, value in model.state_dict().items()}
        self._running = self._thread.submit(self._export, model.config.to_dict(), state, name)

    def finish(self) -> None:
        """Waits until the folder is up to date.

        Raises:
            Exception: the export failed.
        """
        running, self._running = self._running, None
        if running is not None:
            running.result()

    def _export(self, config: dict[str, Any], state: dict[str, Tensor], name: str) -> None:
        start = time.monotonic()
        new = self.folder.with_name(self.folder.name + ".new")
        shutil.rmtree(new, ignore_errors=True)
        export(from_state(config, state), new, self.tokenizer)
        publish(new, self.folder)
        LOGGER.info(f"exported {name} to {self.folder} in {time.monotonic() - start:.1f} s")


def publish(new: Path, folder: Path) -> None:
    """Puts ``new`` in the place of ``folder``, which becomes `FOLDER.old`; a directory can only replace an empty one."""
    old = folder.with_name(folder.name + ".old")
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    new.rename(folder)
