"""The interface of a model that a conversation uses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from ..generation.engine import Engine
from ..nn.network import Network
from ..text import Tokenizer
from ..text_generation import Run


class ChatModel(Protocol):
    """A :class:`flash_moe.Model`, which makes conversations and so cannot be imported by them."""

    tokenizer: Tokenizer
    path: Path

    @property
    def experts_per_token(self) -> int: ...

    @property
    def _engine(self) -> Engine: ...

    @property
    def _decoder(self) -> Network: ...

    @property
    def _start(self) -> Callable[..., Run]: ...
