"""Constraints on the next token: the interface of grammars, and unconstrained reasoning before them."""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol

import numpy as np


class Constraint(Protocol):
    """The constraint of one reply. The sampler queries it before each token, and passes it each sampled token."""

    def prepare(self) -> None:
        """Waits until the constraint is ready for the next query, e.g. until its grammar is compiled."""
        ...

    def allows(self, token: int) -> bool:
        """Returns whether a token may come next. This is fast."""
        ...

    def allowed(self) -> np.ndarray:
        """Returns a mask of the tokens that may come next, [V] bool. This can take milliseconds."""
        ...

    def accept(self, token: int) -> None:
        """Advances the state by an allowed token."""
        ...

    def forced(self) -> list[int]:
        """Returns the only tokens that can come next; empty if there is a choice."""
        ...


class AfterReasoning:
    """Leaves the reasoning of a reply unconstrained, and applies a constraint to the rest.

    The reply cannot end inside the reasoning, because the constrained part would be missing. One token of white space
    may follow the reasoning.

    Args:
        constraint: the constraint of the text after the reasoning.
        opening: id of ``<think>`` if the reply may begin with that token, else None.
        closing: id of ``</think>``.
        gap: ids of the white space tokens that a chat template writes after the reasoning.
        ends: ids of tokens that end a reply.
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
        """Waits until the constraint is ready; returns at once during the reasoning."""
        if not self._inside:
            self._constraint.prepare()

    def allows(self, token: int) -> bool:
        """Returns whether a token may come next."""
        if self._inside:
            return token not in self._ends
        return token in self._extra() or self._constraint.allows(token)

    def allowed(self) -> np.ndarray:
        """Returns a mask of the tokens that may come next, [V] bool."""
        if self._inside:
            mask = np.ones(self._size, bool)
            mask[list(self._ends)] = False
            return mask
        mask = self._constraint.allowed()
        mask[list(self._extra())] = True
        return mask

    def accept(self, token: int) -> None:
        """Advances the state by an allowed token."""
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
        """Returns the only tokens that can come next; empty if there is a choice."""
        return [] if self._inside or self._extra() else self._constraint.forced()

    def _extra(self) -> frozenset[int]:
        """Returns tokens that are allowed in addition to those of the constraint."""
        if self._may_pause:
            return self._gap
        return frozenset() if self._opening is None else frozenset({self._opening})
