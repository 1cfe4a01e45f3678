"""Requests to stop: the first one asks politely, the second means now."""

from __future__ import annotations

import asyncio
import signal
from types import TracebackType


class StopSignals:
    """Counts SIGINT and SIGTERM on the running event loop. A context manager: the loop's handlers are undone after."""

    NUMBERS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.first = asyncio.Event()
        """The server shall stop."""
        self.second = asyncio.Event()
        """It shall stop at once."""
        self._loop = asyncio.get_running_loop()

    def __enter__(self) -> StopSignals:
        for number in self.NUMBERS:
            self._loop.add_signal_handler(number, self._count)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number in self.NUMBERS:
            self._loop.remove_signal_handler(number)

    def _count(self) -> None:
        if self.first.is_set():
            self.second.set()
        self.first.set()
