"""The share of the experts that a machine holds."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from .errors import ArgumentError


@dataclass(frozen=True)
class Share:
    """One of ``count`` shares of the experts: expert e of layer l belongs to share (e + l) % count.

    So neighbouring experts of a file are in different shares, and no share has the first expert of every layer.

    Raises:
        ArgumentError: the index is not from 0 to ``count`` - 1.
    """

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise ArgumentError(f"share {self.index}/{self.count}, expected I/N with I from 0 to N - 1")

    @classmethod
    def parse(cls, text: str) -> Share:
        """Parses "I/N".

        Raises:
            ArgumentError: the text is not of the form "I/N".
        """
        if (match := re.fullmatch(r"(\d{1,4})/(\d{1,4})", text)) is None:
            raise ArgumentError(f"share is {text!r}, expected I/N, such as 0/2 for the first of two machines")
        return cls(int(match[1]), int(match[2]))

    @property
    def is_whole(self) -> bool:
        """Whether the share contains all experts."""
        return self.count == 1

    def experts(self, layer: int, num_experts: int) -> range:
        """Returns the experts of a layer that are in the share, in ascending order."""
        return range((self.index - layer) % self.count, num_experts, self.count)

    def owns(self, layer: int, experts: Any) -> Any:
        """Returns whether an expert of a layer is in the share; for an array of experts, a mask of its shape."""
        return (experts + layer) % self.count == self.index

    def place(self, expert: int) -> int:
        """Returns the position of an expert among the share's experts of its layer."""
        return expert // self.count

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


WHOLE = Share()
