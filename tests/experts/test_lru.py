from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from flash_moe.experts.lru import LruSlots

keys = st.integers(0, 7)


class AgainstAList(RuleBasedStateMachine):
    """A list of (key, slot), least recently used first, does the same by plain means."""

    @initialize(slots=st.integers(1, 5))
    def make(self, slots: int) -> None:
        self.slots = slots
        self.table: LruSlots[int] = LruSlots(slots)
        self.held: list[tuple[int, int]] = []

    @rule(key=keys)
    def touch(self, key: int) -> None:
        found = [pair for pair in self.held if pair[0] == key]
        assert self.table.touch(key) == (found[0][1] if found else None)
        self.held = [pair for pair in self.held if pair[0] != key] + found

    @rule(key=keys, keep=st.sets(keys, max_size=5))
    def assign(self, key: int, keep: set[int]) -> None:
        victims = [pair for pair in self.held if pair[0] not in keep]
        if key in dict(self.held):
            with pytest.raises(ValueError, match="has a slot already"):
                self.table.assign(key, keep)
        elif len(self.held) < self.slots:
            slot = self.table.assign(key, keep)
            assert slot in set(range(self.slots)) - set(dict(self.held).values())
            self.held.append((key, slot))
        elif victims:
            assert self.table.assign(key, keep) == victims[0][1]
            self.held.remove(victims[0])
            self.held.append((key, victims[0][1]))
        else:
            with pytest.raises(ValueError, match=r"all .* slots are in use"):
                self.table.assign(key, keep)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        pair = data.draw(st.sampled_from(self.held))
        self.table.release(pair[0])
        self.held.remove(pair)

    @invariant()
    def same_content(self) -> None:
        if hasattr(self, "table"):
            assert len(self.table) == len(self.held)
            assert {key: self.table[key] for key in range(8) if key in self.table} == dict(self.held)


TestAgainstAList = AgainstAList.TestCase
TestAgainstAList.settings = settings(max_examples=100, deadline=None, stateful_step_count=30)


def test_a_slot_that_ctrl_c_took_from_everyone_is_found_again() -> None:
    table = LruSlots[int](3)
    for key in range(3):
        table.assign(key, [])
    lost = table._slot_of.pop(1)  # as if interrupted right after
    assert table.assign(7, [0, 2]) == lost
    assert [table[key] for key in (0, 7, 2)] == [0, 1, 2]


def test_release_of_a_key_without_a_slot() -> None:
    with pytest.raises(KeyError):
        LruSlots[int](2).release(1)
