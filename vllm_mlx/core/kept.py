"""What was worked out is kept for the next time, within bounds."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from threading import Lock
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Kept(Generic[K, V]):
    """Values by key up to a weight; those that nobody asked for longest go. Safe to use from threads."""

    def __init__(self, max_weight: int, *, weigh: Callable[[K, V], int] | None = None) -> None:
        """`weigh` tells an entry's weight, the same each time; without it, each weighs one."""
        self._max_weight = max_weight
        self._weigh = weigh
        self._entries: OrderedDict[K, V] = OrderedDict()
        self._weight = 0
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: K) -> V | None:
        """The value, if it is still there."""
        with self._lock:
            found = self._entries.get(key)
            if found is not None:
                self._entries.move_to_end(key)
            return found

    def add(self, key: K, value: V) -> None:
        """Keep a value in place of an earlier one. What weighs more than the bound is not kept."""
        weight = self._weight_of(key, value)
        with self._lock:
            self._drop(key)
            if weight > self._max_weight:
                return
            self._entries[key] = value
            self._weight += weight
            while self._weight > self._max_weight:
                self._drop(next(iter(self._entries)))

    def _drop(self, key: K) -> None:
        value = self._entries.pop(key, None)
        if value is not None:
            self._weight -= self._weight_of(key, value)

    def _weight_of(self, key: K, value: V) -> int:
        return 1 if self._weigh is None else self._weigh(key, value)
