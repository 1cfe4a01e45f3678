"""When writing is allowed: a budget of bytes a day, and a switch that keeps off a disk that fails."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

_SECONDS_A_DAY = 86_400
_PERSIST_BYTES = 64 << 20


class DailyBudget:
    """Counts bytes written in a day (UTC), over restarts and over all servers that share the file at `path`.

    Servers add what they wrote to the file every 64 MiB and whenever `persist` is called; a kill loses what was written
    since. A file that cannot be read counts as empty, one that cannot be written is tried again with the next bytes.
    """

    def __init__(self, path: Path, *, max_bytes: int | None, clock: Callable[[], float]) -> None:
        self._path = path
        self._max_bytes = max_bytes
        self._clock = clock
        self._day = self._today()
        self._num_spent = 0
        self._num_unpersisted = 0

    def allows(self, size_bytes: int) -> bool:
        """Whether `size_bytes` more may be written today."""
        spent = self._num_spent if self._day == self._today() else 0
        return self._max_bytes is None or spent + size_bytes <= self._max_bytes

    def spend(self, size_bytes: int) -> None:
        """Count bytes that are about to be written, whether or not it succeeds."""
        self._turn_page()
        self._num_spent += size_bytes
        self._num_unpersisted += size_bytes
        if self._num_unpersisted >= _PERSIST_BYTES:
            self.persist()

    def persist(self) -> None:
        """Add to the file what is not in it yet, and learn what others wrote. Never waits, never raises OSError."""
        self._turn_page()
        try:
            with FileLock(self._path.with_suffix(".lock"), timeout=0):
                total = self._persisted() + self._num_unpersisted
                if self._num_unpersisted:
                    self._replace(total)
        except (OSError, NotImplementedError):  # not writable, held by another server, or no locks on this disk
            return
        self._num_spent, self._num_unpersisted = total, 0

    def _today(self) -> int:
        return int(self._clock() // _SECONDS_A_DAY)

    def _turn_page(self) -> None:
        if self._day != self._today():
            self._day, self._num_spent, self._num_unpersisted = self._today(), 0, 0

    def _persisted(self) -> int:
        """Bytes of today in the file."""
        try:
            content = json.loads(self._path.read_bytes())
            num_bytes = content["bytes"] if content["day"] == self._day else 0
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return 0
        return num_bytes if isinstance(num_bytes, int) and num_bytes >= 0 else 0

    def _replace(self, num_bytes: int) -> None:
        temporary = self._path.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(json.dumps({"day": self._day, "bytes": num_bytes}), encoding="ascii")
        temporary.replace(self._path)


class WriteSwitch:
    """Off for a while after every failure, twice as long each time, until a write succeeds."""

    def __init__(self, *, clock: Callable[[], float], min_wait_s: float = 5.0, max_wait_s: float = 600.0) -> None:
        self._clock = clock
        self._min_wait_s = min_wait_s
        self._max_wait_s = max_wait_s
        self._wait_s = 0.0
        self._failed_at: float | None = None
        self.problem: str | None = None
        """Why the last write failed; None after one that succeeded."""

    @property
    def is_on(self) -> bool:
        """Whether a write may be tried now."""
        # A clock that was set back must not keep the switch off for longer
        return self._failed_at is None or not 0 <= self._clock() - self._failed_at < self._wait_s

    def fail(self, problem: str) -> float:
        """A write failed: off for the seconds that are returned."""
        self._wait_s = min(max(self._min_wait_s, self._wait_s * 2), self._max_wait_s)
        self._failed_at = self._clock()
        self.problem = problem
        return self._wait_s

    def succeed(self) -> bool:
        """A write succeeded; True if the one before failed."""
        recovered = self.problem is not None
        self._failed_at, self._wait_s, self.problem = None, 0.0, None
        return recovered
