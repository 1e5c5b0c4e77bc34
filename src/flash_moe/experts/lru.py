"""Assigns records to slots; the least recently used slot is reused first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)


class LruSlots(Generic[Key]):
    """Assigns keys to a fixed number of slots; the least recently used key loses its slot first.

    Args:
        lost: function that is called with every key that loses its slot.
    """

    def __init__(self, slots: int, lost: Callable[[Key], None] = lambda key: None) -> None:
        self._slots, self._lost = slots, lost
        self._free = dict.fromkeys(range(slots - 1, -1, -1))  # the last slot is assigned first
        self._slot_of: OrderedDict[Key, int] = OrderedDict()  # least recently used first

    def __len__(self) -> int:
        return len(self._slot_of)

    def __contains__(self, key: object) -> bool:
        return key in self._slot_of

    def __getitem__(self, key: Key) -> int:
        return self._slot_of[key]

    def touch(self, key: Key) -> int | None:
        """Returns the slot of ``key`` and marks it as most recently used; None if it has no slot."""
        slot = self._slot_of.get(key)
        if slot is not None:
            self._slot_of.move_to_end(key)
        return slot

    def assign(self, key: Key, keep: Iterable[Key], slot: int | None = None) -> int:
        """Returns a slot for a new key: a free slot, or that of the least recently used key not in ``keep``.

        Args:
            slot: a free slot to take; None to choose one.

        Raises:
            ValueError: every slot is held by a key in ``keep``, or ``key`` has a slot already.
        """
        if key in self._slot_of:
            raise ValueError(f"{key!r} has a slot already")
        if len(self._free) + len(self) < self._slots:  # Ctrl-C came between taking and assigning a slot
            self._free = dict.fromkeys(set(range(self._slots)).difference(self._slot_of.values()))
        if slot is not None:
            del self._free[slot]
        elif self._free:
            slot, _ = self._free.popitem()
        else:
            kept = set(keep)
            victim = next((k for k in self._slot_of if k not in kept), None)
            if victim is None:
                raise ValueError(f"all {len(self._slot_of)} slots are in use; ask for fewer records at a time")
            slot = self._slot_of.pop(victim)
            self._lost(victim)
        self._slot_of[key] = slot
        return slot

    def release(self, key: Key) -> None:
        """Frees the slot of ``key``, because its content is not valid."""
        self._free[self._slot_of.pop(key)] = None
        self._lost(key)
