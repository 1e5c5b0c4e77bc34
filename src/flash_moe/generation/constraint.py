"""The tokens that may come next in a reply: the interface of grammars, and free reasoning before one."""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol

import numpy as np


class Constraint(Protocol):
    """The state of one reply in its format. The sampler asks it, and tells it each token."""

    def prepare(self) -> None:
        """Waits for what the next question needs, if it is still being made."""
        ...

    def allows(self, token: int) -> bool:
        """Returns whether a token may come next; cheap."""
        ...

    def allowed(self) -> np.ndarray:
        """Returns which tokens may come next, [V] bool; may take milliseconds."""
        ...

    def accept(self, token: int) -> None:
        """Goes on behind an allowed token."""
        ...

    def forced(self) -> list[int]:
        """Returns the tokens that come next whatever the model says; none where there is a choice."""
        ...


class AfterReasoning:
    """Leaves a reply's reasoning free, and holds what follows to a constraint.

    Reasoning cannot end the reply: the format would be missing. One gap of white space may follow it.

    Args:
        constraint: of what follows.
        opening: id of ``<think>`` if the reply may begin with it, else None.
        closing: id of ``</think>``.
        gap: ids of tokens of white space that a chat template writes behind reasoning.
        ends: ids that end a reply.
        size: width of the logits.
        inside: whether the prompt ended inside reasoning.
    """

    def __init__(
        self,
        constraint: Constraint,
        opening: int | None,
        closing: int,
        gap: Collection[int],
        ends: Collection[int],
        size: int,
        inside: bool,
    ) -> None:
        self._constraint, self._closing = constraint, closing
        self._opening = None if inside else opening
        self._gap, self._ends, self._size = frozenset(gap), frozenset(ends), size
        self._inside, self._may_pause = inside, False

    def prepare(self) -> None:
        """Waits for what the next question needs: nothing while reasoning goes on."""
        if not self._inside:
            self._constraint.prepare()

    def allows(self, token: int) -> bool:
        """Returns whether a token may come next."""
        if self._inside:
            return token not in self._ends
        return token in self._extra() or self._constraint.allows(token)

    def allowed(self) -> np.ndarray:
        """Returns which tokens may come next, [V] bool."""
        if self._inside:
            mask = np.ones(self._size, bool)
            mask[list(self._ends)] = False
            return mask
        mask = self._constraint.allowed()
        mask[list(self._extra())] = True
        return mask

    def accept(self, token: int) -> None:
        """Goes on behind an allowed token."""
        if self._inside:
            if token == self._closing:
                self._inside, self._may_pause = False, True
            return
        extra, opens = token in self._extra(), token == self._opening
        self._opening, self._may_pause = None, False
        if opens:
            self._inside = True
        elif not extra:
            self._constraint.accept(token)

    def forced(self) -> list[int]:
        """Returns the tokens that come next whatever the model says."""
        return [] if self._inside or self._extra() else self._constraint.forced()

    def _extra(self) -> frozenset[int]:
        """Returns tokens that may come next beside those of the constraint."""
        if self._may_pause:
            return self._gap
        return frozenset() if self._opening is None else frozenset({self._opening})
