"""Prefixes that somebody is computing: another that needs them waits, rather than compute them as well."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Sequence


class UnderWay:
    """Names that sequences are about to give to pages or checkpoints, and whose they are."""

    def __init__(self) -> None:
        self._owners: dict[bytes, str] = {}

    def __contains__(self, name: bytes | None) -> bool:
        return name in self._owners

    def __len__(self) -> int:
        return len(self._owners)

    def announce(self, seq_id: str, names: Iterable[bytes]) -> list[bytes]:
        """A sequence will have these; returns those that nobody else announced."""
        mine = [name for name in names if name not in self._owners]
        self._owners.update(dict.fromkeys(mine, seq_id))
        return mine

    def retract(self, seq_id: str, names: Iterable[bytes]) -> None:
        """What a sequence announced is there, or will not come."""
        if self._owners:
            for name in names:
                if self._owners.get(name) == seq_id:
                    del self._owners[name]

    def last_of(self, names: Sequence[bytes], *, without_gap: bool) -> bytes | None:
        """The last of these that is under way; `without_gap`: of those that follow each other from the first on."""
        if not self._owners:
            return None
        found = (itertools.takewhile if without_gap else filter)(self._owners.__contains__, names)
        return next(iter(deque(found, maxlen=1)), None)

    def owned(self) -> Iterable[tuple[bytes, str]]:
        """All of them."""
        return self._owners.items()
