"""Checkpoints as numbers: which beginning of which sequences each stands for, and what it weighs."""

from __future__ import annotations

import itertools
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

MAX_PINNED_SHARE = 2
"""At most one byte in so many is pinned, so that others can still be remembered."""


@dataclass(slots=True)
class _Checkpoint:
    names: tuple[bytes, ...]
    size_bytes: int
    is_pinned: bool = False
    was_used: bool = False
    until: float = 0.0
    """Time of the clock until which it is dropped after all others."""


class Checkpoints:
    """Copies of state that the runner keeps by number, found by the names of the pages that they end at.

    A state that can be cut goes by many names: of every page up to its own end. Those used longest ago are dropped when
    all together weigh more than `max_bytes`; `take_dropped` tells the runner. What is pinned stays, and keeps its
    names; it takes half of the bytes at most, and what is more is kept like all others.
    """

    def __init__(self, max_bytes: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.max_bytes = max_bytes
        """All together, pinned ones included."""
        self._clock = clock
        self._numbers = itertools.count()
        self._by_name: dict[bytes, int] = {}
        self._kept: OrderedDict[int, _Checkpoint] = OrderedDict()
        self._dropped: list[int] = []
        self.size_bytes = 0
        """Of all that are kept."""
        self._pinned_bytes = 0
        self.num_evicted = 0
        """Dropped because room was needed."""

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def has_dropped(self) -> bool:
        """Whether the runner must still be told of one that is of no more use."""
        return bool(self._dropped)

    def next_number(self) -> int:
        """A number that no checkpoint has had."""
        return next(self._numbers)

    def keep(self, number: int, names: Iterable[bytes], *, size_bytes: int, is_pinned: bool = False) -> None:
        """Remember a checkpoint; a name that another had is its own from now on, unless the other is pinned."""
        mine = tuple(name for name in names if not self._is_pinned(name))
        for name in mine:
            self._rename(name, number)
        is_pinned = is_pinned and self._pinned_bytes + size_bytes <= self.max_bytes // MAX_PINNED_SHARE
        self._kept[number] = _Checkpoint(mine, size_bytes, is_pinned)
        self.size_bytes += size_bytes
        self._pinned_bytes += size_bytes * is_pinned
        if not mine:
            self.drop(number)
        self._make_room()

    def find(self, name: bytes) -> int | None:
        """The checkpoint that holds the state behind the page of that name."""
        return self._by_name.get(name)

    def promise(self, name: bytes, *, until: float) -> None:
        """Let the checkpoint behind the page of that name, if there is one, be dropped last until that time."""
        number = self._by_name.get(name)
        if number is not None:
            kept = self._kept[number]
            kept.until = max(kept.until, until)

    def use(self, number: int) -> bool:
        """Note that it is used; True the first time."""
        checkpoint = self._kept[number]
        self._kept.move_to_end(number)
        is_first, checkpoint.was_used = not checkpoint.was_used, True
        return is_first

    def is_kept(self, number: int) -> bool:
        """Whether it is kept still."""
        return number in self._kept

    def size_of(self, number: int) -> int:
        """Bytes of one that is kept."""
        return self._kept[number].size_bytes

    def drop(self, number: int) -> None:
        """Forget one, kept or only taken."""
        checkpoint = self._kept.pop(number, None)
        if checkpoint is not None:
            self.size_bytes -= checkpoint.size_bytes
            self._pinned_bytes -= checkpoint.size_bytes * checkpoint.is_pinned
            for name in checkpoint.names:
                if self._by_name.get(name) == number:
                    del self._by_name[name]
        self._dropped.append(number)

    def forget(self) -> int:
        """Drop all; returns how many."""
        numbers = list(self._kept)
        for number in numbers:
            self.drop(number)
        return len(numbers)

    def take_dropped(self) -> tuple[int, ...]:
        """Those that are of no more use, each told once."""
        dropped, self._dropped = tuple(self._dropped), []
        return dropped

    def check(self) -> None:
        """Raise AssertionError if names, numbers and sizes disagree. For tests."""
        assert self.size_bytes == sum(each.size_bytes for each in self._kept.values()), "sizes are miscounted"
        pinned_bytes = sum(each.size_bytes for each in self._kept.values() if each.is_pinned)
        assert self._pinned_bytes == pinned_bytes, "what is pinned is miscounted"
        for number, each in self._kept.items():
            assert self._by_name.get(each.names[-1]) == number, f"checkpoint {number} cannot be found by its last name"
        for name, number in self._by_name.items():
            assert name in self._kept[number].names, f"checkpoint {number} does not know its name"
        assert not set(self._dropped) & set(self._kept), "a checkpoint is both kept and dropped"

    def _rename(self, name: bytes, number: int) -> None:
        """Give a name to `number`; a checkpoint that is left without its last name is of no use."""
        former = self._by_name.get(name)
        self._by_name[name] = number
        if former is not None and self._kept[former].names[-1] == name:
            self.drop(former)

    def _is_pinned(self, name: bytes) -> bool:
        number = self._by_name.get(name)
        return number is not None and self._kept[number].is_pinned

    def _make_room(self) -> None:
        while self.size_bytes > self.max_bytes:
            # There is one: what is pinned is less.
            loose = [number for number, each in self._kept.items() if not each.is_pinned]
            now = self._clock()
            self.drop(next((number for number in loose if self._kept[number].until <= now), loose[0]))
            self.num_evicted += 1
